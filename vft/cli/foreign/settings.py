"""The settings of LLaMA-Factory and ms-swift as ours. Their defaults, where they differ from ours, are written out.

`vft/config/other_trainers.toml` has their names, and what they are taken from.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from vft.cli.foreign.data import convert_data
from vft.cli.foreign.draft import Draft, as_list, is_open, plain, reason_of, shown
from vft.cli.foreign.files import LLAMA_FACTORY, MS_SWIFT, Foreign, near, read_table
from vft.common.errors import UserError
from vft.config.toml import OTHER_TRAINERS as TABLES
from vft.config.toml import show

FAMILIES = r"qwen2[._]5-?vl|qwen3-?vl|qwen3[._]5|llava-next-video"
FAMILIES_TEXT = "Qwen2.5-VL, Qwen3-VL, Qwen3.5 and LLaVA-NeXT-Video"

OFFLOADS = (
    r'"offload_param": \{[^}]*"(cpu|nvme)"|z(ero)?3_offload|"(fsdp_offload_params|cpu_offload)": true|'
    r'"offload_param_device": "(cpu|nvme)"|[" ]offload[" ]'
)
"""Frozen weights in host memory, in configurations of DeepSpeed, FSDP and Accelerate."""
LANGUAGE_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Linear layers that the language model of each family has."""
UNLIMITED = "a sample may be as long as the model can take, there; here a row has at most data.pack_tokens"
SAME = (("checkpoint.keep_last", -1, 0), ("train.routing_loss", 0, False))
"""Values that are written in another way here: our setting, the value there, and here."""
COMPONENT_RATES = {"vit_lr": "vision_encoder", "aligner_lr": "projector"}
TEXTS = ("model.path", "model.adapter", "output_dir", "log.wandb_run", "log.wandb_project")


def convert(foreign: Foreign, file: Path, processes: int | None = None) -> Draft:
    """Our settings for those of `file`, for a run on so many GPUs; None: as many as it names.

    Raises UserError for what is not to be done here: another way of training, another family of models.
    """
    draft = Draft(foreign, file)
    for name in ("output_dir", "run_name"):
        if is_open(value := draft.rest.get(name)):
            draft.rest.pop(name)
            draft.lose(f"{name}: {shown(name, value)}", "is another one in each run; with the same one a run resumes")
    for name in draft.rest:
        if not name.isupper():  # of the environment only some are taken
            draft.check(name)
    for name, command in TABLES["other_commands"].items():
        if name in draft.rest:
            raise UserError(f"{file}: {name} is of {command}; only configurations of training are read")
    for name, allowed in TABLES["allowed"].items():
        for value in as_list(draft.rest.get(name)):
            if value not in allowed.split():
                counterparts = f"has no counterpart here; of its values {', '.join(allowed.split())} would have one"
                raise UserError(f"{file}: {name} = {show(value)} {counterparts}")
    draft.rest |= {str(name).upper(): plain(value) for name, value in draft.table("model_kwargs")[0].items()}
    for step in (_model, _method, _length, convert_data, _evaluation, _plain):
        step(draft)
    _batch(draft, processes)
    for name, value in draft.rest.items():
        draft.lose(f"{name}: {shown(name, value)}", reason_of(name))
    return draft


# ------------------------------------------------------------------------------------------------- model and method


