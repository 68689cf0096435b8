"""What the benchmarks work on: checkpoints of any size with random weights, clips, questions about them."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from measure import default_device
from safetensors.torch import save_file
from torchcodec.encoders import VideoEncoder
from transformers import AutoConfig

from vft import models
from vft.adapters.lora import choose_trainable, initialise
from vft.common.errors import UserError
from vft.config.run import LoraConfig
from vft.models import quantization as nf4
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import stretch_positions

DEMO_BASE = Path(__file__).parents[1] / "demo_world" / "base"
"""Its tokenizer, template and processor files serve every size."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2.5-VL."""

    width: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    vocabulary: int
    tied: bool
    vision_width: int
    vision_depth: int
    vision_heads: int
    vision_mlp: int
    vision_full: tuple[int, ...]

    def config(self) -> dict[str, Any]:
        """The demo base's config.json with these sizes."""
        config = json.loads((DEMO_BASE / "config.json").read_text(encoding="utf-8"))
        config |= {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_window_layers": self.layers,
        }
        half = self.width // self.heads // 2
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
        config["vision_config"] |= {
            "depth": self.vision_depth,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_mlp,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.width,
            "fullatt_block_indexes": list(self.vision_full),
        }
        return config


_LARGE_ENCODER = {"vision_depth": 32, "vision_width": 1280, "vision_heads": 16, "vision_full": (7, 15, 23, 31)}
_SEVEN_B = Shape(3584, 28, 28, 4, 18944, 152064, False, vision_mlp=3420, **_LARGE_ENCODER)  # type: ignore[arg-type]
SHAPES = {
    "tiny": Shape(128, 3, 4, 2, 384, 640, True, 64, 2, 2, 192, (1,)),
    # A hundredth of the 7B, with its proportions of encoder, decoder and head.
    "small": Shape(640, 14, 10, 2, 1728, 7680, False, 224, 8, 4, 608, (1, 3, 5, 7)),
    "3b": Shape(2048, 36, 16, 2, 11008, 151936, True, vision_mlp=3420, **_LARGE_ENCODER),  # type: ignore[arg-type]
    "7b": _SEVEN_B,
    "32b": Shape(5120, 64, 40, 8, 27648, 152064, False, vision_mlp=3456, **_LARGE_ENCODER),  # type: ignore[arg-type]
    "72b": Shape(8192, 80, 64, 8, 29568, 152064, False, vision_mlp=3456, **_LARGE_ENCODER),  # type: ignore[arg-type]
    # The 72B's layers, key heads, head of its own and proportions, at a 43rd of its width.
    "72b-thin": Shape(192, 80, 6, 1, 692, 3564, False, 32, 32, 2, 86, (7, 15, 23, 31)),
    "7b-slice": replace(_SEVEN_B, layers=4),
    "72b-slice": Shape(8192, 4, 64, 8, 29568, 152064, False, vision_mlp=3456, **_LARGE_ENCODER),  # type: ignore[arg-type]
}
"""Released sizes, slices of them with few decoder layers, and small ones for a CPU."""


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of a LLaVA-NeXT-Video, whose encoder is always CLIP's large one at 336 pixels."""

    width: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    vocabulary: int

    def config(self) -> dict[str, Any]:
        """A config.json with these sizes; the encoder's are the class's defaults."""
        text = {
            "model_type": "llama",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
        }
        return {"model_type": "llava_next_video", "text_config": text}


@dataclass(frozen=True)
class Qwen3Shape:
    """Sizes of a Qwen3-VL."""

    width: int
    layers: int
    heads: int
    mlp: int
    tied: bool
    vision_depth: int
    vision_width: int
    vision_mlp: int
    deepstack: tuple[int, ...]

    def config(self) -> dict[str, Any]:
        """A config.json with these sizes; the encoder's others are the class's defaults."""
        text = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 8,
            "intermediate_size": self.mlp,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        }
        vision = {
            "depth": self.vision_depth,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_mlp,
            "out_hidden_size": self.width,
            "deepstack_visual_indexes": list(self.deepstack),
        }
        whole = {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
        return {**whole, "tie_word_embeddings": self.tied}


AnyShape = Shape | LlavaShape | Qwen3Shape
MODELS: dict[str, AnyShape] = {
    **SHAPES,
    "llava-7b": LlavaShape(4096, 32, 32, 32, 11008, 32064),
    "llava-34b": LlavaShape(7168, 60, 56, 8, 20480, 64064),
    "llava-7b-slice": LlavaShape(4096, 4, 32, 32, 11008, 32064),
    "qwen3-2b": Qwen3Shape(2048, 28, 16, 6144, True, 24, 1024, 4096, (5, 11, 17)),
    "qwen3-4b": Qwen3Shape(2560, 36, 32, 9728, True, 24, 1024, 4096, (5, 11, 17)),
    "qwen3-8b": Qwen3Shape(4096, 36, 32, 12288, False, 27, 1152, 4304, (8, 16, 24)),
    "qwen3-32b": Qwen3Shape(5120, 64, 64, 25600, False, 27, 1152, 4304, (8, 16, 24)),
}
"""Those of other families too, for what needs no files."""
RELEASED = {
    **{f"Qwen2.5-VL-{size}-": size.lower() for size in ("3B", "7B", "32B", "72B")},
    **{f"LLaVA-NeXT-Video-{size}": f"llava-{size.lower()}" for size in ("7B", "34B")},
    **{f"Qwen3-VL-{size}-": f"qwen3-{size.lower()}" for size in ("2B", "4B", "8B", "32B")},
}
"""Parts of hub names, and the shapes that they mean."""


def build_model(
    shape: AnyShape, dtype: torch.dtype, quantize: str = "none", rope_factor: float | None = None
) -> VideoLanguageModel:
    """A model of this shape on the meta device; `quantize` and `rope_factor` are those of `[model]`."""
    config = AutoConfig.for_model(**shape.config())
    stretch_positions(config, rope_factor)
    processor = json.loads((DEMO_BASE / "preprocessor_config.json").read_text(encoding="utf-8"))
    return models.build_model(config, processor, dtype, quantize)


def adapted_model(shape: AnyShape, device: torch.device) -> VideoLanguageModel:
    """A model with random weights and fresh adapters on `device`, in bf16 on a GPU and fp32 on a CPU."""
    model = build_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32)
    choose_trainable(model, LoraConfig(), ())
    model.to_empty(device=device)
    fill(model)
    initialise(model, seed=0)
    return model


