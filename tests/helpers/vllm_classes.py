"""What vLLM's own classes make of a printed command, without an engine: `python vllm_classes.py COMMAND CLIP...`

The interpreter has vllm with what its Python files import, and transformers, torch (for a CPU) and torchvision; vLLM's
compiled extensions are not needed (checked with vllm 0.33.0, transformers 5.20.2, torch 2.13.0). Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import vllm.platforms as platforms
from vllm.platforms.cpu import CpuPlatform

platforms._current_platform = CpuPlatform()  # without the compiled extensions vLLM finds none

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.media.connector import MediaConnector  # noqa: E402
from vllm.multimodal.processing.context import TimingContext  # noqa: E402
from vllm.multimodal.processing.inputs import ProcessorInputs  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"


def model_config(*words: str) -> Any:
    """vLLM's configuration of a model by the words of `vllm serve`, every one of which it must know."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed, unknown = parser.parse_known_args(["--dtype", "float32", *words])
    assert not unknown, unknown
    return EngineArgs.from_cli_args(parsed).create_model_config()


def seen(config: Any, clip: str) -> dict[str, Any]:
    """Frames, grid and tokens of a clip, loaded as the server loads it."""
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    info = processor.info
    connector = MediaConnector(config.multimodal_config.media_io_kwargs, allowed_local_media_path="/")
    video_processor = type(info.get_hf_processor().video_processor).__name__
    frames, about = connector.fetch_video(f"file://{os.path.abspath(clip)}", video_processor=video_processor).media
    tokenizer = info.get_tokenizer()
    items = info.parse_mm_data({"video": [(frames, about)]})
    made = processor.apply(ProcessorInputs(tokenizer.encode(PROMPT), items), TimingContext(enabled=False))
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    media = made["mm_kwargs"].get_data()
    return {
        "frames": [int(index) for index in about["frames_indices"]],
        "grid": media["video_grid_thw"][0].tolist(),
        "tokens": list(made["prompt_token_ids"]).count(pad),
        "seconds_per_grid": float(media["second_per_grid_ts"][0]),
    }


def main() -> None:
    """Command line."""
    program, verb, model, *words = shlex.split(sys.argv[1])
    assert (program, verb) == ("vllm", "serve")
    config = model_config("--model", model, *words)
    folder = model_config("--model", model)  # as someone serves it who leaves the options out
    found = {
        "command": config.get_diff_sampling_param(),
        "folder": folder.get_diff_sampling_param(),
        "clips": [seen(config, clip) for clip in sys.argv[2:]],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