def _model(draft: Draft) -> None:
    """`model.path`: UserError if it is none of a family that vft trains, as far as its name tells."""
    given, origin = draft.take("model_name_or_path", "model")
    name = str(given or "")
    if not name:
        raise UserError(f"{draft.file}: names no model")
    draft.put("model.path", name, origin)
    is_hub_name = re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", name) and not os.path.isdir(name)
    if is_hub_name and not re.search(FAMILIES, name, re.I):
        fix = f"vft trains {FAMILIES_TEXT}; write ./{name} if it is a folder with one of them"
        raise UserError(f"{draft.file}: the model {name} is of another family: {fix}")
    if re.search(r"(gptq|awq|aqlm|fp8|bnb)\b", name, re.I):
        fix = 'name the released one, with model.quantize = "nf4" for 4 bits'
        raise UserError(f"{draft.file}: the model {name} by its name holds weights of fewer bits: {fix}")
    thinks = re.search(r"qwen3[._]5|thinking", name, re.I) and draft.rest.get("enable_thinking") is not False
    if draft.tool == LLAMA_FACTORY and thinks and not str(draft.rest.get("template")).endswith("_nothink"):
        draft.put("data.learn_thought_tags", True, "a thought before an answer is learnt, also an empty one")
    dtype, origin = draft.take("torch_dtype")
    if draft.rest.get("bf16") or dtype == "bfloat16":
        draft.rest.pop("bf16", None)
        draft.put("train.precision", "bf16", origin if dtype else "bf16: true")
    elif dtype == "float32":
        draft.put("train.precision", "fp32", origin)
    elif dtype:
        draft.lose(origin, "computed in bf16")


def _method(draft: Draft) -> None:
    """What is trained: `[lora]` or `model.train`, and `[objective]`."""
    kind, origin = draft.take("finetuning_type", "tuner_type", "train_type")
    frozen = {
        "language_model": draft.take("freeze_language_model", "freeze_llm"),
        "vision_encoder": draft.take("freeze_vision_tower", "freeze_vit"),
        "projector": draft.take("freeze_multi_modal_projector", "freeze_aligner"),
    }
    trained = [component for component, (is_frozen, _) in frozen.items() if not is_frozen]
    if not trained:
        raise UserError(f"{draft.file}: everything is frozen; leave something to train")
    names, from_names = draft.take("lora_target", "target_modules")
    stage, of_stage = draft.take("stage", "rlhf_type")
    origins = [*([of_stage] if stage else []), origin, *(text for _, text in frozen.values())]
    if kind == "full":
        draft.defaults |= {"learning_rate": 1e-5} if draft.tool == MS_SWIFT else {}
        draft.put("model.train", trained, "; ".join(origins))
    else:
        experts, from_experts = draft.take("target_parameters")
        targets = _targets(draft, list(map(str, as_list(names))), from_names, trained)
        targets += [f"language_model.experts.{str(name).rpartition('.')[2]}" for name in as_list(experts)]
        origins += [from_names] * bool(names) + [from_experts] * bool(experts)
        draft.put("lora.targets", targets, "; ".join(origins))
        trained = [component for component in trained if any(one.startswith(component) for one in targets)]
        _adapter(draft, bool(experts))
    rates = [(name, component) for name, component in COMPONENT_RATES.items() if component in trained]
    if given := {component: rate for name, component in rates if (rate := draft.take(name)[0]) is not None}:
        draft.put("train.component_learning_rates", given, "vit_lr, aligner_lr")
    _objective(draft, stage, of_stage)


def _targets(draft: Draft, names: list[str], origin: str, trained: list[str]) -> list[str]:
    """`lora.targets` for names of layers, of which any component may have some. ms-swift freezes nothing of these."""
    family = str(draft.lines["model.path"][0])
    if not names or {"all", "all-linear"} & set(names):
        if len(names) > 1:
            draft.lose(origin, "all linear layers are adapted, no embedding, router or head")
        # LLaMA-Factory's `all` are names of layers outside the projector, which Qwen3-VL's shares with its encoder
        if draft.tool == LLAMA_FACTORY and not ("vision_encoder" in trained and re.search("qwen3", family, re.I)):
            trained = [component for component in trained if component != "projector"]
        return [f"{component}.*" for component in trained]
    known: dict[str, str] = next(
        (table for pattern, table in TABLES["layers"].items() if re.search(pattern, family, re.I)), {}
    )
    layers = {component: text.split() for component, text in known.items()}
    others = {*" ".join(known.values()).split()} - LANGUAGE_LAYERS
    layers = {"language_model": [name for name in names if name not in others]} | layers
    allowed = trained if draft.tool == LLAMA_FACTORY else layers
    return [f"{one}.{name}" for one in layers if one in allowed for name in names if name in layers[one]]


