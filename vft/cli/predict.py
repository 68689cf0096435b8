"""Answer a prompt about videos: python tools/predict.py --model MODEL [--adapter DIR] [--prompt TEXT] VIDEO...

VIDEO is a video or picture, a folder of them, or a file of records (JSON, JSONL, CSV, TSV, Parquet): those of training
data, whose last answers become references, or {"video": ..., "question": ...}. Frames and pixels are those that the
adapter (or merged model) was trained with, unless options say otherwise.

With --output FILE.jsonl each answer is a line of that file as soon as it is known, and the same command again goes on
where it was. With --segments SECONDS a long video is asked about part by part.

A model that no device holds is spread over several: torchrun --nproc-per-node 8 tools/predict.py ... Each process
answers its share of the questions, and the first one prints and writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vft.adapters.peft_format import WEIGHTS_FILE, recorded
from vft.cli.arguments import parse_arguments
from vft.common.console import progress_bar, user_errors
from vft.common.errors import UserError
from vft.common.rules import VERSION
from vft.common.types import MediaInfo, MediaRef
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import ModelConfig, ParallelConfig
from vft.config.toml import explain
from vft.data.frame_times import with_frame_times
from vft.data.media.errors import MediaError
from vft.data.media.index import build
from vft.data.media.scan import scan
from vft.data.records.files import RECORD_SUFFIXES
from vft.data.spans import check_spans
from vft.data.workers import WorkerPool
from vft.distributed.process_group import World, all_of, environment, make_mesh, process_group
from vft.inference.answers_file import AnswersFile, answer_line
from vft.inference.engine import Answerer, Prompt, Said, require_folder
from vft.inference.generate import Sampling
from vft.inference.requests import Failure, Item, read_items, split
from vft.models.pretrained import Pretrained
from vft.preparation.documents import check_answer_length
from vft.preparation.run import DTYPES, load_for_inference, open_for_inference

DEFAULT_PROMPT = "Describe the video."
LIMITS = ("fps", "frames", "max_frames", "max_pixels")
OPTIONS = {
    **{f"{table}.{key}": f"--{key.replace('_', '-')}" for table in ("data.video", "video") for key in LIMITS},
    "data.video": "--frames, --max-frames, --max-pixels",
    "data.pack_tokens": "--pack-tokens",
    "data.root": "--root",
    "on the source: columns = {": "by --columns NAME=KEY, {",
    "on the source, columns = {": "by --columns NAME=KEY, {",
    "model.path": "--model",
}
"""Keys of configurations that messages name, and what they are here."""
FEW = 8
"""Questions up to which starting worker processes takes longer than they save."""
WORKERS = 4
DECODE_TIMEOUT_S = 600.0

Info = Callable[[MediaRef], MediaInfo]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        try:
            failed = predict(arguments)
        except UserError as error:
            error.args = (own_words(str(error)),)
            raise
    sys.exit(1 if failed else 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--model", required=True, help="folder or hub name of a base or merged model")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter on it")
    parser.add_argument("--prompt", help=f"what to ask (default: that of the training task, or {DEFAULT_PROMPT!r})")
    parser.add_argument("--json", action="store_true", help="one JSON object a video: video, prompt, prediction")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSONL of answers, which a second run goes on with")
    parser.add_argument("--root", type=Path, help="where the media of records lie (default: the folder of their file)")
    parser.add_argument(
        "--columns", metavar="NAME=KEY,...", help="what keys of records are called, such as video=path,question=q"
    )
    parser.add_argument("--segments", type=float, metavar="SECONDS", help="ask about every so many seconds of a video")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="TOKENS", help="length limit (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default); higher: sampled")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass to sample from (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--fps", type=float, metavar="FRAMES_PER_SECOND", help="frames sampled a second")
    rate.add_argument("--frames", type=int, help="a fixed number of frames")
    parser.add_argument("--max-frames", type=int, help="most frames of a video")
    parser.add_argument("--max-pixels", type=int, metavar="PIXELS", help="height x width of a frame, at most")
    what = "a question with its media, which lose frames and size to fit (default: those of training)"
    parser.add_argument("--pack-tokens", type=int, metavar="TOKENS", help=f"most tokens of {what}")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help="nf4: the layers in 4 bits")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="questions that a process answers at once (default 1)"
    )
    parser.add_argument(
        "--workers", type=int, help=f"processes that decode (default: {WORKERS}; up to {FEW} videos: 0)"
    )
    what = "videos or pictures, folders of them, or files of records (JSON, JSONL, CSV, TSV, Parquet)"
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help=what)


def columns_of(text: str | None) -> dict[str, str]:
    """`--columns` as a table. UserError where it is none."""
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    try:
        columns = {name.strip(): key.strip() for name, _, key in pairs}
        return SourceConfig(format="messages", path="records", columns=columns).columns
    except ValidationError as error:
        raise UserError(f"--columns = {text!r}: {explain(SourceConfig, error)[1]}") from None


def check(arguments: argparse.Namespace) -> None:
    """UserError for values out of range, or that don't go together."""
    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} = {getattr(arguments, name)}: must be at least 1")
    if arguments.workers is not None and arguments.workers < 0:
        raise UserError(f"--workers = {arguments.workers}: must be at least 0")
    if not 0 <= arguments.temperature < math.inf:
        raise UserError(f"--temperature = {arguments.temperature}: must be 0 (greedy) or above")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p = {arguments.top_p}: must be above 0 and at most 1")
    if arguments.segments is not None and not 0 < arguments.segments < math.inf:
        raise UserError(f"--segments = {arguments.segments}: must be seconds above 0")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError(f"--prompt = {arguments.prompt!r}: asks nothing; give a text, or leave it out")
    for name in (*LIMITS, "pack_tokens"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} = {value}: must be above 0")
    if arguments.json and arguments.output:
        raise UserError("--json prints, --output writes JSON to a file; leave one out")
    if arguments.root and not any(path.suffix.lower() in RECORD_SUFFIXES for path in arguments.videos):
        raise UserError("--root is where the media of records lie, but no file of records is named; leave it out")
    require_folder(arguments.adapter, "--adapter")
    require_folder(arguments.root, "--root")
    if not any(path.exists() for path in arguments.videos):  # before a large model is loaded for nothing
        raise UserError(f"{arguments.videos[0]}: no such file; check the path")


