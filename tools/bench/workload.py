"""The material of the benchmarks: models of any size with random weights, clips, and questions about them."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from measure import DEVICE
from torch import Tensor
from torchcodec.encoders import VideoEncoder
from transformers import AutoConfig

from vft.common.types import Batch
from vft.config.run import Config, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from vft.models import quantization as nf4
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained
from vft.models.released import RELEASED, TOKEN_IDS, build_from_config, language_model, qwen2_5_vl, qwen3_5
from vft.preparation.run import PreparedModel, load, open_for_training, start_adapters
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, clip, scale_gradients

DEMO_BASE = Path(__file__).parents[1] / "demo_world" / "base"
"""Its tokenizer, template and processor files serve every size."""
FPS = 30.0
"""Of all clips."""


_SEVEN_B, _SEVENTY_TWO_B = RELEASED["Qwen2.5-VL-7B-"], RELEASED["Qwen2.5-VL-72B-"]
_LLAVA_7B = RELEASED["LLaVA-NeXT-Video-7B"]


def _encoder(hidden_size: int, depth: int, heads: int, mlp: int, full: list[int]) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": heads, "intermediate_size": mlp}
    return {**sizes, "fullatt_block_indexes": full}


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": qwen2_5_vl(language_model(128, 3, 4, 2, 384, 640), True, _encoder(64, 2, 2, 192, [1])),
    # A hundredth of the 7B, with its proportions of encoder, decoder and head.
    "small": qwen2_5_vl(language_model(640, 14, 10, 2, 1728, 7680), False, _encoder(224, 8, 4, 608, [1, 3, 5, 7])),
    **{size.lower(): RELEASED[f"Qwen2.5-VL-{size}-"] for size in ("3B", "7B", "32B", "72B")},
    # The 72B's number of layers, key heads and untied head, at a 43rd of its width.
    "72b-thin": qwen2_5_vl(language_model(192, 80, 6, 1, 692, 3564), False, _encoder(32, 32, 2, 86, [7, 15, 23, 31])),
    "7b-slice": {**_SEVEN_B, "num_hidden_layers": 4},
    "72b-slice": {**_SEVENTY_TWO_B, "num_hidden_layers": 4},
}
"""config.json of Qwen2.5-VL in released sizes, in slices of them with few decoder layers, and in sizes for a CPU."""
_HYBRID_ENCODER: dict[str, Any] = {"depth": 2, "hidden_size": 128, "intermediate_size": 384, "num_heads": 2}
_HYBRID = qwen3_5(language_model(384, 4, 4, 2, 1152, 7680), True, (2, 4), **_HYBRID_ENCODER)
MODELS: dict[str, dict[str, Any]] = {
    **SHAPES,
    **{f"llava-{size.lower()}": RELEASED[f"LLaVA-NeXT-Video-{size}"] for size in ("7B", "34B")},
    "llava-7b-slice": {**_LLAVA_7B, "text_config": {**_LLAVA_7B["text_config"], "num_hidden_layers": 4}},
    # Three recurrent layers and one with attention.
    "qwen3.5-small": {**_HYBRID, **TOKEN_IDS},
    **{f"qwen3-{size.lower()}": RELEASED[f"Qwen3-VL-{size}-"] for size in ("2B", "4B", "8B", "32B")},
}
"""Also those of other families, for benchmarks that need no files."""


def add_shape(parser: ArgumentParser, shapes: dict[str, Any] = SHAPES, on_gpu: str = "3b") -> None:
    """The option for the model's size."""
    name = on_gpu if DEVICE.type == "cuda" else "small"
    parser.add_argument("--shape", choices=sorted(shapes), default=name, help=f"size of a random model ({name})")


def settings(shape: str, device: torch.device = DEVICE, **tables: Any) -> Config:
    """The configuration of a run of one step with a model of `MODELS`, in bf16 on a GPU and fp32 on a CPU."""
    model = ModelConfig(path=shape)
    train = TrainConfig(max_steps=1, precision="bf16" if device.type == "cuda" else "fp32")
    parallel = ParallelConfig(activation_checkpointing="none", compile=False)
    given = {"model": model, "lora": LoraConfig(), "train": train, "parallel": parallel, **tables}
    return Config(**{"output_dir": Path(), **given})