def add_common_options(parser: ArgumentParser) -> None:
    """What benchmarks of a step's parts are asked for."""
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: 3b on a GPU, small on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed (default 5)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")


def shape_and_device(arguments: Namespace) -> tuple[str, torch.device]:
    """Name of the shape, and where it runs. UserError where nothing would be timed."""
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: must be at least 1")
    device = default_device()
    return arguments.shape or ("3b" if device.type == "cuda" else "small"), device


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations of ordinary size: as an initialiser would make them."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    shapes = nf4.true_shapes(model)
    for name, parameter in model.named_parameters():
        if nf4.is_packed(parameter):
            values = torch.empty(shapes[name], device=parameter.device).normal_(0, 0.02, generator=generator)
            parameter.copy_(nf4.pack(values))
        elif parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def write_checkpoint(
    folder: Path, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, file_bytes: int = 0
) -> Path:
    """A checkpoint with random weights in the released layout; with `file_bytes` in several files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in DEMO_BASE.glob("*.json"):
        if file.name not in ("config.json", "vft.json"):
            shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    model = build_model(shape, dtype)
    model.to_empty(device="cpu")
    fill(model, seed)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    if not file_bytes:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=file_bytes)
    for name, members in split.filename_to_tensors.items():
        save_file({member: tensors[member] for member in members}, folder / name, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_clips(
    folder: Path, count: int, height: int = 256, width: int = 256, frames: int = 60, fps: float = 30.0, longest: int = 0
) -> list[Path]:
    """H.264 clips of `frames` frames, or of up to `longest` (short ones are more).

    Coarse patches drift one way and a fine texture another: every frame differs.

    At 640 x 360 a frame takes 0.06 bits a pixel and 0.6 ms to decode, and those of LLaMA-Factory's two demonstration
    clips of that size 0.065 and 0.5 to 0.8 ms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        patches, texture = (_noise(height, width, size, generator) for size in (16, 4))
        share = float(torch.rand((), generator=generator)) if longest else 0.0
        length = round(frames * (max(longest, frames) / frames) ** share)
        clip = torch.empty(length, 3, height, width, dtype=torch.uint8)
        for step in range(length):
            y, x = step % 96, (2 * step) % 96
            fine = texture[:, :height, :width].roll((-3 * step, 5 * step), (1, 2))
            clip[step] = (255 * patches[:, y : y + height, x : x + width] + 12 * fine).clamp(0, 255)
        VideoEncoder(clip, frame_rate=fps).to_file(path)
    return paths


def _noise(height: int, width: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Values in 0..1, [3, height + 96, width + 96] or more, smooth within `size` pixels."""
    coarse = torch.rand(1, 3, (height + 96) // size + 2, (width + 96) // size + 2, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=size, mode="bilinear")[0]


def write_records(
    file: Path,
    clips: Sequence[Path],
    questions: int,
    words: int = 12,
    mixed: bool = False,
    seed: int = 0,
    root: Path | None = None,
) -> Path:
    """LLaVA-shaped JSON: `questions` records for each clip, each a question and an answer of about `words` words.

    Paths of clips are relative to `root`, else to the file's folder. `mixed`: answers of very different lengths, from
    1 word to 16 x `words`, most of them short.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = (
        "red",
        "blue",
        "disc",
        "square",
        "moves",
        "jumps",
        "left",
        "right",
        "slowly",
        "on",
        "a",
        "dark",
        "field",
    )

    def text(count: int) -> str:
        chosen = torch.randint(len(vocabulary), (count,), generator=generator)
        return " ".join(vocabulary[i] for i in chosen)

    def lengths() -> Iterator[int]:
        while True:
            factor = 2 ** (4 * float(torch.rand((), generator=generator)) ** 2) if mixed else 1.0
            yield max(1, round(words * factor / (2 if mixed else 1)))

    length = lengths()
    records = [
        {
            "id": f"{clip.stem}-{number}",
            "video": str(clip.relative_to(root or file.parent)),
            "conversations": [
                {"from": "human", "value": f"<video>\n{text(words)}?"},
                {"from": "gpt", "value": f"{text(next(length))}."},
            ],
        }
        for clip in clips
        for number in range(questions)
    ]
    file.write_text(json.dumps(records), encoding="utf-8")
    return file
