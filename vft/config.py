"""Settings of a run: a strict TOML file, overridden from the command line, as frozen objects.

Every key is checked before anything is loaded: an unknown key, a value of the wrong type or out of range, and two
settings that contradict each other are a `UserError` of one line. Each field states its unit or range below it.

Folders are relative to the current directory, except `path` of a source, which is relative to `data.root`.
A leading `~` is the home folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vft import strict_toml
from vft.strict_toml import covers, show
from vft.types import UserError

Tower = Literal["language_model", "vision_tower", "merger"]
SourceFormat = Literal["messages", "llava_video"]  # fmt: skip

RESUME_MAY_CHANGE = frozenset(
    {
        "output_dir",
        "train.max_steps",
        "train.epochs",
        "checkpoint",
        "log",
        "eval",
        "parallel",
        "data.workers",
        "data.max_bad_fraction",
        "data.clip_deadline_s",
        "data.cache_dir",
        "data.prefetch_packs",
    }
)
"""Keys, or sections, that a resumed run may change: they move neither the samples of a step nor what is trained.

`train.max_steps` and `train.epochs` are here so that a run can be prolonged; a decaying schedule then decays to the
new end.
"""


def _check_take(text: str) -> str:
    if not re.fullmatch(r"all|(first|random):[1-9][0-9]*", text):
        raise ValueError('must be "all", "first:N" or "random:N" with N from 1')
    return text


def _check_target(text: str) -> str:
    if not re.fullmatch(rf"({'|'.join(get_args(Tower))})(\.[A-Za-z0-9_*]+)+", text):
        raise ValueError(
            "must begin with a tower (language_model, vision_tower, merger) and name its linears after a dot: "
            '"language_model.q_proj", or "language_model.*" for all'
        )
    return text


def _check_order(low_name: str, low: int, high_name: str, high: int) -> None:
    if low > high:
        raise ValueError(f"{low_name} = {low} is above {high_name} = {high}")


def _contradiction(name: str, value: object, other: str, other_value: object, section: str) -> ValueError:
    return ValueError(
        f"{name} = {value} and {other} = {other_value} contradict each other; keep one "
        f"(on the command line, {section}.{name}= takes it away)"
    )


def _expand(folder: Path) -> Path:
    # Not Path.expanduser: it raises where there is no such user.
    return Path(os.path.expanduser(folder))


_Item = TypeVar("_Item")
_Folder = Annotated[Path, Field(strict=False), AfterValidator(_expand)]
# TOML has lists, frozen objects want tuples: the sequence alone is converted, its items stay strict.
_Tuple = Annotated[tuple[_Item, ...], Field(strict=False)]
_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_PositiveFloat = Annotated[float, Field(gt=0)]
_NonNegativeFloat = Annotated[float, Field(ge=0)]
_Below1 = Annotated[float, Field(ge=0, lt=1)]
_Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A table of the file: frozen, no unknown keys, no conversion of types except int to float."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """`[model]`: the weights to start from."""

    path: _Name
    """A folder, relative to the current directory, or a hub name such as `Qwen/Qwen2.5-VL-7B-Instruct`."""
    adapter: str = ""
    """Folder of a LoRA adapter in PEFT's format to go on from; empty: fresh matrices."""
    train: _Tuple[Tower] = ()
    """Parts that full fine-tuning trains. Only without a `[lora]` table."""