def open_random(config: Config) -> PreparedModel:
    """The model of a configuration whose `model.path` is one of `MODELS`, on the meta device."""
    pretrained = Pretrained(str(DEMO_BASE), AutoConfig.for_model(**MODELS[config.model.path]), {})
    return open_for_training(config, pretrained)


def random_model(config: Config, device: torch.device = DEVICE) -> VideoLanguageModel:
    """The same with random weights, ready to train on `device`."""
    prepared = open_random(config)
    load(prepared, device, None, config.parallel)
    fill(prepared.model)
    start_adapters(prepared, config)
    return prepared.model


def make_step(
    model: VideoLanguageModel, row: Batch, device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """What the trainer does with one pack."""
    optimizer = optimizer or build_optimizer(model, TrainConfig())
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        cross_entropy(model, row.to(device)).backward()
        gradients, norm = scale_gradients(trainable, 1 / row.num_targets)
        clip(gradients, float(norm), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def fill(model: torch.nn.Module, device: torch.device | None = None) -> None:
    """Random weights that keep activations of ordinary size: as an initialiser would make them. They are drawn on
    `device`, by default where the weights are."""
    device = device or next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    shapes = nf4.true_shapes(model)

    def draw(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

    for name, parameter in model.named_parameters():
        if nf4.is_packed(parameter):
            parameter.copy_(nf4.pack(draw(shapes[name], torch.float32)))
        elif parameter.dim() > 1:
            parameter.copy_(draw(parameter.shape, parameter.dtype))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    file_bytes: int = 1 << 40,
    device: torch.device | None = None,
) -> Path:
    """A checkpoint with random weights in the released layout, in files of at most `file_bytes`. The weights are drawn
    on `device`."""
    shutil.copytree(DEMO_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "vft.json"), dirs_exist_ok=True)
    base = json.loads((DEMO_BASE / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**base, **config}, indent=1), encoding="utf-8")
    model = build_from_config(config, dtype).to_empty(device="cpu")
    fill(model, device)
    save_torch_state_dict(dict(model.named_parameters()), folder, max_shard_size=file_bytes)
    return folder


def write_clips(
    folder: Path, count: int, height: int = 256, width: int = 256, frames: int = 60, longest: int = 0
) -> list[Path]:
    """H.264 clips of `frames` frames at `FPS` a second, or of up to `longest` (short ones are more).

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
        VideoEncoder(clip, frame_rate=FPS).to_file(path)
    return paths


def _noise(height: int, width: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Values in 0..1, [3, height + 96, width + 96] or more, smooth within `size` pixels."""
    coarse = torch.rand(1, 3, (height + 96) // size + 2, (width + 96) // size + 2, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=size, mode="bilinear")[0]


def write_records(
    file: Path, clips: Sequence[Path], questions: int, words: int = 12, mixed: bool = False, root: Path | None = None
) -> Path:
    """LLaVA-shaped JSON: `questions` records for each clip, each a question and an answer of about `words` words.

    Paths of clips are relative to `root`, else to the file's folder. `mixed`: answers of very different lengths, from
    1 word to 16 x `words`, most of them short.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = [
        *("red", "blue", "disc", "square", "moves", "jumps", "left", "right", "slowly"),
        *("on", "a", "dark", "field"),
    ]

    def text(count: int) -> str:
        return " ".join(vocabulary[i] for i in torch.randint(len(vocabulary), (count,), generator=generator))

    def answer() -> str:
        share = 2 ** (4 * float(torch.rand((), generator=generator)) ** 2) / 2 if mixed else 1.0
        return text(max(1, round(words * share)))

    records = [
        {
            "id": f"{clip.stem}-{number}",
            "video": str(clip.relative_to(root or file.parent)),
            "conversations": [
                {"from": "human", "value": f"<video>\n{text(words)}?"},
                {"from": "gpt", "value": f"{answer()}."},
            ],
        }
        for clip in clips
        for number in range(questions)
    ]
    file.write_text(json.dumps(records), encoding="utf-8")
    return file
