"""What a run leaves for others: an adapter in PEFT's format, or a whole model in the released layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.adapters.compatibility import merged_into
from vft.adapters.peft_format import ABOUT_FILE, export_adapter
from vft.common.task import Task
from vft.config.run import Config
from vft.data.chat import ChatEncoder
from vft.distributed.heartbeat import main_process_work
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained, export_model
from vft.reporting.serving import greedy, processor_files

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@main_process_work("writing an export")
def export(
    model: VideoLanguageModel,
    checkpoint: Pretrained,
    config: Config,
    task: Task,
    asked: Mapping[str, Any],
    step: int,
    target: Path,
    write: bool,
) -> None:
    """Every process calls it (tensors are gathered); the one with `write` writes. Facts of the training lie beside:
    `asked` is what the records ask (`vft.data.training_prompts`)."""
    about: dict[str, Any] = {
        "base_fingerprint": checkpoint.fingerprint,
        "task": config.task,
        "prompt": task.prompt,
        **asked,
        "step": step,
        "rope_factor": checkpoint.rope_factor,
        "pack_tokens": config.data.pack_tokens,
        "video": config.data.video.model_dump(mode="json", exclude_none=True),
        "image": config.data.image.model_dump(mode="json", exclude_none=True),
    }
    if config.lora is not None:
        export_adapter(model, target, config.lora, config.model.path, about, write)
    else:
        about |= {"merged": merged_into(checkpoint)}
        export_model(model, checkpoint, target, served_files(checkpoint, model, about), write)


def served_files(
    checkpoint: Pretrained, model: VideoLanguageModel, about: Mapping[str, Any], generation: str = "greedy"
) -> dict[str, Mapping[str, Any]]:
    """JSON files, by name, that a whole model has in the place of its release's: `about`, the facts of the training,
    and what makes others sample text, frames and pixels as training and evaluation did. With `generation` = "base"
    text is sampled as the release has it."""
    files: dict[str, Mapping[str, Any]] = {ABOUT_FILE: about}
    if generation == "greedy":
        end_ids = ChatEncoder(checkpoint.tokenizer, model.processor, checkpoint.end_ids).end_ids
        files["generation_config.json"] = greedy(checkpoint.json_file("generation_config.json"), end_ids)
    if about.get("video"):  # nothing is known of what another program's adapter was trained on
        release = {name: checkpoint.json_file(name) for name in PROCESSOR_FILES}
        files |= processor_files(checkpoint.config.model_type, release, about["video"], about.get("image", {}))
    return files