class LoraConfig(Section):
    """`[lora]`: low-rank adapters (Hu et al. 2021). Without this table, `model.train` is fine-tuned in full."""

    rank: _Positive = 16
    """Columns of A and rows of B, from 1."""
    alpha: _PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: _Below1 = 0.0
    """Share of the adapter's inputs that are zeroed in training, 0 <= dropout < 1."""
    targets: Annotated[_Tuple[Annotated[str, AfterValidator(_check_target)]], Field(min_length=1)] = (
        "language_model.*",
    )
    """Linears that get an adapter: `TOWER.NAME`, or `TOWER.*` for all linears of the tower. Anchored to a tower,
    because the towers share names: a bare `q_proj` would match in several."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""


class SourceConfig(Section):
    """One entry of `data.sources` or `eval.sources`."""

    format: SourceFormat
    """How the records are laid out. `messages` also reads ShareGPT and LLaVA records."""
    path: _Name
    """A file or folder, relative to `data.root`."""
    weight: _PositiveFloat = 1.0
    """How often its records come, relative to those of the other sources: 2.0 is twice as often as they are."""
    take: Annotated[str, AfterValidator(_check_take)] = "all"
    """`all`, `first:N` or `random:N` records; the choice depends on `seed`."""


class VideoConfig(Section):
    """`[data.video]`: what one video may take. A record's own keys go before these."""

    fps: _PositiveFloat | None = None
    """Frames sampled a second; 2.0 where neither `fps` nor `frames` is given."""
    frames: _Positive | None = None
    """A fixed number of frames instead of a rate."""
    min_frames: _Positive = 4
    """Fewest frames that `fps` may come to."""
    max_frames: _Positive = 32
    """Most frames that `fps` may come to; longer videos are sampled more sparsely. `frames` is not bounded by it."""
    min_pixels: _Positive = 4 * 28 * 28
    """Height x width of a frame after resizing, at least. The default is the model's own."""
    max_pixels: _Positive = 128 * 28 * 28
    """Height x width of a frame after resizing, at most; 28 x 28 pixels are one token of two frames."""
    total_pixels: _Positive | None = None
    """Frames x height x width of a video, at most; none: `max_pixels` alone limits."""

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("fps") is None and table.get("frames") is None:
            return {**table, "fps": 2.0}
        return table

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.fps is not None and self.frames is not None:
            raise _contradiction("fps", self.fps, "frames", self.frames, "data.video")
        _check_order("min_frames", self.min_frames, "max_frames", self.max_frames)
        _check_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        if self.total_pixels is not None:
            _check_order("min_pixels", self.min_pixels, "total_pixels", self.total_pixels)
        return self


