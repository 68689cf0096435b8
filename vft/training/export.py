"""What a run exports, at its end or from any of its checkpoints; and what the folder of a run means as an adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vft.adapters.lora import is_adapter
from vft.adapters.peft_format import ABOUT_FILE, export_adapter, merged_into
from vft.common.errors import UserError, missing
from vft.common.files import locked, read_object
from vft.config import run as configs
from vft.config.run import Config, ParallelConfig
from vft.models.weights import export_model
from vft.preparation.run import PreparedModel, load_for_inference, open_for_training
from vft.reporting import write_card
from vft.reporting.serving import served_files
from vft.training import checkpoint as checkpoints

logger = logging.getLogger(__name__)


def write_export(
    prepared: PreparedModel, config: Config, target: Path, step: int, asked: Mapping[str, Any], write: bool
) -> None:
    """Write the adapter, or the whole model, to `target`, with its card and facts of the training in vft.json beside
    it; `asked` is what training asked. Every process calls it, because tensors are gathered; one has `write`."""
    model, pretrained = prepared.model, prepared.pretrained
    about: dict[str, Any] = {
        "base_fingerprint": pretrained.fingerprint,
        "task": config.task,
        **asked,
        "step": step,
        "rope_factor": pretrained.rope_factor,
        "template_options": config.data.template_options,
        "objective": config.objective and config.objective.model_dump(mode="json", exclude_none=True),
        "pack_tokens": config.data.pack_tokens,
        "video": config.data.video.model_dump(mode="json", exclude_none=True),
        "image": config.data.image.model_dump(mode="json", exclude_none=True),
    }
    if config.lora is not None:
        export_adapter(model, target, config.lora, config.model.path, about, write)
    else:
        about |= {"merged": merged_into(pretrained)}
        export_model(model, pretrained, target, served_files(pretrained, model, about), write)
    if write:
        write_card(config.output_dir, target, step, pretrained)


def export_run(run: Path, step: int | None, output: Path | None, overrides: Sequence[str] = ()) -> Path:
    """`export_checkpoint` of the newest whole checkpoint of a run, or of that of `step`. Returns the folder: `output`,
    or RUN/adapter (RUN/model), or with `step` RUN/exports/step-NNNNNN. UserError says which checkpoints there are."""
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: no config.toml; name the output_dir of a run")
    if output is not None and output.exists() and any(output.iterdir()):
        raise UserError(f"--output = {output}: the folder isn't empty; name a new one")
    found = checkpoints.list_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: no checkpoint; a run writes one every checkpoint.every_steps steps and when stopped")
    chosen = [one for one in found if step in (None, checkpoints.step_of(one))]
    if not chosen:
        steps = ", ".join(str(checkpoints.step_of(one)) for one in reversed(found))
        raise UserError(f"--step = {step}: {run} has no such checkpoint; it has {steps}")
    damage = {one: checkpoints.find_damage(one) for one in chosen}
    whole = next((one for one in chosen if damage[one] is None), chosen[0])
    name = "model" if configs.load(run / "config.toml").lora is None else "adapter"
    target = output or (run / name if step is None else run / "exports" / whole.name)
    export_checkpoint(whole, target, overrides)
    return target


def export_checkpoint(checkpoint: Path, target: Path, overrides: Sequence[str] = ()) -> None:
    """Write the adapter, or the whole model, of a checkpoint, on the CPU: an adapter in its own memory (DoRA in that
    of the base, whose rows it measures). `overrides` are settings that have changed since, such as `model.path`.

    Raises UserError if the checkpoint is damaged, or the base is another one than was trained on.
    """
    if damage := checkpoints.find_damage(checkpoint):
        raise UserError(f"{checkpoint}: {damage}; take another step")
    run = checkpoint.parents[1]  # it may have been moved
    config = configs.load(run / "config.toml", overrides).model_copy(update={"output_dir": run})
    state = read_object(checkpoint / checkpoints.STATE)
    prepared = open_for_training(config)
    if state["base"] != prepared.pretrained.fingerprint:
        raise UserError(f"{config.model.path}: other weights than the run began with; give the base as model.path=BASE")
    model = prepared.model
    if config.lora is None or config.lora.dora:
        load_for_inference(prepared, torch.device("cpu"), None, ParallelConfig())
    for owner in {name.rpartition(".")[0] for name, p in model.named_parameters() if p.is_meta and is_adapter(name)}:
        model.get_submodule(owner).to_empty(device="cpu", recurse=False)
    checkpoints.load_weights(checkpoint, model)
    write_export(prepared, config, target, state["step"], state.get("asked", {}), write=True)
    logger.info("wrote %s", target)


def adapter_folder(path: Path, setting: str = "adapter") -> Path:
    """The adapter that `path` means: that folder, the adapter of a run's folder, or of one of its checkpoints, which is
    exported to RUN/exports if it has not been. UserError, which names `setting`, if there is no such folder, or if the
    run has none yet or has trained the whole model."""
    if not path.is_dir():
        raise UserError(f"{setting} = {str(path)!r}: {missing(path, 'folder')}")
    run = path.absolute().parents[1] if (path / checkpoints.MANIFEST).is_file() else path
    if not (run / "run.json").is_file():
        if (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise UserError(f"{path} is a model's folder, not an adapter's: give it as the model")
        return path
    if configs.load(run / "config.toml").lora is None:
        raise UserError(f"{run} trained the whole model, not an adapter: --model takes what `vft export {run}` writes")
    if run is path:
        if not (run / "adapter").is_dir():
            raise UserError(f"{run}: the run has no adapter yet; `vft export {run}` makes one of its newest checkpoint")
        return run / "adapter"
    target, written = run / "exports" / path.name, path / checkpoints.MANIFEST
    with locked(run / "exports" / f".{path.name}.lock", "another process that exports the checkpoint"):
        about = target / ABOUT_FILE
        if not about.is_file() or about.stat().st_mtime < written.stat().st_mtime:
            export_checkpoint(path, target)
    return target


def with_adapter_folder(config: Config) -> Config:
    """`config` whose `model.adapter` is an adapter's folder, if it names a run or a checkpoint."""
    if not config.model.adapter:
        return config
    adapter = str(adapter_folder(Path(config.model.adapter), "model.adapter"))
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": adapter})})
