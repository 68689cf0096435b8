"""Make preference pairs of a model's own answers: vft pairs CONFIG.toml [--adapter DIR] [--samples 8] [key=value]

Each record that the configuration trains on is asked several times, with the video read once for all answers. The best
answer by a score of the task becomes the chosen one, the worst the rejected one. The file is one to train on, with
format = "messages" and an [objective] table; with --best-only it has the best answers alone, for supervised tuning.

Answers are kept in a file beside the pairs. The same command again resumes, and other ways to choose (--by, --min-gap,
--min-score, --with-reference, --best-only) ask nothing anew. Several processes share the questions:
torchrun --nproc-per-node 8 tools/pairs.py ...
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from vft.cli.arguments import AdapterFolder, ConfigArguments, JsonlFile, command
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.task import CLOSE, OPEN, Answer, Question, Task, samples_of
from vft.common.types import Conversation, MediaRef
from vft.config import run as configs
from vft.config.data import DataConfig
from vft.config.run import Config
from vft.config.toml import NonNegativeFloat, PositiveFloat
from vft.data.dataset import Dataset
from vft.data.formats.messages import PLACEHOLDER, SAMPLED, parse
from vft.data.media.timed_text import with_frame_times
from vft.data.records.preferences import REJECTED
from vft.data.records.record import RecordError
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, World, all_of, environment, make_mesh, process_group
from vft.inference.answers_file import AnswersFile, Line, answer_settings, as_text
from vft.inference.engine import Answerer, Failure
from vft.inference.evaluate import evaluation_config
from vft.inference.generate import Sampling
from vft.inference.requests import Request
from vft.metrics import sample_values
from vft.preparation.documents import load_asked, questions
from vft.preparation.memory import inference_shard
from vft.preparation.run import DTYPES, PreparedModel, load_for_inference, open_for_inference
from vft.recipes import task_of
from vft.training.export import adapter_folder

logger = logging.getLogger(__name__)

RIGHT = ("choice_accuracy_generated", "exact_match", "open_token_f1")
"""Scores of how right a generated answer is, the first of which that a question has ranks its answers."""


class PairsArguments(ConfigArguments):
    """Arguments of `vft pairs`."""

    adapter: AdapterFolder | None = None
    """folder of the LoRA adapter that answers, of its run or a checkpoint (default: model.adapter if it is set, else
    the base model alone)"""
    samples: Annotated[int, Field(ge=2)] = 8
    """answers to each question (default 8)"""
    temperature: PositiveFloat = 1.0
    """of sampling, above 0 (default 1)"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """probability mass to sample from, above 0 and at most 1 (default 1)"""
    seed: int = 0
    """of sampling (default 0)"""
    by: str | None = None
    """score that ranks answers, such as rouge_l (default: how right an answer is, or the main score of the task)"""
    min_gap: NonNegativeFloat = 0.0
    """least difference of score between both answers (default 0; equal scores are never a pair)"""
    min_score: NonNegativeFloat = 0.0
    """least score of a chosen answer (default 0; with --best-only 0 itself is not enough)"""
    with_reference: bool = False
    """choose the record's own answer where no sampled one is as good"""
    best_only: bool = False
    """write the best answers without rejected ones, for supervised tuning (rejection sampling)"""
    output: JsonlFile | None = None
    """JSONL file (default: OUTPUT_DIR/pairs.jsonl); all answers go to NAME.answers.jsonl beside it"""


class Candidate(NamedTuple):
    """An answer that may be chosen or rejected."""

    text: str
    """With its reasoning, as a record has it."""
    score: float