def _adapter(draft: Draft, experts: bool) -> None:
    """The rest of `[lora]`, and 4 bits."""
    if experts:
        draft.rest["lora_dropout"] = 0  # as PEFT needs it
    init, origin = draft.take("init_weights")
    if draft.rest.get("pissa_init"):
        (_, origin), (iterations, of_iterations) = draft.take("pissa_init"), draft.take("pissa_iter")
        origin += f"; {of_iterations}" if iterations else ""
        init = "pissa" if iterations == -1 else f"pissa_niter_{iterations or 16}"
    if isinstance(init, str) and init.startswith("pissa"):
        draft.put("lora.init", init, origin)
    elif init not in (None, True):
        draft.lose(origin, "B begins at zero")
    bits, origin = draft.take("quantization_bit", "quant_bits")
    method, of_method = draft.take("quantization_method", "quant_method")
    if bits and not method and draft.tool == MS_SWIFT:
        draft.lose(origin, "nothing is quantized there without quant_method")
    elif bits == 4 and method in (None, "bnb", "bitsandbytes"):
        draft.put("model.quantize", "nf4", f"{origin}; {of_method}" if method else origin)
    elif bits:
        draft.lose(f"{origin}, {of_method}", "model.quantize has nf4, with 4 bits")
    elif method:
        draft.lose(of_method, "a base with such weights is not read")
    rank, origin = draft.number("lora_rank")
    draft.put("lora.rank", rank, origin)
    if draft.tool == LLAMA_FACTORY:
        draft.defaults["lora_alpha"] = 2 * rank


def _objective(draft: Draft, stage: Any, origin: str) -> None:
    losses, of_loss = draft.take("pref_loss", "loss_type")
    loss = next(iter(as_list(losses)), None)
    if len(as_list(losses)) > 1:
        draft.lose(of_loss, "a run has one loss; the first is taken")
    if stage in (None, "sft"):
        return
    kind = stage if stage != "dpo" or loss in (None, "sigmoid") else loss
    draft.put("objective.kind", kind, f"{origin}; {of_loss}" if loss else origin)
    adapters, references = (
        as_list(draft.rest.get(factory) or draft.rest.get(swift))
        for factory, swift in (("adapter_name_or_path", "adapters"), ("ref_model_adapters", "ref_adapters"))
    )
    if adapters and "lora.targets" in draft.lines and kind not in ("simpo", "orpo"):
        if references == adapters:
            draft.put("objective.reference", "start", draft.take("ref_model_adapters", "ref_adapters")[1])
        else:
            draft.put("objective.reference", "base", "the model without its adapter, as there")
    if kind == "simpo" and draft.tool == MS_SWIFT:
        alpha, origin = draft.take("cpo_alpha")
        draft.rest["rpo_alpha"] = 1 if alpha is None else alpha  # its SimPO has the chosen answer's loss, too


# ------------------------------------------------------------------------------------------------- batch and length


