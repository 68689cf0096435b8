"""The settings of a run: a TOML file with overrides from the command line, as frozen objects.

Every key is checked before anything is loaded. An unknown key, a wrong type, a value out of range, and two settings
that contradict each other raise a `UserError` of one line. The text below each field states its unit and range.

Folders are relative to the current directory, except `path` of a source, which is relative to `data.root`.
A leading `~` is the home folder.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import Field, model_validator

from vft.common.errors import UserError
from vft.config import toml as strict_toml
from vft.config.data import DataConfig, SourceConfig
from vft.config.toml import (
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
    covers,
    matching,
    show,
)

Component = Literal["language_model", "vision_encoder", "projector"]
TASKS = ("caption", "qa", "classify", "summarize", "story", "ground")

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
"""Keys and sections that may change when a run resumes: they affect neither the samples of a step nor what is trained.

`eval.split` decides what is trained on, so it must stay. `train.max_steps` and `train.epochs` may change to prolong a
run; a decaying schedule then decays to the new end.
"""


Target = Annotated[
    str,
    matching(
        rf"({'|'.join(get_args(Component))})(\.[A-Za-z0-9_*]+)+",
        "begin with a component (language_model, vision_encoder, projector) and name its linears after a dot: "
        '"language_model.q_proj", or "language_model.*" for all',
    ),
]
TaskName = Annotated[
    str,
    matching(rf"{'|'.join(TASKS)}|\w+(\.\w+)*:\w+", f"be {', '.join(TASKS)}, or module:Class for a task of your own"),
]
Init = Annotated[
    str,
    matching(
        r"kaiming|pissa|pissa_niter_\d+",
        'be "kaiming", "pissa" or "pissa_niter_N" with a whole number N, such as "pissa_niter_4"',
    ),
]


class ModelConfig(Section):
    """`[model]`: the model to start from."""

    path: Name
    """A folder, relative to the current directory, or a hub name such as `Qwen/Qwen2.5-VL-7B-Instruct`."""
    adapter: str = ""
    """LoRA adapter to start from: its folder in PEFT's format, or that of its run or a checkpoint. Empty: a new one."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: store the frozen linear layers and experts of the language model in 4 bits (QLoRA, Dettmers et al. 2023),
    9/16 of a byte for each weight. Embedding, head, norms, routers and vision encoder stay as they are. Needs a
    `[lora]` table."""
    train: Tuple[Component] = ()
    """Components that full fine-tuning trains. Only without a `[lora]` table."""
    rope_factor: Annotated[float, Field(ge=1)] | None = None
    """Linear scaling of positions, from 1: positions are divided by this, so the context is longer by this factor.
    LLaVA-NeXT-Video's own rule: (144 x frames + 1000) / 4096, rounded up. None: as in config.json."""


