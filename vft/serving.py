"""The command with which vLLM serves what was trained, and what it doesn't serve."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That `vllm serve --max-lora-rank` takes (vllm/config/lora.py, 0.11)."""


def vllm_serve(model: str, video: Mapping[str, Any], adapter: str = "", rank: int = 0) -> str:
    """`vllm serve` of a model, or of an adapter of this rank on it, with the frames of training: by itself it takes 32
    of any video (vllm/multimodal/video.py). `video` is `[data.video]`, or what was recorded of it."""
    words = ["vllm", "serve", model]
    if adapter:
        limit = next((one for one in MAX_RANKS if one >= rank), rank)
        words += ["--enable-lora", "--max-lora-rank", str(limit), "--lora-modules", f"tuned={adapter}"]
    keys = {"num_frames": "frames"} if "frames" in video else {"fps": "fps", "num_frames": "max_frames"}
    frames = {theirs: video[ours] for theirs, ours in keys.items() if ours in video}
    return shlex.join([*words, *(["--media-io-kwargs", json.dumps({"video": frames})] if frames else [])])


def not_served(lora: Mapping[str, Any]) -> str:
    """Why vLLM doesn't serve an adapter of these settings (`[lora]`) as it is; empty where it does.

    It has one scale, alpha / rank, for all layers and no DoRA (vllm/lora/peft_helper.py).
    """
    towers = sorted({name.partition(".")[0] for name in lora["targets"]} - {"language_model"})
    if towers:
        return f"it is on {', '.join(towers)} too, and only adapters of the language model are served"
    if lora.get("dora"):
        return "DoRA is not served"
    if lora.get("ranks") or lora.get("alphas"):
        return "layers of several ranks or alphas are not served"
    return ""
