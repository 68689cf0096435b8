"""When things happen: moments (a sentence to its spans) and dense captions (a video to timed sentences).

torchrun --nproc-per-node N -m vft.recipes.ground CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.errors import UserError
from vft.common.event_times import Event, EventForm, Span, read_events, write_events, write_moment
from vft.common.scores import Interval, Samples
from vft.common.task import Answer, answer_facts, samples_of, with_prompt
from vft.common.types import Conversation, MediaRef, Sample, Turn
from vft.metrics import Japanese, mean_interval, word_tokenizer
from vft.metrics.grounding import average_precision, dense_cider_d, moment_iou, soda, soda_c_scores
from vft.recipes.main import main

MOMENT_PROMPT = "Give the query: '{query}', when does the described content occur in the video?"
"""The question of Qwen2.5-VL's cookbook, as below."""
EVENTS_PROMPT = (
    "Localize a series of activity events in the video, output the start and end timestamp for each event, and "
    "describe each event with sentences. "
)
EVENTS_AS_JSON = "Provide the result in json format with 'mm:ss.ff' format for time depiction."
EVENTS_AS_LINES = "Give each event a line: 'start to end s: description'."
THRESHOLDS = (0.3, 0.5, 0.7)
Scored = tuple[Answer, list[Event], list[list[Event]]]
"""An answer, its events, and those of each right one."""


@dataclass(frozen=True)
class Ground:
    """Spans of a sentence, or all events of a video with theirs; scored by the overlap of spans."""

    prompt: str = EVENTS_PROMPT + EVENTS_AS_JSON
    japanese: Japanese = "char"
    coco: bool = False
    event_form: EventForm = "qwen2_5_vl"
    name = "ground"
    main_metric = "miou"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """A moment of the formats `moments`; or all segments of a record, then a moment for each; else the record as it
        is. `data.prompt` with `{query}` in it asks for moments, another one for events.

        A span must begin in the video, and may end after it: some of Charades-STA do.
        """
        spans, segments = sample.fields.get("spans"), sample.fields.get("segments")
        if isinstance(spans, tuple):
            return [self._moment(sample, sample.id, sample.fields["query"], spans)]
        if not isinstance(segments, tuple) or not segments:
            turns = with_prompt(sample.turns, self.prompt)
            return [Conversation(sample.id, turns, sample.origin, facts=answer_facts(sample))]
        own = self.prompt if "{query}" not in self.prompt else Ground.prompt
        if own == Ground.prompt and self.event_form == "seconds":
            own = EVENTS_PROMPT + EVENTS_AS_LINES
        turns = with_prompt(sample.turns[:-1], own)
        turns = (*turns, Turn("assistant", (write_events(segments, self.event_form),)))
        events = Conversation(sample.id, turns, sample.origin, spans_s=_starts([segments]))
        moments = [
            self._moment(sample, f"{sample.id}/{number}", text, (((start_s, end_s),),))
            for number, (start_s, end_s, text) in enumerate(segments, 1)
        ]
        return [events, *moments]

    def _moment(self, sample: Sample, name: str, query: str, spans: tuple[tuple[Span, ...], ...]) -> Conversation:
        """Learns the spans that most annotators gave. A question that is asked twice counts twice, as in the sets."""
        question = (self.prompt if "{query}" in self.prompt else MOMENT_PROMPT).replace("{query}", query)
        before = tuple(turn for turn in sample.turns[:-1] if turn.role == "system")
        media = tuple(part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef))
        answer = Turn("assistant", (write_moment(max(spans, key=spans.count), self.event_form),))
        turns = (*before, Turn("user", (*media, question)), answer)
        return Conversation(name, turns, sample.origin, facts={"spans": spans, "apart": name}, spans_s=_starts(spans))

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """For moments `miou`, recall at IoU 0.3, 0.5 and 0.7 of the first span (`r1@0.5`), and where some have several
        spans `map` (`vft.metrics.grounding`), all 0 to 1. For dense captions `soda_d`, 0 to 1, `dense_cider_d`, 0 to
        10, and with `coco` `soda_c`, 0 to 1. `no_time` is the fraction of answers that name no time. Answers to
        questions whose right answer names none are left out; UserError if there are no others.
        """
        scored = [(one, read_events(one.text), right) for one in answers if (right := _right_events(one))]
        if not scored:
            raise UserError(
                "no right answer names a time, such as 1.0 - 2.5 seconds; task = 'ground' needs some that do"
            )
        parts: dict[bool, list[Scored]] = {True: [], False: []}
        for each in scored:
            parts[any(text for events in each[2] for *_, text in events)].append(each)
        return {
            **(_moment_scores(parts[False]) if parts[False] else {}),
            **(self._dense_scores(parts[True]) if parts[True] else {}),
            "no_time": mean_interval([float(not found) for _, found, _ in scored], _samples(scored)),
        }

    def _dense_scores(self, scored: Sequence[Scored]) -> dict[str, Interval]:
        samples = samples_of([one for one, *_ in scored])
        found, right = [each[1] for each in scored], [each[2] for each in scored]
        words = [dense_cider_d(*each, self.japanese) for each in zip(found, right, strict=True)]
        texts = ([text for events in each for *_, text in events] for each in right)
        scores = {
            "soda_d": mean_interval([soda(*each) for each in zip(found, right, strict=True)], samples),
            "dense_cider_d": mean_interval(words, samples).cut_by(
                word_tokenizer(each, self.japanese) for each in texts
            ),
        }
        if self.coco:
            scores["soda_c"] = mean_interval(soda_c_scores(found, right), samples).cut_by(["PTB"])
        return scores


def _moment_scores(scored: Sequence[Scored]) -> dict[str, Interval]:
    spans = [(_spans(found), [_spans(events) for events in right]) for _, found, right in scored]
    overlaps = [moment_iou(*each) for each in spans]
    scores = {"miou": overlaps} | {f"r1@{least}": [float(one >= least) for one in overlaps] for least in THRESHOLDS}
    if any(len(one) > 1 for _, right in spans for one in right):
        scores["map"] = [average_precision(found, right[0]) for found, right in spans]
    return {name: mean_interval(each, _samples(scored)) for name, each in scores.items()}


def _samples(scored: Sequence[Scored]) -> Samples:
    return samples_of([one for one, *_ in scored])


def _right_events(answer: Answer) -> list[list[Event]]:
    """The events of each right answer: as the record has them, exactly, or as its text names them."""
    spans = answer.question.prompt.facts.get("spans")
    if isinstance(spans, tuple):
        return [[(*span, "") for span in one] for one in spans]
    return [events for text in answer.question.references if (events := read_events(text))]


def _spans(events: Sequence[Event]) -> list[Span]:
    return [(start_s, end_s) for start_s, end_s, _ in events]


def _starts(spans: Sequence[Sequence[Span | Event]]) -> tuple[Span, ...]:
    """What must lie in the video."""
    return tuple((one[0], one[0] + 0.01) for each in spans for one in each)


if __name__ == "__main__":
    main("ground")
