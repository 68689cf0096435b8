"""Settings of a run: a strict TOML file, overridden from the command line, as frozen objects.

Every key is checked before anything is loaded: an unknown key, a value of the wrong type or out of range, and two
settings that contradict each other are a `UserError` of one line. Each field states its unit or range below it.

Folders are relative to the current directory, except `path` of a source, which is relative to `data.root`.
A leading `~` is the home folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from vft.common.errors import UserError
from vft.config import toml as strict_toml
from vft.config.data import DataConfig, SourceConfig
from vft.config.fields import (
    Below1,
    Count,
    Folder,
    Name,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Tuple,
    check_order,
    contradiction,
)
from vft.config.toml import covers, show

Component = Literal["language_model", "vision_encoder", "projector"]
TASKS = ("caption", "qa", "classify", "summarize", "story")

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
        "data.decode_timeout_s",
        "data.cache_dir",
        "data.cache",
        "data.cache_gib",
        "data.prefetch_packs",
    }
)
"""Keys, or sections, that a resumed run may change: they move neither the samples of a step nor what is trained.

Of `eval`, `split` says what is trained on, and stays. `train.max_steps` and `train.epochs` are here so that a run can
be prolonged; a decaying schedule then decays to the new end.
"""


def _check_target(text: str) -> str:
    if not re.fullmatch(rf"({'|'.join(get_args(Component))})(\.[A-Za-z0-9_*]+)+", text):
        raise ValueError(
            "must begin with a component (language_model, vision_encoder, projector) and name its linears after a dot: "
            '"language_model.q_proj", or "language_model.*" for all'
        )
    return text


def _check_task(name: str) -> str:
    if name not in TASKS and not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(f"must be {', '.join(TASKS)}, or module:Class for a task of your own")
    return name


def _check_init(text: str) -> str:
    if not re.fullmatch(r"kaiming|pissa|pissa_niter_\d+", text):
        raise ValueError('must be "kaiming", "pissa" or "pissa_niter_N" with a whole number N, such as "pissa_niter_4"')
    return text


Target = Annotated[str, AfterValidator(_check_target)]
TaskName = Annotated[str, AfterValidator(_check_task)]


class ModelConfig(Section):
    """`[model]`: the weights to start from."""

    path: Name
    """A folder, relative to the current directory, or a hub name such as `Qwen/Qwen2.5-VL-7B-Instruct`."""
    adapter: str = ""
    """Folder of a LoRA adapter in PEFT's format to go on from; empty: fresh matrices."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: hold the linears of the language model's layers, frozen under adapters, in 4 bits (QLoRA, Dettmers et al.
    2023), 9/16 of a byte a weight; embedding, head, norms and vision encoder stay as is. Needs a `[lora]` table."""
    train: Tuple[Component] = ()
    """Parts that full fine-tuning trains. Only without a `[lora]` table."""
    rope_factor: Annotated[float, Field(ge=1)] | None = None
    """Linear scaling of positions: the language model sees them divided by this, and as many more fit its context.
    LLaVA-NeXT-Video's own rule: (144 x frames + 1000) / 4096, rounded up. None: as config.json has it."""


class LoraConfig(Section):
    """`[lora]`: low-rank adapters (Hu et al. 2021). Without this table, `model.train` is fine-tuned in full."""

    rank: Positive = 16
    """Columns of A and rows of B, from 1."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Below1 = 0.0
    """Share of the adapter's inputs that are zeroed in training, 0 <= dropout < 1."""
    targets: Annotated[Tuple[Target], Field(min_length=1)] = ("language_model.*",)
    """Linears that get an adapter: `COMPONENT.NAME`, or `COMPONENT.*` for all its linears. Anchored to a component,
    because the components share names: a bare `q_proj` would match in several."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    ranks: dict[Target, Positive] = Field(default_factory=dict)
    """Another rank for some of the targets, such as `{"language_model.q_proj" = 32}`: patterns as in `targets`, of
    which the first that fits counts."""
    alphas: dict[Target, PositiveFloat] = Field(default_factory=dict)
    """Another alpha, in the same way."""
    dora: bool = False
    """Train the length of each row of a weight beside the low-rank change (DoRA, Liu et al. 2024)."""
    init: Annotated[str, AfterValidator(_check_init)] = "kaiming"
    """How A and B begin: `kaiming` (B zero); `pissa`, the principal part of the weight (Meng et al. 2024), by an exact
    decomposition; `pissa_niter_N`, by a randomised one of N power iterations, quicker by far (4 to 16 are usual)."""
    loraplus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of B (and of DoRA's lengths) over that of A, from 1 (LoRA+, Hayou et al. 2024: 16)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.dora and self.init != "kaiming":
            raise contradiction("dora", "true", "init", show(self.init), "lora")
        return self


class TrainConfig(Section):
    """`[train]`: length, optimizer, schedule."""

    max_steps: Positive | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the data instead; 1 where neither is given."""
    packs_per_step: Positive = 16
    """Rows that one optimizer step consumes, over all processes; their number must divide it."""
    learning_rate: PositiveFloat = 1e-4
    """Peak, reached after the warm-up."""
    component_learning_rates: dict[Component, PositiveFloat] = Field(default_factory=dict)
    """Another peak for some of what is trained, such as `{vision_encoder = 1e-5}`; the schedule is the same."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: decay to zero at the last step along a half cosine or a line, or no decay."""
    warmup_steps: Count = 0
    """Steps of linear growth up to `learning_rate`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW), per step times the learning rate."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients of a larger 2-norm are scaled down to it; 0: never."""
    betas: Annotated[tuple[Below1, Below1], Field(strict=False)] = (0.9, 0.999)
    """Decay of AdamW's two running means, each 0 <= beta < 1."""
    eps: PositiveFloat = 1e-8
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
            raise contradiction("max_steps", self.max_steps, "epochs", self.epochs, "train")
        if self.max_steps is not None:
            check_order("warmup_steps", self.warmup_steps, "max_steps", self.max_steps)
        return self