class LoraConfig(Section):
    """`[lora]`: low-rank adapters (Hu et al. 2021). Without this table the components in `model.train` are trained."""

    rank: Positive = 16
    """Columns of A and rows of B, from 1."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Below1 = 0.0
    """Fraction of the adapter's inputs that are set to zero in training, 0 <= dropout < 1."""
    targets: Annotated[Tuple[Target], Field(min_length=1)] = ("language_model.*",)
    """Linear layers that get an adapter: `COMPONENT.NAME`, or `COMPONENT.*` for all of a component. The component must
    be named because several components have layers of the same name, such as `q_proj`. The experts of a mixture are not
    among them; `language_model.experts.*` (or `.gate_up_proj`, `.down_proj`) gives each a pair A, B of its own."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023)."""
    ranks: dict[Target, Positive] = Field(default_factory=dict)
    """Other ranks for some targets, such as `{"language_model.q_proj" = 32}`. Patterns as in `targets`; the first one
    that matches counts."""
    alphas: dict[Target, PositiveFloat] = Field(default_factory=dict)
    """Other alphas for some targets, in the same way."""
    dora: bool = False
    """Also train the norm of each row of the weights (DoRA, Liu et al. 2024)."""
    init: Init = "kaiming"
    """Initial values of A and B. `kaiming`: B is zero. `pissa`: the principal components of the weight (Meng et al.
    2024) by an exact SVD. `pissa_niter_N`: by a randomised SVD with N power iterations, much faster (4 to 16 are
    usual)."""
    loraplus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of B (and of DoRA's norms) divided by that of A, from 1 (LoRA+, Hayou et al. 2024: 16)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.dora and self.init != "kaiming":
            raise contradiction("dora", "true", "init", show(self.init), "lora")
        experts = next((target for target in self.targets if "experts" in target), None)
        for name, plain in (("dropout", 0.0), ("dora", False), ("init", "kaiming")) if experts else ():
            if (value := getattr(self, name)) != plain:
                raise ValueError(f"{name} = {show(value)}: {show(experts)} in targets needs {show(plain)}, as in PEFT")
        return self


class TrainConfig(Section):
    """`[train]`: length, optimizer, schedule."""

    max_steps: Positive | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the data, instead of `max_steps`; 1 if neither is given."""
    packs_per_step: Positive = 16
    """Rows of an optimizer step, over all processes. The number of processes must divide it."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate, reached after the warm-up."""
    component_learning_rates: dict[Component, PositiveFloat] = Field(default_factory=dict)
    """Other peaks for some components, such as `{vision_encoder = 1e-5}`, with the same schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: decay to zero at the last step along half a cosine or a line, or no decay."""
    warmup_steps: Count = 0
    """Steps of linear warm-up to `learning_rate`."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of all steps, rounded up, instead of `warmup_steps`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW), multiplied by the learning rate at each step."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients with a larger 2-norm are scaled down to it; 0: never."""
    betas: Annotated[tuple[Below1, Below1], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of AdamW's two running means, each 0 <= beta < 1."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    routing_loss: bool | PositiveFloat | None = None
    """Weight of a loss by which the routers of a mixture of experts spread tokens evenly. `true`: config.json's
    `router_aux_loss_coef`. None: that if config.json has `output_router_logits` = true, which no release has; else no
    such loss."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of computation and of frozen weights. Trained weights are always stored in fp32."""

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
        if self.warmup_steps and self.warmup_ratio is not None:
            raise contradiction("warmup_steps", self.warmup_steps, "warmup_ratio", self.warmup_ratio, "train")
        if self.max_steps is not None:
            try:
                check_order("warmup_steps", self.warmup_steps, "max_steps", self.max_steps)
            except ValueError as error:
                raise ValueError(f"{error}; take fewer, such as train.warmup_steps={self.max_steps // 10}") from None
        return self

    def warmup(self, max_steps: int) -> int:
        """Steps of warm-up in a run of `max_steps`."""
        # 0.07 x 100 is 7.000000000000001 for a computer, and would be rounded up to 8.
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(round(self.warmup_ratio * max_steps, 6))


class ParallelConfig(Section):
    """`[parallel]`: how work is spread over processes, and how memory is traded for time. Results stay the same.

    On a GPU `auto` takes the fastest settings that fit its memory; on a CPU it shards over all processes, recomputes
    nothing and does not compile. `vft plan` says what it takes before any GPU is rented.
    """

    shard: Count | Literal["auto"] = "auto"
    """Number of processes over which the decoder's weights are sharded; 0: all, 1: none (plain data parallelism)."""
    activation_checkpointing: Literal["none", "mlp", "selective", "full", "auto"] = "auto"
    """What the backward pass recomputes instead of storing. `auto`: the least that fits in `memory_budget_gib`."""
    vision_checkpointing: Literal["same", "none", "mlp", "selective", "full"] = "same"
    """The same for a vision encoder that is trained. A frozen one stores nothing."""
    memory_budget_gib: PositiveFloat | None = None
    """GiB of one device that `activation_checkpointing = "auto"` may use. None: a GPU's free memory less a reserve."""
    compile: bool | Literal["auto"] = "auto"
    """Apply `torch.compile` to each layer of the decoder and block of the vision encoder: a slower start, faster steps.
    `auto`: on a GPU with a kernel for attention in packed rows."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass and gather them again for its backward pass. false: half
    the traffic, but every process holds the whole decoder between the two passes."""
    offload: Literal["none", "frozen"] = "none"
    """`frozen`: keep the frozen matrices of the decoder's layers in host memory while they are not used; each process
    copies its shard of a layer before it is gathered. Trained weights stay on the GPU."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that a process may take to join, or a pack of a step or a collective may take. Then the run ends and
    names the processes that are behind. Preparing data and writing checkpoints may take longer."""
    silence_s: PositiveFloat = 60.0
    """Seconds without a heartbeat after which a process or its host counts as lost, and the run ends. Also the limit of
    the first collective."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.activation_checkpointing != "auto" and self.memory_budget_gib is not None:
            raise ValueError(
                f"activation_checkpointing = {show(self.activation_checkpointing)} and memory_budget_gib = "
                f"{show(self.memory_budget_gib)}: only auto looks at a budget; keep one"
            )
        if self.offload == "frozen" and not self.reshard_after_forward:
            raise ValueError(
                'offload = "frozen" and reshard_after_forward = false contradict each other: the whole decoder would '
                "be on the GPU after all; keep one"
            )
        return self

    def shards(self, processes: int) -> int:
        """Over how many of `processes` the decoder's weights are sharded. `auto` must have been resolved."""
        assert self.shard != "auto", "`vft.preparation.memory.resolve` says what it stands for"
        return self.shard or processes


class ObjectiveConfig(Section):
    """`[objective]`: learn from pairs of a chosen and a rejected answer, or with `kto` from single ones that are
    desirable or not (`vft.training.preferences` has the formulas).
    Without this table: cross-entropy on the answers."""

    kind: Literal["dpo", "hinge", "ipo", "ipo_sum", "simpo", "orpo", "kto"]
    """The loss of a pair or an answer. `simpo` and `orpo` have no reference."""
    beta: PositiveFloat | None = None
    """How strongly it prefers, by the formula of its kind. None: 2.0 for `simpo`, else 0.1."""
    reference: Literal["start", "base"] | None = None
    """What the model is compared with: `start`, as it was when training began, or `base`, without any adapter. None:
    `start`, if its kind has a reference."""
    reference_passes: Literal["every_step", "once"] | None = None
    """When the reference computes: in `every_step`, by one more pass over each row, or `once` for all records, before
    the first step; its log-probabilities are kept below `data.cache_dir`. None: `every_step`, without a `[lora]` table
    `once`, because full fine-tuning changes what it is compared with."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """`dpo`: the fraction of pairs whose answers may be the wrong way round. None: 0."""
    gamma: NonNegativeFloat | None = None
    """`simpo`: the margin that the chosen answer is to have. None: 1.0."""
    desirable_weight: NonNegativeFloat | None = None
    """`kto`: what a desirable answer counts in the loss. None: 1.0. If one sort has many more answers, choose weights
    by which both sorts count about the same in all."""
    undesirable_weight: NonNegativeFloat | None = None
    """`kto`: what an undesirable answer counts in the loss. None: 1.0."""
    rpo_alpha: NonNegativeFloat = 0.0
    """Weight of the chosen answer's mean -log p, which is added to the loss."""

    @property
    def strength(self) -> float:
        """`beta`, or its default."""
        return self.beta or (2.0 if self.kind == "simpo" else 0.1)

    @property
    def weights(self) -> tuple[float, float]:
        """What a desirable and an undesirable answer count, or their defaults."""
        given = (self.desirable_weight, self.undesirable_weight)
        desirable, undesirable = (1.0 if weight is None else weight for weight in given)
        return desirable, undesirable

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.kind not in ("simpo", "orpo")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        owners = {"label_smoothing": "dpo", "gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
        for name, kind in owners.items():
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(
                    f"{name} = {show(getattr(self, name))} is of {kind}, not of kind = {show(self.kind)}: take it out"
                )
        if self.rpo_alpha and self.kind == "kto":
            raise ValueError(
                f"rpo_alpha = {self.rpo_alpha:g} is of pairs, and kto learns from single answers: take it out"
            )
        for name in ("reference", "reference_passes"):
            if getattr(self, name) is not None and not self.needs_reference:
                raise ValueError(f"{name} = {show(getattr(self, name))}: {self.kind} has no reference; take it out")
        return self


class CheckpointConfig(Section):
    """`[checkpoint]`: the state from which a run resumes."""

    every_steps: Count = 50
    """Optimizer steps between two checkpoints; 0: only one at the end."""
    keep_last: Count = 3
    """Number of the newest checkpoints that are not deleted; 0: all."""
    asynchronous: bool = True
    """Write while training continues, from a copy in host memory: 12 bytes for each trained parameter, over all
    processes that write. A save waits until the one before it is done."""


class EvalConfig(Section):
    """`[eval]`: answers and loss on held-out records during training."""

    every_steps: Count = 0
    """Optimizer steps between two evaluations; there is also one after the last step. 0: never."""
    sources: Tuple[SourceConfig] = ()
    """Held-out records. Empty: those of `data.sources`, which shows what was memorised, not what generalises."""
    split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead hold out this fraction of the media of `data.sources`, with all their records, by a hash of `seed` and
    file name, so that added records move no other one. Training never uses them, whatever `every_steps` is."""
    max_new_tokens: Positive = 128
    """Most tokens of an answer."""
    batch_size: Positive = 8
    """Answers that each process generates at a time."""
    max_samples: Count = 0
    """Most questions that are asked, and most documents whose loss is computed; always the same ones. 0: all."""
    at_start: bool = True
    """Also evaluate before the first step: the answers of the base model."""
    japanese: Literal["char", "ja-mecab"] = "char"
    """How BLEU, CIDEr-D and token F1 split Japanese: `char` into characters, `ja-mecab` into words by sacrebleu's
    tokenizer (extra `ja`). With `ja-mecab` texts of Han characters alone count as Japanese, not as Chinese."""
    coco: bool = False
    """Also score captions and summaries by pycocoevalcap, as papers do (extra `papers`, and Java): `cider_coco`,
    `bleu4_coco`, `rouge_l_coco`, `meteor`. Takes 5 to 20 seconds an evaluation."""
    best_metric: str = ""
    """Export to `best/` whenever this metric, such as `cider_d` or `loss`, is better than ever before. Empty: never."""
    patience: Count = 0
    """Stop training after so many evaluations in a row without a better `best_metric`; `best/` then holds the best. 0:
    never."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.patience and not self.best_metric:
            raise ValueError(f"patience = {self.patience} needs best_metric: name the score that is to get better")
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
    """`[log]`: what is shown and recorded."""

    every_steps: Positive = 1
    """Optimizer steps between two lines of the log."""
    tensorboard: bool = False
    """Also write TensorBoard event files (extra `tensorboard`)."""
    wandb: bool = False
    """Also log to Weights & Biases (extra `wandb`). Its environment variables apply, such as WANDB_MODE=offline."""
    wandb_project: Name = "vft"
    """Project of the runs there."""
    wandb_run: Name | None = None
    """Name of the run in Weights & Biases. None: the last part of `output_dir`."""
    profile_steps: Annotated[tuple[Positive, Positive] | None, Field(strict=False)] = None
    """First and last step that torch.profiler records into `profile/` of the run's folder. None: no trace."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.profile_steps is not None:
            check_order("profile_steps[0]", self.profile_steps[0], "profile_steps[1]", self.profile_steps[1])
        return self


class Config(Section):
    """All settings of a run."""

    task: TaskName | None = None
    """What is learnt: a task of `vft.recipes`, or `module:Class` for one outside the package. Without it a recipe's
    command trains its own task, and tools that read the file alone take captioning."""
    output_dir: Folder
    """Folder of everything that the run writes, relative to the current directory. The same command again resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the order of samples, of dropout and of new adapters."""
    model: ModelConfig
    lora: LoraConfig | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    objective: ObjectiveConfig | None = None
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
        if self.lora is None and self.objective is not None and self.objective.reference_passes == "every_step":
            raise ValueError(
                'objective.reference_passes = "every_step" needs a [lora] table: full fine-tuning changes the weights '
                "of the reference; take it out"
            )
        if streamed and self.objective is not None and self.objective.kind == "kto":
            raise ValueError(
                f"objective.kind = 'kto' needs answers of other records, and {show(streamed[0].path)} is read as a "
                "stream; set stream = false"
            )
        if self.reference_once and streamed:
            raise ValueError(
                f'objective.reference_passes = "once": {show(streamed[0].path)} has stream = true, so that its records '
                'are not known before training; take that out, or have a [lora] table and "every_step"'
            )
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

    @property
    def answers(self) -> int:
        """How many answers to a prompt are learnt from together."""
        return 1 if self.objective is None else 2

    @property
    def reference_once(self) -> bool:
        """Whether the objective's reference computes before training, and not in every step."""
        given = self.objective
        return bool(given and given.needs_reference and (self.lora is None or given.reference_passes == "once"))

    @property
    def rewards_held_out(self) -> bool:
        """Whether held-out pairs get rewards: if a reference is there as long as training goes on."""
        return self.objective is not None and self.objective.needs_reference and self.lora is not None

    def require_training(self) -> None:
        """Check what training needs, unlike prediction and evaluation.

        Raises UserError if nothing would be trained, or no data is named.
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

    Raises UserError with one line: file or command line, key, value, and what is allowed.
    """
    return strict_toml.load(Config, source, overrides)


def dump(config: Config) -> str:
    """The resolved configuration as TOML. `load` returns an equal object. Settings that are None are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(a: Config, b: Config, ignore: Collection[str] = RESUME_MAY_CHANGE) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; None if a configuration has no such key.

    Keys and sections in `ignore` are left out. With the default, any difference means that a run which was started with
    `a` cannot resume with `b`.
    """
    flat_a, flat_b = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    found = []
    for key in dict.fromkeys([*flat_a, *flat_b]):
        if (key == "eval.split" or not covers(ignore, key)) and flat_a.get(key) != flat_b.get(key):
            found.append((key, flat_a.get(key), flat_b.get(key)))
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """All values by dotted key. Entries of a list of tables have their index as key; other lists are one value."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = {str(i): item for i, item in enumerate(value)}.items()
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, item in items for key, leaf in flatten(item, f"{prefix}{name}.").items()}


def named(name: str) -> tuple[str, str]:
    """The setting that has this name, here or in another trainer; "" if there is none, and why, if that is known."""
    found = [key for key in strict_toml.keys(Config) if key.rpartition(".")[2] == name and ".0." not in key]
    why = (strict_toml.REASONS_ELSEWHERE | strict_toml.MORE_REASONS).get(name, "")
    return next(iter(found), strict_toml.COUNTERPARTS.get(name, "").partition(",")[0]), why