@command(PairsArguments, __doc__)
def main(arguments: PairsArguments) -> None:
    """Command line."""
    config = configs.load(arguments.config, arguments.overrides)
    adapter = arguments.adapter
    if adapter is None and config.model.adapter:
        adapter = adapter_folder(Path(config.model.adapter), "model.adapter")
    config, world = evaluation_config(config, adapter), environment()
    task, output = task_of(config), arguments.output or config.output_dir / "pairs.jsonl"
    if output.is_dir():
        raise UserError(f"--output = {str(output)!r}: is a folder; name a file, such as pairs.jsonl")
    precision, new_tokens = config.train.precision, config.eval.max_new_tokens
    prepared = open_for_inference(config.model, adapter, DTYPES[precision])
    sampling = Sampling(new_tokens, arguments.temperature, arguments.top_p, arguments.seed, arguments.samples)
    settings = answer_settings(config.model, adapter, prepared.pretrained, precision, sampling, config.data)
    data = load_asked(task, config, prepared.encoder(config.data))
    asked = questions(data.conversations)
    by = ranked_by(task, asked, arguments.by)
    file = AnswersFile(output.with_suffix(".answers.jsonl"), settings)
    if output.exists() and not file.path.exists():
        raise UserError(
            f"--output = {str(output)!r}: holds something else than pairs of this command; name another file"
        )
    requests = [as_request(one, config.data) for one in asked]
    answers = ask(prepared, config, data, requests, sampling, file, world)
    if not world.is_main:
        return
    answered = [(one, said) for one, said in zip(asked, answers, strict=True) if isinstance(said, Answer)]
    root = os.path.realpath(config.data.root)
    records, left_out, about = make_records(task, answered, by, arguments, settings, root)
    replace_text(output, "".join(map(as_text, records)))
    left_out |= {"unreadable": len(asked) - len(answered) + len(data.bad)}
    counts = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
    kind, total = "answers" if arguments.best_only else "pairs", len(asked) + len(data.bad)
    print(f"{output}: {len(records)} {kind} of {total} questions{f' ({counts})' if counts else ''}\n{about}")


def ranked_by(task: Task, asked: Sequence[Question], metric: str | None) -> list[str]:
    """The scores that rank answers; a question takes the first that it has.

    UserError if `metric` is not one that tells a right answer from an empty one.
    """
    right, empty = (
        task.score([unranked(Answer(one, text)) for one, text in zip(asked, texts, strict=True)])
        for texts in ([one.references[0] for one in asked], [""] * len(asked))
    )
    known = [name for name in right if sample_values(right[name]) != sample_values(empty.get(name, right[name]))]
    wanted = [metric] if metric else [name for name in (*RIGHT, task.main_metric) if name in known]
    if not {*wanted} & {*known}:
        raise UserError(
            f"--by = {metric or task.main_metric}: scores by which {task.name} ranks what is generated for these "
            f"questions are {', '.join(known) or 'none'}"
        )
    return wanted


def unranked(answer: Answer) -> Answer:
    """The answer with all options equally likely, so that what was generated makes the difference."""
    equal = (0.0,) * len(answer.question.prompt.options)
    return replace(answer, option_scores=equal, option_scores_norm=equal)


def as_request(question: Question, data: DataConfig) -> Request:
    """The question to ask, without its options, which need no scores; or why no record can hold its prompt."""
    prompt, root = replace(question.prompt, options=()), os.path.realpath(data.root)
    try:
        back = replace(prompt, turns=parse(record_of(prompt, root, "."), data.root).turns[:-1])
        back = with_frame_times(back) if data.video.timestamps else back
        if back.content(root) != prompt.content(root):  # it has subtitles, or a frame folder of links
            raise RecordError("messages", "can't hold this prompt; set subtitles = false, or name each frame")
    except RecordError as error:
        return Request(question.id, Failure(prompt.origin, "record", str(error.at(prompt.origin))))
    return Request(question.id, replace(question, prompt=prompt))


def record_of(prompt: Conversation, root: str, answer: str) -> Line:
    """A record of the format `messages`, with media below the folder `root` (a real path) and their own options. Times
    of frames are left out: training adds them."""
    turns: list[Line] = []
    for turn in prompt.turns:
        parts = [part_of(part, root) for part in turn.parts if isinstance(part, str | MediaRef)]
        is_plain = all(part["type"] == "text" for part in parts) and not PLACEHOLDER.search(turn.text)
        turns.append({"role": turn.role, "content": turn.text if is_plain else parts})
    return {"id": prompt.id, "messages": [*turns, {"role": "assistant", "content": answer}]}


