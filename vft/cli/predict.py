"""Answer a prompt about videos: vft predict --model MODEL [--adapter DIR] [--prompt TEXT] VIDEO...

VIDEO is a video or picture, a folder of them, or a file of records (JSON, JSONL, CSV, TSV, Parquet): those of training
data, whose last answers become references, or {"video": ..., "question": ...}. Frames and pixels are those that the
adapter (or merged model) was trained with, unless options say otherwise.

A model that was trained on classes answers with the likeliest of them; --json, --output and --table say how likely each
one is.

With --output FILE.jsonl each answer is a line of that file as soon as it is known, and the same command again resumes.
With --segments SECONDS a long video is asked about part by part.

A model that no device holds is spread over several: torchrun --nproc-per-node 8 tools/predict.py ... Each process
answers its share of the questions, and the first one prints and writes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from vft.adapters.peft_format import recorded
from vft.cli.arguments import (
    AdapterFolder,
    Arguments,
    ExistingFolder,
    JsonlFile,
    Positional,
    command,
    renamed,
    written_as,
)
from vft.common.errors import missing
from vft.common.files import replace_text
from vft.common.task import Answer
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import ModelConfig, ParallelConfig
from vft.config.toml import Count, Name, NonNegativeFloat, Positive, PositiveFloat, explain, parse_value
from vft.data.media.index import build
from vft.data.media.video import scan
from vft.data.records.files import RECORD_SUFFIXES
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, all_of, environment, make_mesh, process_group
from vft.inference.answers_file import AnswersFile, Line, answer_settings, prediction_line, table_text
from vft.inference.engine import Answerer, Failure
from vft.inference.generate import Sampling
from vft.inference.requests import (
    Request,
    data_config,
    read_requests,
    split,
    want_texts,
    with_frame_times,
    with_labels,
)
from vft.preparation.documents import check_answer_length
from vft.preparation.memory import inference_shard
from vft.preparation.run import DTYPES, PreparedModel, load_for_inference, open_for_inference

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Describe the video."
LIMITS = ("fps", "frames", "max_frames", "max_pixels")
OPTIONS = {
    **{f"{table}.{key}": f"--{key.replace('_', '-')}" for table in ("data.video", "video") for key in LIMITS},
    "data.video": "--frames, --max-frames, --max-pixels",
    "data.pack_tokens": "--pack-tokens",
    "data.template_options": "--template-options",
    "data.root": "--root",
    "on the source: columns = {": "by --columns NAME=KEY, {",
    "on the source, columns = {": "by --columns NAME=KEY, {",
    "model.path": "--model",
}
"""Keys of configurations that messages name, and the options that stand for them here."""
FEW = 8
"""Questions up to which starting worker processes takes longer than they save."""
WORKERS = 4
DECODE_TIMEOUT_S = 600.0


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("asks nothing; give a text, or leave it out")
    return prompt


def _no_table(file: str | Path) -> str | Path:
    if Path(file).suffix.lower() == ".csv":
        raise ValueError(f"is written as JSONL; name it {Path(file).with_suffix('.jsonl')}, or give --table {file}")
    return file


def columns_of(text: str) -> dict[str, str]:
    """`NAME=KEY,...` as a source's `columns`. ValueError if a name is unknown, or a key is missing."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    try:
        columns = {name.strip(): key.strip() for name, _, key in pairs}
        return SourceConfig(format="messages", path="records", columns=columns).columns
    except ValidationError as error:
        raise ValueError(explain(SourceConfig, error)[1]) from None


class AskArguments(Arguments):
    """Arguments of the commands that ask a model: which one, how it sees videos, how it answers."""

    model: Name
    """folder or hub name of a base or merged model"""
    adapter: AdapterFolder | None = None
    """folder of a LoRA adapter on it, of its run or a checkpoint"""
    max_new_tokens: Positive = 256
    """most tokens of an answer (default 256)"""
    temperature: NonNegativeFloat = 0.0
    """0: greedy (default); above: sampled"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """probability mass to sample from, above 0 and at most 1 (default 1)"""
    seed: int = 0
    """of sampling (default 0)"""
    fps: PositiveFloat | None = None
    """frames sampled per second"""
    frames: Positive | None = None
    """a fixed number of frames instead"""
    max_frames: Positive | None = None
    """most frames of a video"""
    max_pixels: Positive | None = None
    """most pixels of a frame, height x width"""
    pack_tokens: Positive | None = None
    """most tokens of a question with its media, which lose frames and size to fit (default: that of training)"""
    template_options: Annotated[dict[str, Any] | None, BeforeValidator(lambda text: parse_value(text, text))] = None
    """keywords of the chat template, as in TOML: '{enable_thinking = true}' (default: those of training)"""
    precision: Literal["bf16", "fp32"] | None = None
    """bf16 or fp32 (default: bf16 on a GPU, fp32 on a CPU)"""
    quantize: Literal["none", "nf4"] = "none"
    """none (default), or nf4: the layers in 4 bits"""

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.fps is not None and self.frames is not None:
            raise ValueError(f"--fps = {self.fps:g} and --frames = {self.frames} contradict each other; keep one")
        return self

    @property
    def sampling(self) -> Sampling:
        """How answers are generated."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)

    @property
    def base(self) -> ModelConfig:
        """The model without an adapter."""
        return ModelConfig(path=self.model, quantize=self.quantize)

    @property
    def dtype(self) -> str:
        """Name of the dtype to compute in."""
        return self.precision or ("bf16" if environment().device.type == "cuda" else "fp32")

    def open(self) -> tuple[PreparedModel, dict[str, Any], DataConfig]:
        """The model, not loaded yet; what its training recorded (vft.json); and how it sees videos."""
        prepared = open_for_inference(self.base, self.adapter, DTYPES[self.dtype])
        check_answer_length(self.max_new_tokens, prepared.model.processor.context_tokens, "--max-new-tokens")
        about = prepared.pretrained.json_file("vft.json") if self.adapter is None else recorded(self.adapter)
        about |= {} if self.template_options is None else {"template_options": self.template_options}
        return prepared, about, data_config(about, {key: getattr(self, key) for key in LIMITS}, self.pack_tokens)


