#!/usr/bin/env python
"""Answer a prompt about videos: python tools/predict.py --model MODEL [--adapter DIR] [--prompt TEXT] VIDEO...

Frames and pixels are those that the adapter (or merged model) was trained with, unless options say otherwise.

A model that no device holds is spread over several: torchrun --nproc-per-node 8 tools/predict.py ... Each process
answers its share of the files, and the first one prints.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from vft.adapter_files import recorded
from vft.answer import Answerer, Prompt, load_model, require_folder, user_question
from vft.console import user_errors
from vft.data.media_error import MediaError
from vft.data.pool import WorkerPool
from vft.data.sources.records import PICTURE_SUFFIXES
from vft.data.video import scan
from vft.data_config import DataConfig
from vft.distributed import all_of, environment, make_mesh, process_group
from vft.models.generate import Sampling
from vft.types import MediaKind, MediaRef, UserError

DEFAULT_PROMPT = "Describe the video."


def main() -> None:
    """Command line."""
    arguments = parse()
    with user_errors():
        failed = predict(arguments)
    sys.exit(1 if failed else 0)


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a base or merged model")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter on it")
    parser.add_argument("--prompt", help=f"what to ask (default: that of the training task, or {DEFAULT_PROMPT!r})")
    parser.add_argument("--json", action="store_true", help="one JSON object a video: video, prompt, prediction")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="TOKENS", help="length limit (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default); higher: sampled")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass to sample from (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--fps", type=float, metavar="FRAMES_PER_SECOND", help="frames sampled a second")
    rate.add_argument("--frames", type=int, help="a fixed number of frames")
    parser.add_argument("--max-frames", type=int, help="most frames of a video")
    parser.add_argument("--max-pixels", type=int, metavar="PIXELS", help="height x width of a frame, at most")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help="nf4: the layers in 4 bits")
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="video or picture files")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """UserError for values out of range."""
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens = {arguments.max_new_tokens}: must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise UserError(f"--temperature = {arguments.temperature}: must be 0 (greedy) or above")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p = {arguments.top_p}: must be above 0 and at most 1")


def predict(arguments: argparse.Namespace) -> int:
    """Print an answer for each file; returns how many files could not be used."""
    check(arguments)
    require_folder(arguments.adapter, "--adapter")
    if not any(path.exists() for path in arguments.videos):  # before a large model is loaded for nothing
        raise UserError(f"{arguments.videos[0]}: no such file; check the path")
    world = environment()
    default = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: default}[arguments.precision]
    with process_group(world), WorkerPool(workers=0, deadline_s=600.0) as pool:
        mesh, quantize = make_mesh(world, 0), arguments.quantize
        loaded = load_model(arguments.model, arguments.adapter, dtype, world.device, mesh, quantize=quantize)
        about = trained_with(arguments.adapter, loaded.checkpoint.json_file("vft.json"))
        prompt = arguments.prompt or about.get("prompt", DEFAULT_PROMPT)
        config = data_config(arguments, about)
        answerer = Answerer(loaded.skeleton.model, loaded.encoder, config, scan, pool, world)
        return answer_files(answerer, prompt, arguments)


def answer_files(answerer: Answerer, prompt: str, arguments: argparse.Namespace) -> int:
    """Each process takes the next file of its turn; all run the model equally often. Returns how many files failed."""
    world, paths = answerer.world, arguments.videos
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    failed = 0
    for first in range(0, len(paths), world.size):
        turn = paths[first : first + world.size]
        media: list[Prompt] = []
        error = ""
        if world.rank < len(turn):
            read = load(answerer, turn[world.rank], prompt)
            media, error = ([], str(read)) if isinstance(read, MediaError) else ([read], "")
        told = all_of(("".join(answerer.answer(media, sampling)), error))
        failed += sum(bool(error) for _, error in told)
        if world.is_main:
            for path, (answer, error) in zip(turn, told, strict=False):  # the last turn may have too few for all
                if error:
                    print(f"error: {error}", file=sys.stderr)
                else:
                    show(path, prompt, answer, arguments)
    return failed


def load(answerer: Answerer, path: Path, prompt: str) -> Prompt | MediaError:
    """The question about a file with its frames, or what is wrong with the file."""
    kind: MediaKind = "image" if path.suffix.lower() in PICTURE_SUFFIXES else "video"
    question = user_question(str(path), [MediaRef(kind, path.resolve())], prompt, answerer.config.video.timestamps)
    try:
        return answerer.load([question])()[0]
    except MediaError as error:  # found by the scan
        return error


def trained_with(adapter: Path | None, merged: dict[str, Any]) -> dict[str, Any]:
    """What training recorded beside the adapter or in the merged model; empty for a plain base."""
    return merged if adapter is None else recorded(adapter)


def data_config(arguments: argparse.Namespace, about: dict[str, Any]) -> DataConfig:
    """Frames and pixels as trained, with the command line's laid over them."""
    video = dict(about.get("video", {}))
    if arguments.fps is not None or arguments.frames is not None:
        video = {key: value for key, value in video.items() if key not in ("fps", "frames")}
    asked = {key: getattr(arguments, key) for key in ("fps", "frames", "max_frames", "max_pixels")}
    video |= {key: value for key, value in asked.items() if value is not None}
    most = arguments.max_frames
    if most is not None:
        video["min_frames"] = min(video.get("min_frames", most), most, DataConfig().video.min_frames)
        if arguments.frames is None and "frames" in video:
            video["frames"] = min(video["frames"], most)
    try:
        return DataConfig.model_validate({"video": video, "image": about.get("image", {}), "pack_tokens": 1 << 20})
    except ValueError as error:
        detail = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in detail["loc"])
        value = f" = {detail['input']}" if isinstance(detail.get("input"), int | float) else ""
        raise UserError(f"{where}{value}: {detail['msg']}; see --fps, --frames, --max-frames, --max-pixels") from error


def show(path: Path, prompt: str, answer: str, arguments: argparse.Namespace) -> None:
    """One answer."""
    if arguments.json:
        print(json.dumps({"video": str(path), "prompt": prompt, "prediction": answer}, ensure_ascii=False), flush=True)
    else:
        print(answer if len(arguments.videos) == 1 else f"{path}: {answer}", flush=True)


if __name__ == "__main__":
    main()