def part_of(part: str | MediaRef, root: str) -> Line:
    """A typed part of a message."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    files = [os.path.relpath(file, root) for file in part.files]
    file = os.path.dirname(files[0]) or "." if part.is_folder else files if part.is_list else files[0]
    given = {name: value for name, value in asdict(part.options).items() if value is not None}
    options = {name: [*value] if isinstance(value, tuple) else value for name, value in given.items()}
    return {"type": part.kind, part.kind: file, **options}


def ask(
    prepared: PreparedModel,
    config: Config,
    data: Dataset,
    requests: Sequence[Request],
    sampling: Sampling,
    file: AnswersFile,
    world: World,
) -> list[Answer | Failure]:
    """An answer to each question, with the other samples beside it, or why there is none. Every process must call it;
    the first one keeps the file, from which answers of an earlier run come, and alone gets the answers."""
    workers = WorkerPool(config.data.workers, config.data.decode_timeout_s)
    with process_group(world, alone=config.parallel.offload != "none"), workers as pool:
        known = all_of([file.has(request) for request in requests])[0]
        left = [request for request, is_known in zip(requests, known, strict=True) if not is_known]
        if len(left) < len(requests):
            logger.info("%s: %d of %d answered before", file.path, len(requests) - len(left), len(requests))
        found: list[Answer | Failure] = []
        if left:
            mesh = make_mesh(world, inference_shard(config.parallel, prepared.model, world))
            load_for_inference(prepared, world.device, mesh, config.parallel)
            parallel = DataParallel.of(mesh)
            answerer = Answerer(prepared.model, data.encoder, config.data, data.info, pool, world, parallel)
            if world.is_main:
                file.begin()
            answers = answerer.answers([request.question for request in left], sampling, config.eval.batch_size)
            for request, answer in zip(left, answers, strict=True):
                found.append(answer)
                if world.is_main:
                    file.add(request, answer)
    if failures := [one for one in found if isinstance(one, Failure)]:
        logger.warning("%d of %d questions cannot be asked: %s", len(failures), len(requests), failures[0].message)
    fresh = iter(found)
    both = zip(requests, known, strict=True)
    return [file.answer(one) if is_known else next(fresh) for one, is_known in both] if world.is_main else []


def candidates_of(task: Task, said: Sequence[Sequence[Answer]], by: Sequence[str]) -> list[list[Candidate]]:
    """For each question its answers with their scores, without those that are cut off, empty or have none."""
    found: list[list[Candidate]] = [[] for _ in said]
    for answers in zip(*said, strict=True):
        scores = task.score([unranked(one) for one in answers])
        values = [sample_values(scores[name]) for name in by if name in scores]
        for own, answer, name in zip(found, answers, samples_of(answers).names, strict=True):
            score = next((value[name] for value in values if name in value), None)
            if score is not None and answer.text.strip() and not answer.is_cut_off:
                thought = f"{OPEN}\n{answer.reasoning}\n{CLOSE}\n\n" if answer.reasoning else ""
                own.append(Candidate(thought + answer.text, score))
    return found


def choose(
    sampled: Sequence[Candidate], references: Sequence[Candidate], options: PairsArguments
) -> tuple[Candidate, Candidate] | str:
    """The chosen and the rejected answer, the first of equals; or what the answers are if there are none."""
    if not sampled:
        return "cut off, empty or without this score"
    best = max([*sampled, *(references if options.with_reference else ())], key=lambda one: one.score)
    worst = min(sampled, key=lambda one: one.score)
    if best.score < options.min_score or (options.best_only and not best.score):
        return "too low"
    gap = best.score - worst.score
    if not options.best_only and (not gap or gap < options.min_gap):
        return "with equal scores, or nearly"
    return best, worst


def make_records(
    task: Task,
    answered: Sequence[tuple[Question, Answer]],
    by: Sequence[str],
    options: PairsArguments,
    settings: Mapping[str, Any],
    root: str,
) -> tuple[list[Line], Counter[str], str]:
    """Records of pairs, or of best answers, with media below the folder `root` (a real path); how many questions are
    left out, by what their answers are; and a line about all answers."""
    said = [[replace(one, question=question) for one in (answer, *answer.others)] for question, answer in answered]
    references = candidates_of(task, [[Answer(one, one.references[0])] for one, _ in answered], by)
    records: list[Line] = []
    left_out = Counter[str]()
    given = {name: settings[name] for name in ("model", "adapter", "weights", "seed")}
    seen: list[tuple[float, ...]] = []
    for (question, _), own, reference in zip(answered, candidates_of(task, said, by), references, strict=True):
        distinct = len({one.text.strip() for one in own})
        if scores := [one.score for one in own]:
            seen.append((max(scores), fmean(scores), min(scores), distinct))
        pair = choose(own, reference, options)
        if isinstance(pair, str):
            left_out[pair] += 1
            continue
        chosen, rejected = pair
        record = record_of(question.prompt, root, chosen.text)
        record |= {} if options.best_only else {REJECTED: rejected.text}
        about = {"chosen": chosen.score, "rejected": rejected.score, "distinct": distinct}
        records.append({**record, SAMPLED: about | given})
    best, mean, worst, differ = (f"{fmean(column):.3g}" for column in zip(*seen or [(0, 0, 0, 0)], strict=True))
    text = f"{', '.join(by)} of a question's answers: best {best}, mean {mean}, worst {worst}"
    return records, left_out, f"{text}; {differ} of {options.samples} differ"