class PredictArguments(AskArguments):
    """Arguments of `vft predict`."""

    prompt: Annotated[str, AfterValidator(_check_prompt)] | None = None
    """what to ask (default: that of the training task, or 'Describe the video.')"""
    json_lines: Annotated[bool, Field(alias="json")] = False
    """one JSON object a video: video, prompt, prediction"""
    output: Annotated[JsonlFile, BeforeValidator(_no_table)] | None = None
    """JSONL file of answers, with which a second run resumes"""
    table: Annotated[Path, written_as(".csv")] | None = None
    """CSV file, for a spreadsheet, of all answers, written when the last one is known"""
    root: ExistingFolder | None = None
    """folder that the media of records lie in (default: that of their file)"""
    columns: Annotated[dict[str, str], BeforeValidator(columns_of)] = Field(default_factory=dict)
    """NAME=KEY,...: what keys of records are called, such as video=path,question=q"""
    segments: PositiveFloat | None = None
    """ask about every so many seconds of a video"""
    batch_size: Positive = 1
    """questions that a process answers at once (default 1)"""
    workers: Count | None = None
    """processes that decode (default 4; up to 8 videos: 0)"""
    videos: Annotated[list[Path], Positional("VIDEO")]
    """videos or pictures, folders of them, or files of records (JSON, JSONL, CSV, TSV, Parquet)"""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.json_lines and self.output:
            raise ValueError("--json prints, --output writes JSON to a file; leave one out")
        if self.json_lines and self.table:
            raise ValueError("--json prints, --table writes a table to a file; leave one out")
        if self.root and not any(path.suffix.lower() in RECORD_SUFFIXES for path in self.videos):
            raise ValueError("--root is where the media of records lie, but no file of records is named; leave it out")
        bare = [str(path) for path in self.videos if not (path.suffix or path.exists() or "/" in str(path))]
        if self.prompt and bare:
            words = " ".join([self.prompt, *bare])
            raise ValueError(f"{', '.join(bare)}: no such file; a prompt of several words needs quotes: '{words}'")
        if not any(path.exists() for path in self.videos):  # before a large model is loaded for nothing
            raise ValueError(f"{self.videos[0]}: {missing(self.videos[0], 'file', 'check the path')}")
        return self

    def workers_for(self, questions: int) -> int:
        """Processes that scan and decode the media of so many questions."""
        return self.workers if self.workers is not None else WORKERS if questions > FEW else 0


@command(PredictArguments, __doc__, OPTIONS)
def main(options: PredictArguments) -> None:
    """Command line. SystemExit(1) if a question has no answer."""
    sys.exit(1 if predict(options) else 0)


