"""What every model family is: the seam between a family's files and everything else.

Parallelism, memory plans, FLOPs, adapters and generation read a model through `VideoLanguageModel` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.types import Batch, MediaInfo, MediaRef, VisionLayout, VisionLimits, move
from vft.models.decoder import Decoder, DecoderConfig
from vft.models.kv_cache import Cache
from vft.models.processor import VisionProcessor
from vft.models.tensor_names import Spellings


@dataclass(frozen=True, slots=True)
class VisionParts:
    """What turns pixels into embeddings, as sharding, checkpointing and FLOPs see it."""

    modules: tuple[nn.Module, ...]
    """Each is called as a module, and sharded as a whole where something of them is trained."""
    blocks: Iterable[nn.Module]
    """Layers of the encoder, whose activations may be recomputed; each has an `mlp`."""
    encoder: tuple[nn.Parameter, ...]
    """Weights that every patch passes through."""
    projector: tuple[nn.Parameter, ...]
    """Weights behind the encoder, passed by `VisionLayout.projector_rows` rows."""
    patches_per_row: int
    """Patches that become one row of the merger, in a video."""
    pair_widths: dict[str, int]
    """For each plan of a layout: the width of the blocks that attend by it, summed over them."""


Objective = Callable[["VideoLanguageModel", Batch], Tensor]
"""The model and a pack to a scalar with a graph: the summed loss of the pack (`vft.training.losses`)."""


class VideoLanguageModel(nn.Module):
    """A batch to hidden states, or to logits. A family gives the parts; names are those of released checkpoints."""

    components: Mapping[str, tuple[str, ...]]
    """Parts that can be trained or adapted, by prefixes of parameter names; the first that fits counts. What is neither
    `language_model`, `projector` nor `vision_encoder` is never trained."""
    spellings: Spellings
    """How the names of the parts begin in files (`vft.models.tensor_names`)."""
    peft_prefixes: Mapping[str, str]
    """Released names to those of transformers' model in memory, which adapter files use; the first that fits counts."""
    decoder_at: str
    """Where the decoder is among the modules, and the head."""
    head_at: str

    def __init__(self, config: DecoderConfig, processor: VisionProcessor, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.processor, self.compute_dtype = config, processor, compute_dtype

    @property
    def decoder(self) -> Decoder:
        """Embedding, layers and norm of the language model."""
        return attrgetter(self.decoder_at)(self)

    @property
    def output_head(self) -> nn.Linear | None:
        """The head's own weights; None where the embedding's serve."""
        return attrgetter(self.head_at)(self)

    @property
    def vision(self) -> VisionParts:
        """The parts before the language model."""
        raise NotImplementedError

    def see(self, pixels_PD: Tensor, layout: Any) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] in media order to embeddings [M, E] in media order, and what is added to them behind
        the first decoder layers, if anything. What isn't trained builds no graph; what is trained is in the graph
        whatever the media."""
        raise NotImplementedError

    def least_media(self) -> tuple[int, VisionLayout]:
        """The smallest medium: its patches, and how they lie."""
        limits = VisionLimits(None, frames=1, min_frames=1, max_frames=1, min_pixels=1, max_pixels=1, total_pixels=None)
        plan = self.processor.plan(MediaRef("video", ()), MediaInfo("video", 1, 1, fps=1.0), limits)
        return math.prod(plan.grid_thw), self.processor.layout([plan])

    def media_parameters(self) -> list[nn.Parameter]:
        """All that is not the language model's."""
        own = self.components["language_model"]
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(own)]

    @property
    def media_trained(self) -> bool:
        """Whether something before the language model is trained."""
        return any(parameter.requires_grad for parameter in self.media_parameters())

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Normalised hidden states [N, E] of the rows `batch.target_index_N`, in the compute dtype."""
        x_TE, deeper = self.embed(batch)
        row = batch.positions_3T, batch.plan, batch.target_index_N
        x_NE = self.decoder(x_TE, *row, cache, deeper, batch.media_index_M)
        hidden_NE: Tensor = self.decoder.norm(x_NE)
        return hidden_NE

    def logits(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Logits [N, V] of the rows `batch.target_index_N`, in float32."""
        return self.head(self(batch, cache)).float()

    def head(self, hidden_NE: Tensor) -> Tensor:
        """Logits [N, V]. A head of its own is called as the module that it is: it may have an adapter."""
        if self.output_head is not None:
            return self.output_head(hidden_NE)
        return F.linear(hidden_NE, self.decoder.embed_tokens.weight.to(hidden_NE.dtype))

    def embed(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token embeddings [T, E] with the media's in their places, in the compute dtype, and what is added to the
        media's rows behind the first decoder layers [M, E]."""
        x_TE = self.decoder.embed_tokens(batch.input_ids_T).to(self.compute_dtype)
        if batch.layout is not None:
            media_ME, *deeper = self.see(self.normalise(batch.pixels_PD), batch.layout)
            return x_TE.index_copy(0, batch.media_index_M, media_ME.to(x_TE.dtype)), tuple(deeper)
        if not batch.continues and self.media_trained:
            # A trained encoder is sharded: it runs in every process, or the others wait for ever; and in the graph, so
            # that backward doesn't either.
            patches, layout = self.least_media()
            dummy_PD = batch.pixels_PD.new_zeros(patches, self.processor.patch_features)
            seen = self.see(self.normalise(dummy_PD), move(layout, x_TE.device))
            x_TE = x_TE + 0.0 * sum(one.sum() for one in seen)
        return x_TE, ()

    def normalise(self, pixels_PD: Tensor) -> Tensor:
        """uint8 patches to (x / 255 - mean) / std by channel, in float32, then in the compute dtype."""
        per_channel = pixels_PD.shape[1] // 3
        mean_D, std_D = (
            torch.tensor(values, device=pixels_PD.device).repeat_interleave(per_channel)
            for values in (self.processor.mean, self.processor.std)
        )
        return ((pixels_PD.float() / 255 - mean_D) / std_D).to(self.compute_dtype)
