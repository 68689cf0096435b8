"""Export: an adapter in PEFT's format, or the whole model in the layout of its release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.adapters.peft_format import ABOUT_FILE, export_adapter, merged_into
from vft.common.task import Task
from vft.config.run import Config
from vft.data.chat import ChatEncoder
from vft.distributed.heartbeat import main_process_work
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained
from vft.models.weights import export_model
from vft.reporting.serving import greedy, processor_files

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@main_process_work("writing an export")
def export(
    model: VideoLanguageModel,
    pretrained: Pretrained,
    config: Config,
    task: Task,
    prompts: Mapping[str, Any],
    step: int,
    target: Path,
    write: bool,
) -> None:
    """Write the adapter or the model to `target`, and facts of the training to vft.json beside it.

    Every process calls it, because tensors are gathered; the one with `write` writes. `prompts` are facts about what
    the records ask (`vft.data.dataset.describe_prompts`).
    """
    about: dict[str, Any] = {
        "base_fingerprint": pretrained.fingerprint,
        "task": config.task,
        "prompt": task.prompt,
        **prompts,
        "step": step,
        "rope_factor": pretrained.rope_factor,
        "pack_tokens": config.data.pack_tokens,
        "video": config.data.video.model_dump(mode="json", exclude_none=True),
        "image": config.data.image.model_dump(mode="json", exclude_none=True),
    }
    if config.lora is not None:
        export_adapter(model, target, config.lora, config.model.path, about, write)
    else:
        about |= {"merged": merged_into(pretrained)}
        export_model(model, pretrained, target, served_files(pretrained, model, about), write)


def served_files(
    pretrained: Pretrained, model: VideoLanguageModel, about: Mapping[str, Any], generation: str = "greedy"
) -> dict[str, Mapping[str, Any]]:
    """JSON files by name, which replace those of the release beside an exported model.

    They have the facts of the training, `about`, and make other programs sample frames and pixels as in training, and
    generate text greedily as in evaluation. With `generation` = "base" text is generated as the release says.
    """
    files: dict[str, Mapping[str, Any]] = {ABOUT_FILE: about}
    if generation == "greedy":
        end_ids = ChatEncoder(pretrained.tokenizer, model.processor, pretrained.end_ids).end_ids
        files["generation_config.json"] = greedy(pretrained.json_file("generation_config.json"), end_ids)
    if about.get("video"):  # unknown for an adapter of another program
        release = {name: pretrained.json_file(name) for name in PROCESSOR_FILES}
        files |= processor_files(pretrained.config.model_type, release, about["video"], about.get("image", {}))
    return files