class ImageConfig(Section):
    """`[data.image]`: what one picture may take."""

    min_pixels: _Positive = 4 * 28 * 28
    """Height x width after resizing, at least."""
    max_pixels: _Positive = 1280 * 28 * 28
    """Height x width after resizing, at most; 28 x 28 pixels are one token."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        _check_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        return self


class DataConfig(Section):
    """`[data]`: what is read, and how it is packed into rows."""

    root: _Folder = Path(".")
    """Folder of the sources and their media, relative to the current directory."""
    sources: _Tuple[SourceConfig] = ()
    """Records to train on."""
    pack_tokens: _Positive = 8192
    """Tokens of a row, at most."""
    max_samples_per_pack: _Count = 0
    """Samples in a row, at most; 0: as many as fit."""
    share_videos: bool = True
    """Lay the questions of one video behind a single copy of it. Loss and gradients stay those of separate samples."""
    workers: _Count = 4
    """Processes that decode, for each training process; 0: the training process decodes, without a deadline."""
    clip_deadline_s: _PositiveFloat = 60.0
    """Seconds that one clip may take to decode before it is given up."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of clips that may fail before the run stops."""
    cache_dir: str = ""
    """Folder of the index; empty: the environment's `VFT_CACHE`, else `~/.cache/vft`. See `cache_path`."""
    prefetch_packs: _Positive = 8
    """Rows that are prepared ahead of the training step, for each training process."""
    video: VideoConfig = VideoConfig()
    """Limits of one video."""
    image: ImageConfig = ImageConfig()
    """Limits of one picture."""

    @property
    def cache_path(self) -> Path:
        """Folder of the index: `cache_dir`, else `VFT_CACHE` of the environment, else `vft` in the user's cache."""
        chosen = self.cache_dir or os.environ.get("VFT_CACHE", "")
        if chosen:
            return _expand(Path(chosen))
        return _expand(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "vft"


class TrainConfig(Section):
    """`[train]`: length, optimizer, schedule."""

    max_steps: _Positive | None = None
    """Optimizer steps."""
    epochs: _Positive | None = None
    """Passes over the data instead; 1 where neither is given."""
    packs_per_step: _Positive = 16
    """Rows that one optimizer step consumes, over all processes; their number must divide it."""
    learning_rate: _PositiveFloat = 1e-4
    """Peak, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: decay to zero at the last step along a half cosine or a line, or no decay."""
    warmup_steps: _Count = 0
    """Steps of linear growth up to `learning_rate`."""
    weight_decay: _NonNegativeFloat = 0.0
    """Decoupled (AdamW), per step times the learning rate."""
    max_grad_norm: _NonNegativeFloat = 1.0
    """Gradients of a larger 2-norm are scaled down to it; 0: never."""
    betas: Annotated[tuple[_Below1, _Below1], Field(strict=False)] = (0.9, 0.999)
    """Decay of AdamW's two running means, each 0 <= beta < 1."""
    eps: _PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the computation and of frozen weights; trained weights are kept in fp32 either way."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("max_steps") is None and table.get("epochs") is None:
            return {**table, "epochs": 1}
        return table

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_steps is not None and self.epochs is not None:
            raise _contradiction("max_steps", self.max_steps, "epochs", self.epochs, "train")
        if self.max_steps is not None:
            _check_order("warmup_steps", self.warmup_steps, "max_steps", self.max_steps)
        return self


class ParallelConfig(Section):
    """`[parallel]`: how the work is spread and how memory is traded for time. Results stay the same."""

    shard: _Count = 0
    """Processes over which the decoder's weights are sharded; 0: all, 1: plain data parallel."""
    activation_checkpointing: Literal["none", "mlp", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping."""
    compile: bool = False
    """`torch.compile` each decoder layer: slower to start, faster steps."""


class CheckpointConfig(Section):
    """`[checkpoint]`: the state to resume from."""

    every_steps: _Count = 50
    """Optimizer steps between two; 0: at the end only."""
    keep_last: _Count = 3
    """Newest that are kept; 0: all."""


class EvalConfig(Section):
    """`[eval]`: generation on held-out records while training."""

    every_steps: _Count = 0
    """Optimizer steps between two; 0: never."""
    sources: _Tuple[SourceConfig] = ()
    """Held-out records; empty: those of `data.sources`, which shows what was memorised, not what carries over."""
    max_new_tokens: _Positive = 128
    """Tokens of an answer, at most."""
    batch_size: _Positive = 8
    """Answers generated at a time, for each process."""
    max_samples: _Count = 0
    """Records evaluated, at most; 0: all."""


class LogConfig(Section):
    """`[log]`: what is shown and written."""

    every_steps: _Positive = 1
    """Optimizer steps between two lines on the screen."""
    tensorboard: bool = False
    """Also write TensorBoard's event files (extra `tensorboard`)."""


class Config(Section):
    """A whole run."""

    output_dir: _Folder
    """Where all that the run leaves goes, relative to the current directory. The same command again resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the order of samples, dropout and fresh adapters."""
    model: ModelConfig
    lora: LoraConfig | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.lora is not None and self.model.train:
            raise ValueError(
                f"model.train = {show(self.model.train)} and a [lora] table contradict each other; keep one"
            )
        return self

    def require_training(self) -> None:
        """Check what training needs and other uses of a file (prediction, evaluation) do without.

        Raises UserError where nothing would be trained or read.
        """
        if self.lora is None and not self.model.train:
            raise UserError("model.train = []: nothing to train; add a [lora] table or name parts of the model")
        if self.lora is None and self.model.adapter:
            raise UserError(f"model.adapter = {show(self.model.adapter)}: needs a [lora] table")
        if not self.data.sources:
            raise UserError("data.sources = []: nothing to train on; name a file and its format")


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the TOML file at `path`, lay `overrides` (`section.key=value`) over it and check the whole.

    `strict_toml.load` says how overrides are written. Two examples: `data.video.fps= data.video.frames=8` replaces a
    rate by a count, and `lora= model.train=["language_model"]` an adapter by full fine-tuning.

    Raises UserError, one line: where it was written, the key, the value, what is allowed.
    """
    return strict_toml.load(Config, path, overrides)


def dump(config: Config) -> str:
    """The resolved configuration as TOML; `load` gives an equal object back. Settings that are none are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(a: Config, b: Config, ignore: Collection[str] = RESUME_MAY_CHANGE) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; None where one has no such key.

    `ignore` holds keys, or sections, that are left out. With its default the result is what makes `b` another
    configuration than the one that a run was started with, so that it can't be resumed.
    """
    flat_a, flat_b = _flatten(a.model_dump(mode="json")), _flatten(b.model_dump(mode="json"))
    found = []
    for key in dict.fromkeys([*flat_a, *flat_b]):
        if not covers(ignore, key) and flat_a.get(key) != flat_b.get(key):
            found.append((key, flat_a.get(key), flat_b.get(key)))
    return found


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; lists of tables by number, lists of plain values as one leaf."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = {str(i): item for i, item in enumerate(value)}.items()
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, item in items for key, leaf in _flatten(item, f"{prefix}{name}.").items()}
