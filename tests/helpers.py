"""Small models, tokenizers and media that the tests share. transformers makes the checkpoints, not this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vft.answer import load_model
from vft.data import vision
from vft.data.chat import ChatEncoder
from vft.data.packing import collate
from vft.models import Skeleton, build
from vft.models.qwen2_5_vl import Qwen2_5_VL
from vft.models.weights import Checkpoint, load_weights
from vft.types import (
    Batch,
    Clip,
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

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The released template without its picture numbers."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the released tokenizer's rules and special tokens, and few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["user assistant system You are a helpful assistant.", "What happens in the video?\n\n  A dog runs."] * 2
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    folder: Path, tied: bool = True, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", seed: int = 0
) -> Path:
    """A random Qwen2.5-VL with its tokenizer in `folder`, made and written by transformers."""
    tokenizer = make_tokenizer()
    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["im_end"],
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far wider than an initialiser's, so that every part moves the logits far more than rounding does.
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_q" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name or parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.3 * parameter[0].numel() ** -0.5)
            if "embed_tokens" in name or "lm_head" in name:
                # A generated placeholder would make transformers ask for more media.
                parameter[[ids["image_pad"], ids["video_pad"]]] = 0
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """transformers' own model of a checkpoint, ready to compare with."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


@dataclass
class Tiny:
    """A small checkpoint and what is made of it."""

    path: Path

    @cached_property
    def theirs(self) -> Qwen2_5_VLForConditionalGeneration:
        """transformers' model; tests leave it as it is."""
        return transformers_model(self.path)

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Tokenizer, template and the family's rules."""
        return load_model(str(self.path), None, torch.float32, CPU).encoder

    def ours(self) -> Qwen2_5_VL:
        """A fresh model in float32 whose every weight is trained."""
        model = load_model(str(self.path), None, torch.float32, CPU).skeleton.model
        return model.requires_grad_(True)


def load_prepared(
    path: Path, prepare: Callable[[Skeleton], Any], dtype: torch.dtype = torch.float32
) -> tuple[Skeleton, Checkpoint]:
    """A model on which `prepare` ran while it was on the meta device, with its base weights, as training builds it."""
    checkpoint = Checkpoint.open(str(path))
    skeleton = build(checkpoint, dtype)
    base = frozenset(name for name, _ in skeleton.model.named_parameters())
    prepare(skeleton)
    skeleton.model.to_empty(device=CPU)
    extra = frozenset(name for name, _ in skeleton.model.named_parameters()) - base
    load_weights(skeleton.model, checkpoint, extra)
    return skeleton, checkpoint


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
    def make(spec: Any, media: Sequence[tuple[MediaRef, MediaInfo]], frames: int | None = None, seed: int = 0) -> Media:
        """All frames of each medium, or `frames` of them, at the nearest allowed size."""
        plans = tuple(spec.plan(ref, info, replace(LIMITS, frames=frames or info.num_frames)) for ref, info in media)
        generator = torch.Generator().manual_seed(seed)
        patches = []
        for plan in plans:
            shape = (len(plan.frame_indices), 3, plan.info.height, plan.info.width)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            patches.append(vision.patchify(Clip(pixels, plan.frame_times_s), plan, spec))
        return Media(plans, tuple(patches))


def document(encoder: ChatEncoder, conversations: Sequence[Conversation], media: Media) -> Document:
    """One document of conversations that share all their media."""
    encoded = [encoder.encode(one, media=media.plans) for one in conversations]
    return encoder.document(encoded, media.plans, [one.id for one in conversations])


def batch_of(encoder: ChatEncoder, *rows: tuple[Sequence[Conversation], Media]) -> Batch:
    """One pack; each row is a document."""
    return collate([(document(encoder, talks, media), media.patches) for talks, media in rows], encoder.spec)


NO_MEDIA = Media((), ())

# ------------------------------------------------------------------------------------------------ comparing models


def inputs_for_transformers(batch: Batch, spec: Any) -> dict[str, Tensor]:
    """Arguments of transformers' model for a batch of one document with one branch, positions given explicitly."""
    assert len(batch.documents) == 1 and len(batch.documents[0].branch_lengths) == 1
    inputs = {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.positions_3T[:, None],
        "attention_mask": torch.ones_like(batch.input_ids_T)[None],
    }
    mean, std = (torch.tensor(x).view(1, 3, 1) for x in (spec.mean, spec.std))
    counts = [t * h * w for t, h, w in batch.grids]
    for kind, pixels, grid in (
        ("video", "pixel_values_videos", "video_grid_thw"),
        ("image", "pixel_values", "image_grid_thw"),
    ):
        chosen = [i for i, plan in enumerate(batch.documents[0].media) if plan.ref.kind == kind]
        if chosen:
            raw = torch.cat([batch.pixels_PD.split(counts)[i] for i in chosen]).float().unflatten(1, (3, -1))
            inputs[pixels] = ((raw / 255 - mean) / std).flatten(1)
            inputs[grid] = torch.tensor([batch.grids[i] for i in chosen])
    return inputs


def every_logit(model: Any, batch: Batch) -> Tensor:
    """Logits of every row [T, V], supervised or not."""
    rows = torch.arange(batch.input_ids_T.numel())
    return model(replace(batch, target_index_N=rows, target_ids_N=rows * 0), loss=False)


def loss_and_gradients(model: Any, *batches: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of the batches together, and the gradient of each parameter that has one."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(batch)
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
