"""What a run leaves for others: an adapter in PEFT's format, or a whole model in the released layout."""

from __future__ import annotations

from pathlib import Path

from vft.adapter_files import export_adapter, merged_into
from vft.config import Config
from vft.models import Skeleton
from vft.models.weights import Checkpoint, export_model
from vft.task import Task
from vft.watch import work_of_one


@work_of_one("writing an export")
def export(
    skeleton: Skeleton, checkpoint: Checkpoint, config: Config, task: Task, step: int, target: Path, write: bool
) -> None:
    """Every process calls it (tensors are gathered); the one with `write` writes. Facts of the training lie beside."""
    about = {
        "base_fingerprint": checkpoint.fingerprint,
        "task": task.name,
        "prompt": task.prompt,
        "step": step,
        "rope_factor": checkpoint.rope_factor,
        "video": config.data.video.model_dump(mode="json", exclude_none=True),
        "image": config.data.image.model_dump(mode="json", exclude_none=True),
    }
    if config.lora is not None:
        export_adapter(skeleton.model, target, config.lora, config.model.path, skeleton.peft_prefixes, about, write)
    else:
        export_model(skeleton.model, checkpoint, target, {**about, "merged": merged_into(checkpoint)}, write)