def predict(arguments: argparse.Namespace) -> int:
    """Print or write an answer to each question; returns how many have none."""
    check(arguments)
    world = environment()
    precision = arguments.precision or ("bf16" if world.device.type == "cuda" else "fp32")
    base = ModelConfig(path=arguments.model, quantize=arguments.quantize)
    prepared = open_for_inference(base, arguments.adapter, DTYPES[precision])
    checkpoint = prepared.pretrained
    check_answer_length(arguments.max_new_tokens, prepared.model.processor.context_tokens, "--max-new-tokens")
    about = checkpoint.json_file("vft.json") if arguments.adapter is None else recorded(arguments.adapter)
    config = data_config(arguments, about)
    prompt = arguments.prompt or about.get("prompt") or DEFAULT_PROMPT
    before = "" if arguments.prompt else about.get("prompt_before_media", "")
    columns = columns_of(arguments.columns)
    items = read_items(arguments.videos, prompt, arguments.root, columns, before, about.get("system"))
    silent = sum(not item.asks for item in items)
    if silent and arguments.prompt is None and world.is_main:
        told = f"{silent} of {len(items)} records ask nothing themselves: {prompt!r} is asked; --prompt asks another"
        print(told, file=sys.stderr)
    file = None
    if arguments.output is not None:
        file = AnswersFile(arguments.output, settings_of(arguments, checkpoint, config, precision))
    # Before the process group, as in training: a first scan of many files may outlast any time-out.
    keep = len(items) > FEW or arguments.segments is not None
    info = scanned(items, config, workers_for(items, arguments), world) if keep else scan
    if arguments.segments is not None:
        items = split(items, arguments.segments, info)
    with process_group(world), WorkerPool(workers_for(items, arguments), DECODE_TIMEOUT_S) as pool:
        # The first process's file is the one that counts: others may be on hosts that don't see it.
        done = all_of(None if file is None else [file.has(item) for item in items])[0]
        left = [item for item, is_done in zip(items, done or [False] * len(items), strict=True) if not is_done]
        if len(left) < len(items) and world.is_main:
            print(f"{arguments.output}: {len(items) - len(left)} of {len(items)} answered before", file=sys.stderr)
        if not left:
            return 0
        load_for_inference(prepared, world.device, make_mesh(world, 0), ParallelConfig())
        answerer = Answerer(prepared.model, prepared.encoder(config), config, info, pool, world)
        return answer_items(answerer, left, arguments, file)


