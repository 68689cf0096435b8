"""What the tests share: small models, conversations, media, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.families import QWEN2_5_VL, Family
from tests.helpers.patches import patches_of
from vft.common.types import (
    Batch,
    Conversation,
    Document,
    MediaInfo,
    MediaKind,
    MediaPlan,
    MediaRef,
    Patches,
    Role,
    Turn,
    VisionLimits,
)
from vft.config.data import DataConfig
from vft.config.run import ModelConfig, ParallelConfig
from vft.data.budget import fit, plan_conversation
from vft.data.chat import ChatEncoder
from vft.data.packing import collate
from vft.models import build
from vft.models.base import VideoLanguageModel, component_of
from vft.models.pretrained import Pretrained
from vft.models.weights import load_weights
from vft.preparation.run import PreparedModel, load_for_inference, open_for_inference
from vft.training.losses import cross_entropy

CPU = torch.device("cpu")
ALL_COMPONENTS = ("language_model", "vision_encoder", "projector")

# ------------------------------------------------------------------------------------------------------ checkpoints


@dataclass
class Tiny:
    """A small checkpoint and what is made of it."""

    path: Path
    family: Family = QWEN2_5_VL

    @cached_property
    def theirs(self) -> Any:
        """transformers' model; tests leave it as it is."""
        return self.load(self.path)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' model of a checkpoint of the same family; it has taken every tensor."""
        return self.family.transformers_model(folder, dtype)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Arguments of transformers' model for a batch of one document with one branch, positions given explicitly."""
        assert len(batch.documents) == 1 and len(batch.documents[0].suffix_lengths) == 1
        return self.family.inputs(batch, self.encoder.processor)

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Tokenizer, template and the family's rules."""
        return load_model(str(self.path), None, torch.float32, CPU).encoder(DataConfig())

    def ours(self) -> VideoLanguageModel:
        """A fresh model in float32 whose every weight is trained that anything reads."""
        model = load_model(str(self.path), None, torch.float32, CPU).model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(component_of(name, model.components) in ALL_COMPONENTS)
        return model


def load_model(
    path: str, adapter: Path | None, dtype: torch.dtype, device: torch.device, **settings: Any
) -> PreparedModel:
    """A base, or an adapter on it, ready to answer; `settings` are keys of `[model]`."""
    prepared = open_for_inference(ModelConfig(path=path, **settings), adapter, dtype)
    load_for_inference(prepared, device, None, ParallelConfig())
    return prepared


def load_prepared(
    path: Path, prepare: Callable[[VideoLanguageModel], Any], dtype: torch.dtype = torch.float32, quantize: str = "none"
) -> tuple[VideoLanguageModel, Pretrained]:
    """A model on which `prepare` ran while it was on the meta device, with its base weights, as training builds it."""
    checkpoint = Pretrained.open(str(path))
    model = build(checkpoint, dtype, quantize)
    base = frozenset(name for name, _ in model.named_parameters())
    prepare(model)
    model.to_empty(device=CPU)
    extra = frozenset(name for name, _ in model.named_parameters()) - base
    load_weights(model, checkpoint, extra)
    return model, checkpoint


# ---------------------------------------------------------------------------------------------- conversations, media


def talk(*turns: tuple[Role, str | Sequence[str | MediaRef]], id: str = "sample") -> Conversation:
    """A conversation of (role, text or parts)."""
    made = tuple(Turn(role, (parts,) if isinstance(parts, str) else tuple(parts)) for role, parts in turns)
    return Conversation(id, made, f"{id}.json:1")


LIMITS = VisionLimits(
    fps=None, frames=4, min_frames=2, max_frames=64, min_pixels=28 * 28, max_pixels=1 << 30, total_pixels=None
)


def medium(
    kind: MediaKind, frames: int, height: int, width: int, fps: float = 8.0, name: str = "clip"
) -> tuple[MediaRef, MediaInfo]:
    """A medium that no file holds: the data path from the plan on never asks for one."""
    ref = MediaRef(kind, Path(f"{name}.mp4"))
    if kind == "image":
        return ref, MediaInfo("image", height, width)
    return ref, MediaInfo("video", height, width, frames, fps, duration_s=frames / fps)


@dataclass
class Media:
    """Plans and random pixels of a conversation's media."""

    plans: tuple[MediaPlan, ...]
    patches: tuple[Patches, ...]

    @staticmethod
    def make(
        processor: Any, media: Sequence[tuple[MediaRef, MediaInfo]], frames: int | None = None, seed: int = 0
    ) -> Media:
        """All frames of each medium, or `frames` of them, at the nearest allowed size."""
        plans = tuple(
            processor.plan(ref, info, replace(LIMITS, frames=frames or info.num_frames)) for ref, info in media
        )
        generator = torch.Generator().manual_seed(seed)
        patches = []
        for plan in plans:
            shape = (len(plan.frame_indices), 3, plan.info.height, plan.info.width)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            patches.append(patches_of(pixels, plan, processor))
        return Media(plans, tuple(patches))


def document(encoder: ChatEncoder, conversations: Sequence[Conversation], media: Media) -> Document:
    """One document of conversations that share all their media."""
    return encoder.document(conversations, media.plans)


def plans_that_fit(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    config: DataConfig,
    info: Callable[[MediaRef], MediaInfo],
    answer_next: bool = False,
    new_tokens: int = 0,
) -> tuple[MediaPlan, ...]:
    """Plans of the media that the conversations share, such that each of them fits a row and the context."""
    media = plan_conversation(conversations[0], encoder.processor, config, info)
    return fit(conversations, media, encoder, config, 1, new_tokens, answer_next).media.plans


def batch_of(encoder: ChatEncoder, *rows: tuple[Sequence[Conversation], Media]) -> Batch:
    """One pack; each row is a document."""
    return collate([(document(encoder, talks, media), media.patches) for talks, media in rows], encoder.processor)


NO_MEDIA = Media((), ())

# ------------------------------------------------------------------------------------------------ comparing models


def every_logit(model: Any, batch: Batch) -> Tensor:
    """Logits of every row [T, V], supervised or not."""
    rows = torch.arange(batch.input_ids_T.numel())
    return model.logits(replace(batch, target_index_N=rows))


def loss_and_gradients(model: Any, *batches: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of the batches together, and the gradient of each parameter that has one."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = cross_entropy(model, batch)
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each gradient within `tolerance` of the other, relative to its norm."""
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm())
        # Rounding is relative to the terms of a sum, which may cancel: hence the second, tiny part.
        assert error <= tolerance * (float(gradient.norm()) + 1e-3 * scale), f"{name}: off by {error:.2e}"