def predict(options: PredictArguments) -> int:
    """Print or write an answer to each question; returns how many have none."""
    world = environment()
    prepared, about, config = options.open()
    requests = requests_of(options, about)
    if config.video.timestamps:
        requests = [with_frame_times(request) for request in requests]
    file = None
    if options.output is not None:
        settings = answer_settings(
            options.base, options.adapter, prepared.pretrained, options.dtype, options.sampling, config
        )
        file = AnswersFile(options.output, settings)
    info = scan
    # Before the process group, as in training: the first scan of many files may outlast any timeout.
    if len(requests) > FEW or options.segments is not None:
        questions = [request.question for request in requests if not isinstance(request.question, Failure)]
        refs = [ref for question in questions for ref in question.prompt.media]
        workers = options.workers_for(len(requests))
        info = build(refs, config.cache_path, workers, DECODE_TIMEOUT_S, show_progress=world.is_main).info
    if options.segments is not None:
        requests = split(requests, options.segments, info)
    with process_group(world), WorkerPool(options.workers_for(len(requests)), DECODE_TIMEOUT_S) as pool:
        # The file of the first process counts: other hosts may not see it.
        answered = all_of([file is not None and file.has(request) for request in requests])[0]
        left = [request for request, is_answered in zip(requests, answered, strict=True) if not is_answered]
        if len(left) < len(requests):
            logger.info("%s: %d of %d answered before", options.output, len(requests) - len(left), len(requests))
        lines: list[Line] = []
        failed = 0
        if left:
            parallel = ParallelConfig()
            mesh = make_mesh(world, inference_shard(parallel, prepared.model, world))
            load_for_inference(prepared, world.device, mesh, parallel)
            encoder, group = prepared.encoder(config), DataParallel.of(mesh)
            answerer = Answerer(prepared.model, encoder, config, info, pool, world, group)
            failed = answer_requests(answerer, left, options, file, lines)
        if options.table is not None and world.is_main:
            now = iter(lines)
            pairs = zip(requests, answered, strict=True)
            rows = [file.line(one) if file is not None and is_answered else next(now) for one, is_answered in pairs]
            replace_text(options.table, table_text(rows))
            logger.info("wrote %s", options.table)
        return failed


def requests_of(options: PredictArguments, about: Mapping[str, Any]) -> list[Request]:
    """The questions. Files, and records that ask nothing, are asked `--prompt`, or what training asked most often."""
    prompt = options.prompt or about.get("prompt") or DEFAULT_PROMPT
    before = "" if options.prompt else about.get("prompt_before_media", "")
    requests = read_requests(options.videos, prompt, options.root, options.columns, before, about.get("system"))
    requests = requests if options.temperature else with_labels(requests, about)
    silent = sum(not request.asks for request in requests)
    if silent and options.prompt is None:
        text = "%d of %d records ask nothing themselves: %r is asked; --prompt asks another"
        logger.info(text, silent, len(requests), prompt)
    return requests


def answer_requests(
    answerer: Answerer,
    requests: Sequence[Request],
    options: PredictArguments,
    file: AnswersFile | None,
    lines: list[Line],
) -> int:
    """Answer all questions and show each answer, or why there is none, as soon as it is known; returns how many have
    no answer. Every process must call it; the first one shows, and adds to `lines`."""
    is_main = answerer.world.is_main
    is_single = len(requests) == 1 and requests[0].segment_s is None
    texts = want_texts(requests)
    live = texts and is_single and file is None and not options.json_lines and sys.stdout.isatty() and is_main
    if file is not None and is_main:
        file.begin()
    reasons: Counter[str] = Counter()
    cut_off = 0
    answers = answerer.answers(
        [request.question for request in requests],
        options.sampling,
        options.batch_size,
        write=(lambda text: print(text, end="", flush=True)) if live else None,
        show_progress=file is not None or options.table is not None,
        texts=texts,
    )
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Failure):
            reasons[answer.reason] += 1
            answer = replace(answer, message=with_options(answer.message))
        else:
            cut_off += answer.is_cut_off
        if is_main:
            lines.append(prediction_line(request, answer))
            show(request, answer, options, file, live)
    if cut_off:
        limit = f"--max-new-tokens = {options.max_new_tokens}, or the end of the model's context"
        logger.info("%d of %d answers were cut off at %s", cut_off, len(requests), limit)
    failed = reasons.total()
    written = options.output or options.table
    if failed and written is not None and is_main:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        logger.error("%d of %d questions have no answer (%s): see %s", failed, len(requests), counts, written)
    return failed


def show(
    request: Request, answer: Answer | Failure, options: PredictArguments, file: AnswersFile | None, live: bool
) -> None:
    """Write one answer, or why there is none, to the file, or print it."""
    if file is not None:
        file.add(request, answer)
    elif options.table is not None:
        return
    elif isinstance(answer, Failure):
        logger.error("%s", answer.message)
    elif live:
        print(flush=True)  # the text stands there already
    elif options.json_lines:
        line = prediction_line(request, answer)
        if not request.is_record:
            del line["id"]
        print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        is_only = len(options.videos) == 1 and options.videos[0].is_file() and not request.is_record
        text = answer.text
        if answer.choice is not None:
            text = f"{answer.question.prompt.options[answer.choice]} ({max(answer.option_probabilities):.0%})"
        print(": ".join([*([] if is_only else [request.id]), *clock(request), text]), flush=True)


def with_options(message: str) -> str:
    """A message with this command's options in the place of a configuration's keys."""
    return renamed(message, OPTIONS)


def clock(request: Request) -> list[str]:
    """The segment in minutes and seconds; nothing for a question about the whole video."""
    if request.segment_s is None:
        return []
    times_s = [round(time_s, 1) for time_s in request.segment_s]
    return ["-".join(f"{int(time_s // 60):02d}:{time_s % 60:04.1f}".removesuffix(".0") for time_s in times_s)]
