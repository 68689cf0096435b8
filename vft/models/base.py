"""The base class of the model families, through which the rest of the program uses a model.

Training, parallelism, memory plans, FLOPs, adapters and generation know `VideoLanguageModel` and no family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vft.common.types import Batch, MediaInfo, MediaRef, VisionLayout, VisionLimits, move
from vft.models.decoder import Decoder
from vft.models.kv_cache import Cache
from vft.models.processor import VisionProcessor


@dataclass(frozen=True, slots=True)
class VisionParts:
    """The modules that turn pixels into embeddings, for sharding, activation checkpointing and FLOPs."""

    modules: tuple[nn.Module, ...]
    """Modules that are called as modules. Each is one unit of sharding if any of their parameters is trained."""
    blocks: Iterable[nn.Module]
    """Layers of the vision encoder, for activation checkpointing. Each has an `mlp`."""
    patches_per_row: int
    """Patches of a video that become one row of the projector."""
    pair_widths: dict[str, int]
    """For each attention plan of a layout, the sum of the widths of the blocks that use it."""
    added: int = 0
    """After how many of the decoder's layers further tensors are added."""


Spellings = Mapping[str, tuple[str, ...]]
"""Prefix of a part's parameter names in this project's model to all its prefixes in files, including its own: first
that of transformers' model in memory (4.52 and later). An empty one stands for names that begin with the decoder's own
parts."""
MAX_LOGITS = 1 << 27
"""Logits held at once (512 MiB in float32); more supervised tokens than fit are taken in chunks."""
Head = Callable[[Tensor], Tensor]
"""Hidden states [N, E] to logits [N, V]."""