def workers_for(items: Sequence[Item], arguments: argparse.Namespace) -> int:
    """Processes that scan and decode."""
    if arguments.workers is not None:
        return int(arguments.workers)
    return WORKERS if len(items) > FEW else 0


def scanned(items: Sequence[Item], config: DataConfig, workers: int, world: World) -> Info:
    """What scans of all the media find, made side by side and kept."""
    refs = [ref for item in items if not isinstance(item.asked, Failure) for ref in item.asked.prompt.media]
    return build(refs, config.cache_path, workers, DECODE_TIMEOUT_S, show_progress=world.is_main).info


def settings_of(
    arguments: argparse.Namespace, checkpoint: Pretrained, config: DataConfig, precision: str
) -> dict[str, Any]:
    """All that an answer depends on beside the question."""
    weights = hashlib.sha256(checkpoint.fingerprint.encode())
    if arguments.adapter is not None and (arguments.adapter / WEIGHTS_FILE).is_file():
        with (arguments.adapter / WEIGHTS_FILE).open("rb") as stream:
            weights.update(hashlib.file_digest(stream, "sha256").digest())
    sampled = {"top_p": arguments.top_p, "seed": arguments.seed} if arguments.temperature else {}
    return {
        "model": arguments.model,
        "adapter": None if arguments.adapter is None else str(arguments.adapter),
        "weights": weights.hexdigest()[:16],
        "rules": VERSION,
        "precision": precision,
        "quantize": arguments.quantize,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        **sampled,
        "pack_tokens": config.pack_tokens,
        "video": config.video.model_dump(mode="json", exclude_none=True),
        "image": config.image.model_dump(mode="json", exclude_none=True),
    }


def answer_items(
    answerer: Answerer, items: Sequence[Item], arguments: argparse.Namespace, file: AnswersFile | None
) -> int:
    """Each process takes its share of every turn; all run the model equally often. Returns how many have no answer."""
    world = answerer.world
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    alone = len(items) == 1 and items[0].segment_s is None
    live = alone and file is None and not arguments.json and sys.stdout.isatty() and world.is_main
    failures: Counter[str] = Counter()
    cut_off = 0
    size = world.size * arguments.batch_size
    turns = [items[first : first + size] for first in range(0, len(items), size)]
    if file is not None and world.is_main:
        file.begin()
    most = arguments.max_new_tokens
    loading = begin(answerer, turns[0], most)
    with progress_bar(len(items), "answering", "question", file is not None and world.is_main) as bar:
        for number, turn in enumerate(turns):
            following = turns[number + 1] if number + 1 < len(turns) else []
            ready = loading()
            loading = begin(answerer, following, most)  # decoded while these are answered
            prompts = [one for one in ready if isinstance(one, Prompt)]
            texts = iter(answerer.answer(prompts, sampling, write if live else None))
            told = all_of([next(texts) if isinstance(one, Prompt) else one for one in ready])
            if world.is_main:
                for place, item in enumerate(turn):
                    answer = told[place % world.size][place // world.size]
                    failures.update([answer.reason] if isinstance(answer, Failure) else [])
                    cut_off += isinstance(answer, Said) and answer.is_cut_off
                    tell(item, answer, arguments, file, live)
            bar.update(len(turn))
    if cut_off:
        limit = f"--max-new-tokens = {arguments.max_new_tokens}, or the end of the model's context"
        print(f"{cut_off} of {len(items)} answers were cut off at {limit}", file=sys.stderr)
    failed = all_of(failures.total())[0]
    if failed and file is not None and world.is_main:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(failures.items()))
        print(f"error: {failed} of {len(items)} questions have no answer ({reasons}): see {file.path}", file=sys.stderr)
    return failed