def _batch(draft: Draft, processes: int | None) -> None:
    """`train.packs_per_step`: the same samples a step as there."""
    given, _ = draft.number("NPROC_PER_NODE")
    hosts, _ = draft.number("NNODES")
    started = "NPROC_PER_NODE x NNODES"
    if not given and draft.tool == LLAMA_FACTORY and "CUDA_VISIBLE_DEVICES" in draft.rest:
        draft.check("CUDA_VISIBLE_DEVICES")
        given = len(as_list(draft.rest["CUDA_VISIBLE_DEVICES"]))
        started = "a process for each of CUDA_VISIBLE_DEVICES"
    count = processes or max(1, int(given or 1) * int(hosts or 1))
    parts, origin = draft.number("sequence_parallel_size")
    if parts and parts > 1:
        draft.lose(origin, "a row is on one GPU; train.packs_per_step counts the samples")
        count = max(1, count // int(parts))
    size, _ = draft.number("per_device_train_batch_size")
    steps, _ = draft.number("gradient_accumulation_steps")
    steps = math.ceil(16 / max(1, size) / count) if steps is None else steps
    known = "--gpus" if processes else started if given or hosts else "not named there: see --gpus"
    origin = f"per_device_train_batch_size {size} x gradient_accumulation_steps {steps} x {count} GPUs ({known})"
    draft.put("train.packs_per_step", size * steps * count, origin)
    if not (draft.rest.get("packing") or draft.rest.get("neat_packing")):
        note = "a row is one sample, as there; 0 fills rows: faster, and fewer packs_per_step hold as many samples"
        draft.put("data.max_samples_per_pack", 1, note)


def _length(draft: Draft) -> None:
    """Steps or epochs, the schedule, the optimizer, saving."""
    steps, from_steps = draft.number("max_steps")
    epochs, from_epochs = draft.number("max_epochs", "num_train_epochs")
    if steps and steps > 0:
        draft.put("train.max_steps", steps, from_steps)
        if not from_epochs.startswith(draft.tool):
            draft.lose(from_epochs, "max_steps is the length")
    else:
        rounded = "" if isinstance(epochs, int) else ", rounded up"
        draft.put("train.epochs", math.ceil(epochs), from_epochs + rounded)
    schedule, origin = draft.take("lr_scheduler_type")
    if (ours := str(schedule).removesuffix("_with_warmup")) in ("cosine", "linear", "constant"):
        draft.put("train.schedule", ours, origin)
    else:
        draft.lose(origin, "train.schedule has cosine, linear and constant; cosine is taken")
    warmup, origin = draft.number("warmup_steps")
    if not warmup or warmup < 1:  # transformers 5 takes a fraction there
        ratio, origin = (warmup, origin) if warmup else draft.number("warmup_ratio")
        warmup = math.ceil(ratio * steps) if ratio and steps and steps > 0 else None
        if ratio and warmup is None:
            draft.put("train.warmup_ratio", ratio, origin)
    if schedule == "constant" and (warmup or "train.warmup_ratio" in draft.lines):
        draft.lose(origin, "constant has no warm-up there")
        draft.lines.pop("train.warmup_ratio", None)
    elif warmup:
        draft.put("train.warmup_steps", warmup, origin)
    betas = [draft.number("adam_beta1"), draft.number("adam_beta2")]
    if origins := [origin for beta, origin in betas if beta is not None]:
        draft.put("train.betas", [betas[0][0] or 0.9, betas[1][0] or 0.999], "; ".join(origins))
    optimizer, origin = draft.take("optim", "optimizer")
    if optimizer:
        draft.lose(origin, "AdamW is the optimizer, always")
    strategy, of_strategy = draft.take("save_strategy")
    every, origin = draft.take("save_steps")
    if strategy == "no":
        draft.put("checkpoint.every_steps", 0, of_strategy)
    elif strategy in (None, "steps") and isinstance(every, int):
        draft.put("checkpoint.every_steps", every, f"{of_strategy}; {origin}" if strategy else origin)
    else:
        draft.lose(of_strategy if strategy else origin, "checkpoints are saved every checkpoint.every_steps")
    for name in ("tensorboard", "wandb"):
        if name in as_list(draft.rest.get("report_to")):
            draft.put(f"log.{name}", True, f"report_to: {name}")
    loggers, origin = draft.take("report_to")
    if set(map(str, as_list(loggers))) - {"tensorboard", "wandb"}:
        draft.lose(origin, "log.tensorboard and log.wandb are there")
    for name in ("deepspeed", "fsdp", "fsdp_config", "config_file"):
        _sharding(draft, *draft.take(name))


def _sharding(draft: Draft, name: Any, origin: str) -> None:
    """A configuration of DeepSpeed, FSDP or Accelerate."""
    if not name:
        return
    path = near(draft.file, name) if isinstance(name, str) else None
    text = json.dumps(read_table(path) if path else name, default=str)
    if re.search(OFFLOADS, text) and "lora.targets" in draft.lines:
        draft.put("parallel.offload", "frozen", origin)
    draft.lose(origin, "shards and copies are chosen by parallel.shard, trained weights stay on the GPU")


def _evaluation(draft: Draft) -> None:
    """`eval.split` and `eval.every_steps`."""
    size, origin = draft.number("val_size", "split_dataset_ratio")
    strategy, of_strategy = draft.take("eval_strategy", "evaluation_strategy")
    has_sources = "eval.sources.0.path" in draft.lines
    is_unused = has_sources or (strategy == "no" and draft.tool == MS_SWIFT)
    is_held_out = has_sources or bool(size and size < 1 and not is_unused)
    if size and is_unused:
        draft.lose(origin, f"nothing is split off there: {'records are named' if has_sources else of_strategy}")
    elif size and size >= 1:
        draft.lose(origin, "eval.split is a fraction of the media: set it to this number / all records")
    elif size:
        draft.put("eval.split", size, f"{origin}; held out by medium, not by record")
    given, of_given = draft.take("eval_steps")
    every, origin = (given, of_given) if given else draft.lines.get("checkpoint.every_steps", (None, ""))
    if is_held_out and strategy == "steps" and isinstance(every, int):
        note = "scores answers, too: eval.max_samples limits how many"
        draft.put("eval.every_steps", every, f"{of_strategy}; {origin}; {note}")
    else:
        if strategy == "no":
            draft.put("eval.every_steps", 0, of_strategy)
        for value, what in ((strategy, of_strategy), (given, of_given)):
            if value not in (None, "no") and not what.startswith(draft.tool):
                draft.lose(what, "evaluations come every eval.every_steps, if records are held out")


def _plain(draft: Draft) -> None:
    """Settings with one value, and limits that are counted in tokens."""
    for key, names in TABLES["names"].items():
        value, origin = draft.take(*names.split())
        if (owner := _owner(draft, key)) is not None:
            if value and not origin.startswith(draft.tool):
                draft.lose(origin, f"is of {owner}")
        elif value is not None and key not in draft.lines:
            value = next((same for one, there, same in SAME if key == one and value == there), value)
            if key == "log.every_steps" and isinstance(value, int | float) and value < 1:
                draft.lose(origin, "log.every_steps counts steps")
                continue
            if key == "model.adapter":
                value = _start(draft, as_list(value), origin)
            draft.put(key, str(value) if key in TEXTS else value, origin)
    if "data.pack_tokens" not in draft.lines:
        draft.lose("max_length, which is not given", UNLIMITED)
    for medium, table in (("IMAGE", "data.image"), ("VIDEO", "data.video")):
        for end in ("MIN", "MAX"):
            tokens, origin = draft.number(f"{medium}_{end}_TOKEN_NUM")
            old = draft.lines.get(f"{table}.{end.lower()}_pixels")
            if tokens and (old is None or not origin.startswith(draft.tool)):
                if old:
                    draft.lose(old[1], f"{medium}_{end}_TOKEN_NUM is the limit")
                side = 32 if re.search("qwen3", str(draft.lines["model.path"][0]), re.I) else 28
                pixels = f"{origin} of {side} x {side} pixels"
                draft.put(f"{table}.{end.lower()}_pixels", int(tokens * side * side), pixels)


def _start(draft: Draft, adapters: list[Any], origin: str) -> Any:
    """The adapter to go on from. UserError if there are others, or if a new one is to be trained on top."""
    if len(adapters) > 1 or draft.take("create_new_adapter")[0]:
        fix = "merge it with vft merge, and name the result as the model"
        raise UserError(
            f"{draft.file}: {origin}: one adapter is gone on from; if another is the base of a new one, {fix}"
        )
    draft.lose(origin, "its own rank, alpha and layers hold there: write them into [lora]")
    return adapters[0]


def _owner(draft: Draft, key: str) -> str | None:
    """What a setting is of, if that is not there; None if it belongs to the run."""
    table, _, name = key.rpartition(".")
    kind = draft.lines.get("objective.kind", (None,))[0]
    owners = {"gamma": "simpo", "label_smoothing": "dpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
    if table == "objective" and (
        kind is None or owners.get(name, kind) != kind or (name, kind) == ("rpo_alpha", "kto")
    ):
        return owners.get(name, "losses of pairs")
    if (table == "lora" or key == "model.adapter") and "lora.targets" not in draft.lines:
        return "LoRA"
    return "videos without NFRAMES" if key == "data.video.fps" and "data.video.frames" in draft.lines else None
