"""What an adapter, or a model with one merged into it, was trained with: frames, pixels, prompt and task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vft.adapters.peft_format import recorded, trained_rope_factor
from vft.common.errors import UserError
from vft.config.data import DataConfig
from vft.config.run import Config
from vft.config.toml import explain

NO_LIMIT_TOKENS = 1 << 20
"""`data.pack_tokens` for a model whose training is unknown: media keep all frames that other limits allow."""


def data_config(about: Mapping[str, Any], limits: Mapping[str, Any], pack_tokens: int | None = None) -> DataConfig:
    """Frames, pixels and length of a row as `about` (vft.json) records them, unless `limits` has other ones.

    `limits` holds `fps`, `frames`, `max_frames` and `max_pixels` of `[data.video]`, None for those not given.
    """
    video = dict(about.get("video", {}))
    given = {key: value for key, value in limits.items() if value is not None}
    if "fps" in given or "frames" in given:
        video = {key: value for key, value in video.items() if key not in ("fps", "frames")}
    video |= given
    if given.keys() & {"fps", "frames", "max_frames"}:
        video["sample_lists"] = True  # or the limits would not hold for videos that are lists of pictures
    max_frames = given.get("max_frames")
    if max_frames is not None:
        video["min_frames"] = min(video.get("min_frames", DataConfig().video.min_frames), max_frames)
        if "frames" in video and "frames" not in given:
            video["frames"] = min(video["frames"], max_frames)
    table = {"video": video, "image": about.get("image", {})}
    try:
        return DataConfig.model_validate(
            {**table, "pack_tokens": pack_tokens or about.get("pack_tokens", NO_LIMIT_TOKENS)}
        )
    except ValidationError as error:
        message = explain(DataConfig, error)[1]
        raise UserError(f"{message}; see --fps, --frames, --max-frames, --max-pixels") from error


def evaluation_config(config: Config, adapter: Path | None) -> Config:
    """`config` with the task and `model.rope_factor` of the adapter's training, if it names none itself.

    A merged model has the task of the adapter that is merged into it. The base beside an adapter is asked the same
    questions, so it gets the same `rope_factor`, and with it the same length of context.
    """
    about = recorded(adapter or Path(config.model.path))
    rope_factor = trained_rope_factor(adapter, config.model.rope_factor)
    model = config.model.model_copy(update={"rope_factor": rope_factor})
    task = config.task or about.get("task")
    return Config.model_validate({**config.model_dump(), "task": task, "model": model.model_dump()})