def begin(answerer: Answerer, turn: Sequence[Item], new_tokens: int) -> Callable[[], list[Prompt | Failure]]:
    """Begin to decode this process's share of a turn; what is returned waits for it."""
    world, pool = answerer.world, answerer.pool
    share = turn[world.rank :: world.size]
    if not pool.workers:  # nothing goes on beside this process
        return lambda: [load(answerer, item, new_tokens)() for item in share]
    waiting = [load(answerer, item, new_tokens) for item in share]
    return lambda: [wait() for wait in waiting]


def load(answerer: Answerer, item: Item, new_tokens: int) -> Callable[[], Prompt | Failure]:
    """A question with its frames, when it is waited for, or what is wrong with them."""
    if isinstance(item.asked, Failure):
        failed = item.asked
        return lambda: failed
    asked = item.asked
    name = asked.prompt.media[0].name if asked.prompt.media else asked.prompt.origin
    if answerer.config.video.timestamps:
        asked = replace(asked, prompt=with_frame_times(asked.prompt))
    failure: Failure | None = None
    try:
        check_spans(asked.prompt, answerer.info)
    except MediaError as error:  # found by the scan
        failure = Failure(name, error.reason, str(error))
    except UserError as error:  # times outside the video
        failure = Failure(name, "record", str(error))
    wait = answerer.load([] if failure else [asked], new_tokens)

    def waited() -> Prompt | Failure:
        if failure is not None:
            return failure
        (found,) = wait()
        if isinstance(found, Prompt):
            return found
        # Of the others: no frame in the range, too long a text.
        return Failure(name, found.reason if isinstance(found, MediaError) else "unfit", str(found))

    return waited


def data_config(arguments: argparse.Namespace, about: dict[str, Any]) -> DataConfig:
    """Frames and pixels as trained, with the command line's laid over them."""
    video = dict(about.get("video", {}))
    if arguments.fps is not None or arguments.frames is not None:
        video = {key: value for key, value in video.items() if key not in ("fps", "frames")}
    asked = {key: getattr(arguments, key) for key in LIMITS}
    video |= {key: value for key, value in asked.items() if value is not None}
    most = arguments.max_frames
    if any(asked[key] is not None for key in ("fps", "frames", "max_frames")):
        video["sample_lists"] = True  # else they would say nothing of videos that are lists of pictures
    if most is not None:
        video["min_frames"] = min(video.get("min_frames", DataConfig().video.min_frames), most)
        if arguments.frames is None and "frames" in video:
            video["frames"] = min(video["frames"], most)
    try:
        # Media are fitted into a row as in training; what another program trained on is unknown.
        room = arguments.pack_tokens or about.get("pack_tokens", 1 << 20)
        return DataConfig.model_validate({"video": video, "image": about.get("image", {}), "pack_tokens": room})
    except ValidationError as error:
        said = explain(DataConfig, error)[1]
        raise UserError(f"{said}; see --fps, --frames, --max-frames, --max-pixels") from error


def tell(
    item: Item, answer: Said | Failure, arguments: argparse.Namespace, file: AnswersFile | None, live: bool
) -> None:
    """One answer, or why there is none: to the file, or to the terminal."""
    if isinstance(answer, Failure):
        answer = replace(answer, message=own_words(answer.message))
    if file is not None:
        file.add(item, answer)
    elif isinstance(answer, Failure):
        print(f"error: {answer.message}", file=sys.stderr)
    elif live:
        print(flush=True)  # the text stands there already
    elif arguments.json:
        line = answer_line(item, answer)
        if not item.is_record:
            del line["id"]
        print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        alone = len(arguments.videos) == 1 and arguments.videos[0].is_file() and not item.is_record
        print(": ".join([*([] if alone else [item.id]), *clock(item), answer.text]), flush=True)


def own_words(message: str) -> str:
    """A message with this command's options in the place of a configuration's keys."""
    for key, option in OPTIONS.items():
        message = re.sub(rf"(?<![\w./]){re.escape(key)}\b(?!\.)", option, message)
    return message


def clock(item: Item) -> list[str]:
    """The segment as minutes and seconds; nothing where the whole is asked about."""
    if item.segment_s is None:
        return []
    times_s = [round(time_s, 1) for time_s in item.segment_s]
    return ["-".join(f"{int(time_s // 60):02d}:{time_s % 60:04.1f}".removesuffix(".0") for time_s in times_s)]


def write(text: str) -> None:
    """A piece of an answer."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    main()