class ParallelConfig(Section):
    """`[parallel]`: how the work is spread and how memory is traded for time. Results stay the same."""

    shard: Count = 0
    """Processes over which the decoder's weights are sharded; 0: all, 1: plain data parallel."""
    activation_checkpointing: Literal["none", "mlp", "selective", "full", "auto"] = "none"
    """What the backward pass computes again instead of keeping; `auto`: the least that fits `memory_budget_gib`."""
    vision_checkpointing: Literal["same", "none", "mlp", "selective", "full"] = "same"
    """The same for a vision encoder that is trained; one that is frozen keeps nothing."""
    memory_budget_gib: PositiveFloat | None = None
    """GiB of one device's memory that `activation_checkpointing = "auto"` may plan with."""
    compile: bool = False
    """`torch.compile` each decoder layer: slower to start, faster steps."""
    reshard_after_forward: bool = True
    """Give up a layer's gathered weights after its forward pass and gather them again for its backward pass; false:
    half the traffic, while every process holds the whole decoder from one pass to the other."""
    offload: Literal["none", "frozen"] = "none"
    """Where the frozen matrices of the decoder's layers lie while they are not at work: on the GPU, or in the host's
    memory, from which each process copies its share of a layer before it is gathered. What is trained stays."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that a process may take to come, a pack of a step, or a collective; then the run ends and names who is
    behind. Preparing data and writing checkpoints may take longer."""
    silence_s: PositiveFloat = 60.0
    """Seconds without a sign of life after which a process, or its host, counts as lost and the run ends; also what the
    first collective may take."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.activation_checkpointing == "auto") != (self.memory_budget_gib is not None):
            raise ValueError(
                f"activation_checkpointing = {show(self.activation_checkpointing)} and memory_budget_gib = "
                f"{show(self.memory_budget_gib)}: auto needs a budget, and a budget needs auto"
            )
        if self.offload == "frozen" and not self.reshard_after_forward:
            raise ValueError(
                'offload = "frozen" and reshard_after_forward = false contradict each other: the whole decoder would '
                "be on the GPU after all; keep one"
            )
        return self


class CheckpointConfig(Section):
    """`[checkpoint]`: the state to resume from."""

    every_steps: Count = 50
    """Optimizer steps between two; 0: at the end only."""
    keep_last: Count = 3
    """Newest that are kept; 0: all."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes a trained parameter, over all processes that
    write. A save waits for the one before."""


class EvalConfig(Section):
    """`[eval]`: answers and loss on held-out records while training."""

    every_steps: Count = 0
    """Optimizer steps between two, and one after the last step; 0: never."""
    sources: Tuple[SourceConfig] = ()
    """Held-out records; empty: those of `data.sources`, which shows what was memorised, not what carries over."""
    split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the media of `data.sources` instead, with all their records: by a hash of `seed` and the
    medium, so that new records move no old one. Training leaves them out, with or without `every_steps`."""
    max_new_tokens: Positive = 128
    """Tokens of an answer, at most."""
    batch_size: Positive = 8
    """Answers generated at a time, for each process."""
    max_samples: Count = 0
    """Questions asked, and documents whose loss is taken, at most; always the same ones. 0: all."""
    at_start: bool = True
    """Also evaluate before the first step: what the base says."""
    japanese: Literal["char", "ja-mecab"] = "char"
    """How BLEU, CIDEr-D and token F1 cut Japanese: `char`, by characters, or `ja-mecab`, into words as sacrebleu's
    tokenizer of that name does (extra `ja`); then Han characters alone are Japanese too, not Chinese."""
    best_metric: str = ""
    """Keep what the run exports in `best/` whenever this metric is better than before, such as `cider_d` or `loss`;
    empty: never."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.best_metric and not self.every_steps:
            raise ValueError(f"best_metric = {show(self.best_metric)} needs every_steps above 0")
        if self.split is not None and self.sources:
            paths = show([source.path for source in self.sources])
            raise ValueError(f"split = {self.split:g} and sources = {paths} contradict each other; keep one")
        if any(source.repeats is not None or source.share is not None for source in self.sources):
            raise ValueError("sources: repeats and share are for training; each question is asked once: take them out")
        if any(source.stream for source in self.sources):
            raise ValueError('sources: stream = true is for training; use take = "first:N", which unpacks N clips')
        return self


class LogConfig(Section):
    """`[log]`: what is shown and written."""

    every_steps: Positive = 1
    """Optimizer steps between two lines on the screen."""
    tensorboard: bool = False
    """Also write TensorBoard's event files (extra `tensorboard`)."""
    wandb: bool = False
    """Also send to Weights & Biases (extra `wandb`); its environment variables hold, WANDB_MODE=offline among them."""
    wandb_project: Name = "vft"
    wandb_run: Name | None = None
    """Name of the run there; without it the last part of `output_dir`."""
    profile_steps: Annotated[tuple[Positive, Positive] | None, Field(strict=False)] = None
    """First and last step that torch.profiler records, into `profile/` of the run's folder; none: no trace."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.profile_steps is not None:
            check_order("profile_steps[0]", self.profile_steps[0], "profile_steps[1]", self.profile_steps[1])
        return self


class Config(Section):
    """A whole run."""

    task: TaskName | None = None
    """What is learnt: a task of `vft.recipes`, or `module:Class` for one outside the package. Without it a recipe's
    command trains its own task, and tools that read the file alone take captioning."""
    output_dir: Folder
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
        if self.lora is not None and self.lora.init != "kaiming" and self.model.adapter:
            raise ValueError(
                f"model.adapter = {show(self.model.adapter)} and lora.init = {show(self.lora.init)} contradict each "
                'other: one adapter is gone on from, or a new one begun; for the former lora.init = "kaiming", with '
                "the rank in its adapter_config.json"
            )
        trained = [target.partition(".")[0] for target in self.lora.targets] if self.lora else self.model.train
        for component, rate in self.train.component_learning_rates.items():
            if component not in trained:
                where = "lora.targets" if self.lora else "model.train"
                raise ValueError(
                    f"train.component_learning_rates.{component} = {rate}: nothing of it is trained by {where} = "
                    f"{show(list(self.lora.targets if self.lora else trained))}; add it there, or take the rate out"
                )
        if self.lora is None and self.model.quantize != "none":
            raise ValueError(
                f"model.quantize = {show(self.model.quantize)} needs a [lora] table: weights of 4 bits can't be trained"
            )
        streamed = self.data.streamed
        if streamed and self.train.max_steps is None:
            raise ValueError("train.max_steps is needed: a source with stream = true has no length to count epochs by")
        if self.train.max_steps is None and any(source.share is not None for source in self.data.sources):
            raise ValueError("train.max_steps is needed: sources with a share are drawn from without end")
        if self.eval.split is not None and streamed:
            raise ValueError(
                f"eval.split = {self.eval.split:g} is of records known before training, and {show(streamed[0].path)} "
                'is read as a stream; name held-out records in eval.sources instead, such as take = "first:500" of them'
            )
        read = (*self.data.sources, *self.eval.sources)
        if self.data.cache == "frames" and read and all(source.stream for source in read):
            raise ValueError('data.cache = "frames" keeps nothing of sources with stream = true; take it out')
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


def load(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read the TOML file `source`, or take its tables, lay `overrides` (`section.key=value`) over it and check all.

    `strict_toml.load` says how overrides are written. Two examples: `data.video.fps= data.video.frames=8` replaces a
    rate by a count, and `lora= model.train=["language_model"]` an adapter by full fine-tuning.

    Raises UserError, one line: where it was written, the key, the value, what is allowed.
    """
    return strict_toml.load(Config, source, overrides)


def dump(config: Config) -> str:
    """The resolved configuration as TOML; `load` gives an equal object back. Settings that are none are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(a: Config, b: Config, ignore: Collection[str] = RESUME_MAY_CHANGE) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; None where one has no such key.

    `ignore` holds keys, or sections, that are left out. With its default the result is what makes `b` another
    configuration than the one that a run was started with, so that it can't be resumed.
    """
    flat_a, flat_b = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    found = []
    for key in dict.fromkeys([*flat_a, *flat_b]):
        if (key == "eval.split" or not covers(ignore, key)) and flat_a.get(key) != flat_b.get(key):
            found.append((key, flat_a.get(key), flat_b.get(key)))
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; lists of tables by number, lists of plain values as one leaf."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = {str(i): item for i, item in enumerate(value)}.items()
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, item in items for key, leaf in flatten(item, f"{prefix}{name}.").items()}