class Objective:
    """What training minimises (`vft.training.losses`, `vft.training.preferences`)."""

    figures: tuple[str, ...] = ()
    """Names of what it sums beside the loss."""
    looks_ahead = False
    """Whether the loss of a pack depends on the other packs of its step: `look` then sees each of them first."""

    def weight(self, batch: Batch) -> int:
        """Of a pack. The loss of a step, and its figures, are sums divided by the weight of all its packs."""
        raise NotImplementedError

    def __call__(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """The summed loss of the pack, a scalar with a graph, or [1 + figures] with the figures' sums behind it."""
        raise NotImplementedError

    def look(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """What the pack adds to `ahead`, without a graph. Each look is followed by a call, in the same order."""
        raise NotImplementedError

    def set_ahead(self, total: Tensor) -> None:
        """Take the sum of what `look` returned, over the packs of all processes."""

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """The figures of a step by name, from their sums divided by the weight."""
        return dict(zip(self.figures, means, strict=True))


class VideoLanguageModel(nn.Module):
    """Maps a batch to hidden states or logits. A family defines the parts, with parameter names as released."""

    components: Mapping[str, tuple[str, ...]]
    """Parts that can be trained or adapted, as prefixes of parameter names; the first that fits counts. Other parts
    than `language_model`, `projector` and `vision_encoder` are never trained."""
    spellings: Spellings
    """Prefixes of the parts' names in files."""
    unused: tuple[str, ...] = ()
    """Beginnings of the names of released tensors that are not part of this model. An export copies them."""
    in_float32: tuple[str, ...] = ()
    """Endings of the names of parameters that stay in float32 beside bf16, as in the released files."""
    decoder_path: str
    """Names of the decoder and the output head among the modules."""
    head_path: str
    turned: tuple[str, ...] = ()
    """Endings of the names of parameters [..., in, out] that some programs have saved as [..., out, in]."""

    def __init__(self, config: Any, processor: VisionProcessor, compute_dtype: torch.dtype) -> None:
        """`config` is transformers' `text_config`."""
        super().__init__()
        self.config, self.processor, self.compute_dtype = config, processor, compute_dtype

    @property
    def decoder(self) -> Decoder:
        """Embedding, layers and final norm of the language model."""
        return attrgetter(self.decoder_path)(self)

    @property
    def output_head(self) -> nn.Linear | None:
        """The output head; None if it is tied to the embedding."""
        return attrgetter(self.head_path)(self)

    @property
    def vision(self) -> VisionParts:
        """Vision encoder and projector."""
        raise NotImplementedError

    def encode_media(self, pixels_PD: Tensor, layout: Any) -> tuple[Tensor, ...]:
        """Normalised pixels [P, D] to embeddings [M, E], both in media order. Further tensors [M, E] are added after
        the first decoder layers (DeepStack). By default the first of the vision's modules does it all.

        Frozen parts build no graph. Trained parts are in the graph whatever media there are.
        """
        return self.vision.modules[0](pixels_PD, layout)

    def peft_name(self, name: str) -> str:
        """The name of a parameter or module in transformers' model in memory, which adapter files use."""
        ours, theirs = next(pair for pair in self.spellings.items() if f"{name}.".startswith(pair[0]))
        return (theirs[0] + f"{name}.".removeprefix(ours)).removesuffix(".")

    def smallest_medium(self) -> tuple[int, VisionLayout]:
        """Number of patches and layout of the smallest possible video."""
        limits = VisionLimits(None, frames=1, min_frames=1, max_frames=1, min_pixels=1, max_pixels=1, total_pixels=None)
        plan = self.processor.plan(MediaRef("video", ()), MediaInfo("video", 1, 1, fps=1.0), limits)
        return math.prod(plan.grid_thw), self.processor.layout([plan])

    def vision_parameters(self) -> list[nn.Parameter]:
        """All parameters outside the language model."""
        own = self.components["language_model"]
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(own)]

    def exact_parameters(self) -> set[nn.Parameter]:
        """Frozen parameters that must not be rounded to the compute dtype."""
        named = self.named_parameters()
        return {
            parameter for name, parameter in named if name.endswith(self.in_float32) and not parameter.requires_grad
        }

    @property
    def trains_vision(self) -> bool:
        """Whether any parameter outside the language model is trained."""
        return any(parameter.requires_grad for parameter in self.vision_parameters())

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Normalised hidden states [N, E] of the rows `batch.target_index_N`, in the compute dtype."""
        x_TE, deepstack = self.embed(batch)
        hidden_NE: Tensor = self.decoder.norm(self.decoder(x_TE, batch, cache, deepstack))
        return hidden_NE

    def logits(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Logits [N, V] of the rows `batch.target_index_N`, in float32."""
        return self.head(self(batch, cache)).float()

    def head(self, hidden_NE: Tensor) -> Tensor:
        """Logits [N, V]. An untied head is called as a module, since it may have an adapter."""
        if self.output_head is not None:
            return self.output_head(hidden_NE)
        return F.linear(hidden_NE, self.decoder.embed_tokens.weight.to(hidden_NE.dtype))

    def chunks(self, hidden_NE: Tensor, targets_N: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and targets in chunks of which no more than `MAX_LOGITS` logits are made."""
        rows = max(1, MAX_LOGITS // self.config.vocab_size)
        return list(zip(hidden_NE.split(rows), targets_N.split(rows), strict=True))

    def embed(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token and media embeddings [T, E] in the compute dtype, and tensors [M, E] that are added to the media's
        rows after the first decoder layers."""
        x_TE = self.decoder.embed_tokens(batch.input_ids_T).to(self.compute_dtype)
        if batch.layout is not None:
            media_ME, *deepstack = batch.embeddings or self.encode_media(self.normalise(batch.pixels_PD), batch.layout)
            return x_TE.index_copy(0, batch.media_index_M, media_ME.to(x_TE.dtype)), tuple(deepstack)
        if not batch.continues and self.trains_vision:
            # A trained encoder is sharded, so it must run in every process, forward and backward, or others would hang.
            patches, layout = self.smallest_medium()
            dummy_PD = batch.pixels_PD.new_zeros(patches, self.processor.patch_features)
            embeddings = self.encode_media(self.normalise(dummy_PD), move(layout, x_TE.device))
            x_TE = x_TE + 0.0 * sum(x.sum() for x in embeddings)
        return x_TE, ()

    def with_embeddings(self, batch: Batch) -> Batch:
        """The batch with the embeddings of its media, which several passes over it share, if nothing trained makes
        them; else as it is."""
        if batch.layout is None or self.trains_vision:
            return batch
        return replace(batch, embeddings=self.encode_media(self.normalise(batch.pixels_PD), batch.layout))

    def normalise(self, pixels_PD: Tensor) -> Tensor:
        """uint8 patches to (x / 255 - mean) / std by channel, in float32, then in the compute dtype."""
        per_channel = pixels_PD.shape[1] // 3
        mean_D, std_D = (
            move(torch.tensor(values), pixels_PD.device).repeat_interleave(per_channel)
            for values in (self.processor.mean, self.processor.std)
        )
        return ((pixels_PD.float() / 255 - mean_D) / std_D).to(self.compute_dtype)


def component_of(name: str, components: Mapping[str, tuple[str, ...]]) -> str:
    """The component of the model that a parameter or module belongs to: the first with a prefix that fits."""
    for component, prefixes in components.items():
        if f"{name}.".startswith(prefixes):  # with the dot, so that the module "lm_head" has the prefix "lm_head."
            return component
    raise AssertionError(f"{name} belongs to no component of {list(components)}")
