"""Text that depends on the frames: times of frames and subtitles, and the frames that leave room for both.

What is planned is compared with every smaller or larger choice of frames, and what is written with the planned frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.tiny import Media, Tiny, document, medium, plans_that_fit, talk
from vft.common.errors import UserError
from vft.common.types import IGNORE_INDEX, Conversation, Document, MediaInfo, MediaPlan, Sample, Turn
from vft.config.data import DataConfig, VideoConfig
from vft.data.dataset import converse, make_dataset
from vft.data.media.timed_text import HEADING, FrameTimes, Subtitles, with_frame_times
from vft.inference.requests import user_question

LONG, LONG_INFO = medium("video", 240, 140, 140, fps=24.0, name="long")
SHORT, SHORT_INFO = medium("video", 6, 84, 84, fps=1.0, name="short")
PICTURE, PICTURE_INFO = medium("image", 1, 56, 56, name="picture")
UNEVEN_INFO = replace(SHORT_INFO, times_s=(0.0, 0.04, 0.5, 1.25, 7.0, 12.36), duration_s=13.0)
INFOS = {LONG.path: LONG_INFO, SHORT.path: SHORT_INFO, PICTURE.path: PICTURE_INFO}
LINES = tuple((i * 0.5, i * 0.5 + 0.4, f"Line {i} of what is said.") for i in range(20))
LONG_TIMES = re.compile(r"A video of 10\.0 s, seen at (.*) s:\n")


def config_of(pack_tokens: int, timestamps: bool = False, **settings: Any) -> DataConfig:
    video = VideoConfig(fps=2.0, min_frames=4, max_frames=20, max_pixels=140 * 140, timestamps=timestamps)
    return DataConfig(pack_tokens=pack_tokens, video=video, **settings)


def info_of(ref: Any) -> MediaInfo:
    return INFOS[ref.path]


def told(tiny: Tiny, made: Document, branch: int = 0) -> str:
    """The text of a branch with its trunk, media left out."""
    rows = torch.zeros(made.num_tokens, dtype=torch.bool)
    rows[: made.prefix_length] = True
    rows[made.suffix_rows[branch]] = True
    return tiny.encoder.tokenizer.decode(made.ids_T[rows & ~made.media_mask_T], skip_special_tokens=False)


def times_line(plan: MediaPlan) -> str:
    times = ", ".join(f"{index / 24:.1f}" for index in plan.frame_indices)
    return f"A video of 10.0 s, seen at {times} s:\n"


# ------------------------------------------------------------------------------------------- what is written of them


def test_times_are_those_of_the_planned_frames(tiny: Tiny) -> None:
    """Frame i of a constant rate is at i / fps, of a varying one where its own time says; rounded to a tenth."""
    processor = tiny.encoder.processor
    plans = Media.make(processor, [(PICTURE, PICTURE_INFO), (LONG, LONG_INFO), (SHORT, UNEVEN_INFO)], frames=5).plans
    assert plans[1].frame_indices == (0, 60, 120, 179, 239)
    assert FrameTimes(1).resolve(plans) == "A video of 10.0 s, seen at 0.0, 2.5, 5.0, 7.5, 10.0 s:\n"
    # Equal times, not equal numbers, and of each the frame that is on screen: 0, 3.09, 6.18, 9.27 and 12.36 s.
    assert FrameTimes(2).resolve(plans) == "A video of 13.0 s, seen at 0.0, 1.2, 1.2, 7.0, 12.4 s:\n"


def test_a_line_before_each_video_and_none_before_a_picture() -> None:
    """Counted over all media of the conversation, in whichever turn they stand."""
    asked = talk(
        ("user", ["One ", PICTURE, " two ", LONG]), ("assistant", "x"), ("user", [SHORT, LONG, "?"]), ("assistant", "y")
    )
    made = with_frame_times(asked)
    assert made.turns[0].parts == ("One ", PICTURE, " two ", FrameTimes(1), LONG)
    assert made.turns[2].parts == (FrameTimes(2), SHORT, FrameTimes(3), LONG, "?")
    assert (made.turns[1], made.turns[3]) == (asked.turns[1], asked.turns[3])
    assert made.media_key == asked.media_key and [turn.text for turn in made.turns] == [t.text for t in asked.turns]


def test_only_where_it_is_asked_for() -> None:
    """`data.video.timestamps`."""
    sample = Sample("s", (Turn("user", (LONG, "?")), Turn("assistant", ("x",))), "s")

    def make(one: Sample) -> list[Conversation]:
        return [Conversation(one.id, one.turns, one.origin)]

    for timestamps in (False, True):
        (made,), bad = converse(sample, make, config_of(100, timestamps))
        assert not bad and (FrameTimes(0) in made.turns[0].parts) == timestamps


@pytest.mark.parametrize("frames", [2, 4, 20])
def test_subtitles_are_those_of_the_planned_frames(tiny: Tiny, frames: int) -> None:
    """A line for each frame that is taken within its time, and no line between two frames."""
    plans = Media.make(tiny.encoder.processor, [(PICTURE, PICTURE_INFO), (LONG, LONG_INFO)], frames=frames).plans
    times_s = [index / 24 for index in plans[1].frame_indices]
    seen = [text for start, end, text in LINES if any(start <= time_s < end for time_s in times_s)]
    assert 0 < len(seen) < len(LINES)
    assert Subtitles(LINES, media=1).resolve(plans) == "\n".join([HEADING, *seen, ""])


# ------------------------------------------------------------------------------------------------ the room for both


def records() -> dict[str, list[Conversation]]:
    """Conversations about one video with text that depends on its frames."""
    plain = talk(("user", [LONG, "What happens in the video?"]), ("assistant", "A dog runs."), id="plain")
    subtitled = replace(plain, turns=(Turn("user", (LONG, Subtitles(LINES), "What is said?")), plain.turns[1]))
    two = talk(("user", [LONG, SHORT, "Same?"]), ("assistant", "No."), ("user", "Sure?"), ("assistant", "Yes."))
    asked = [
        talk(("user", [LONG, f"What is {i}?"]), ("assistant", f"It is {i}." * (i + 1)), id=f"q{i}") for i in range(3)
    ]
    return {
        "times": [with_frame_times(plain)],
        "subtitles": [subtitled],
        "times and subtitles": [with_frame_times(subtitled)],
        "two videos": [with_frame_times(two)],
        "several questions": [with_frame_times(one) for one in asked],
    }


RECORDS = records()


def tokens_of(tiny: Tiny, conversations: Sequence[Conversation], plans: Sequence[MediaPlan]) -> int:
    """Of the longest of these alone, counted on the row itself."""
    settled = [one.resolved(plans) for one in conversations]
    return max(document(tiny.encoder, [one], Media(tuple(plans), ())).num_tokens for one in settled)


@pytest.mark.parametrize("name", RECORDS)
def test_rows_keep_within_their_tokens(tiny: Tiny, name: str) -> None:
    """From far too few tokens to more than enough: a row that fits and holds all its text, or a record refused."""
    conversations = RECORDS[name]
    refused, kept, frames = [], [], []
    for pack_tokens in [1, *range(20, 1000, 23), 5000]:
        documents = make_dataset(conversations, tiny.encoder, config_of(pack_tokens), info_of)
        if documents.bad:
            assert not documents.documents and {item.reason for item in documents.bad} == {"unfit"}
            for item in documents.bad:
                assert "data.pack_tokens" in item.message and len(item.message.splitlines()) == 1
            refused.append(pack_tokens)
            continue
        kept.append(pack_tokens)
        for number, planned in enumerate(documents.documents):
            made = documents.build(number)
            assert made.num_tokens == documents.lengths[number] <= pack_tokens
            assert_same_document(made, documents.build(number))
            for branch, one in enumerate(planned.conversations):
                assert_whole_text(tiny, told(tiny, made, branch), one, made.media)
        frames.append(len(made.media[0].frame_indices))
    assert refused and kept and max(refused) < min(kept)
    assert frames[0] == 4 and frames[-1] == 20
    # Where there are several questions, some frames may be given up to have them behind one video.
    assert frames == sorted(frames) or len(conversations) > 1


def assert_same_document(one: Document, other: Document) -> None:
    assert one.media == other.media and one.suffix_lengths == other.suffix_lengths
    for name in ("ids_T", "labels_T", "positions_3T", "media_mask_T"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def assert_whole_text(tiny: Tiny, text: str, conversation: Conversation, plans: Sequence[MediaPlan]) -> None:
    """Every word of the conversation, and of the lines that belong to the planned frames, in their order."""
    at = 0
    for turn in conversation.turns:
        for part in turn.parts:
            if isinstance(part, str | FrameTimes | Subtitles):
                wanted = part if isinstance(part, str) else part.resolve(plans)
                assert wanted in text[at:], (wanted, text)
                at = text.index(wanted, at) + len(wanted)
    if found := LONG_TIMES.search(text):
        assert found[0] == times_line(plans[0])


@pytest.mark.parametrize("name", ["times", "subtitles", "times and subtitles", "several questions"])
def test_no_more_frames_are_given_up_than_needed(tiny: Tiny, name: str) -> None:
    """Two frames more would not fit with their text; a record is refused only where four small frames don't fit."""
    conversations = RECORDS[name]
    limits = VideoConfig(frames=4, min_frames=4, max_pixels=140 * 140)
    smallest = VideoConfig(frames=4, min_frames=4, min_pixels=1, max_pixels=28 * 28)

    def planned(video: VideoConfig) -> tuple[MediaPlan, ...]:
        config = DataConfig(pack_tokens=100_000, video=video)
        return plans_that_fit(conversations, tiny.encoder, config, info_of)

    least = tokens_of(tiny, conversations, planned(smallest))
    needed = {
        count: tokens_of(tiny, conversations, planned(limits.model_copy(update={"frames": count})))
        for count in range(4, 21, 2)
    }
    assert sorted(needed.values()) == list(needed.values())
    for pack_tokens in sorted({least - 1, least, *needed.values(), *(n - 1 for n in needed.values()), 5000}):
        if pack_tokens < least:
            with pytest.raises(UserError, match=r"data\.pack_tokens"):
                plans_that_fit(conversations, tiny.encoder, config_of(pack_tokens), info_of)
            continue
        plans = plans_that_fit(conversations, tiny.encoder, config_of(pack_tokens), info_of)
        most = max((count for count, tokens in needed.items() if tokens <= pack_tokens), default=4)
        assert len(plans[0].frame_indices) == most, pack_tokens


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_refused_is_counted(tiny: Tiny, name: str) -> None:
    """The message names the record and its tokens at the smallest size: with as many in a row it is taken."""
    for pack_tokens in (60, 80, 100, 120):
        with pytest.raises(UserError) as caught:
            plans_that_fit(RECORDS[name], tiny.encoder, config_of(pack_tokens), info_of)
        message = str(caught.value)
        assert message.startswith(f"{RECORDS[name][0].origin}: ") and "data.pack_tokens" in message
        counted = re.search(r"(\d+) tokens with the fewest and smallest frames", message)
        if counted:
            assert message.endswith(f"data.pack_tokens = {pack_tokens}; raise it or shorten the text")
            plans_that_fit(RECORDS[name], tiny.encoder, config_of(int(counted[1])), info_of)
            with pytest.raises(UserError):
                plans_that_fit(RECORDS[name], tiny.encoder, config_of(int(counted[1]) - 1), info_of)
            return
    raise AssertionError("no record was too long by the text of its frames")


def test_prompts_leave_room_for_nothing_more_than_the_question(tiny: Tiny) -> None:
    """For a question to answer, `fit` counts up to where the answer begins."""
    prompt = with_frame_times(user_question("q", [LONG], "What happens?").prompt)
    plans = plans_that_fit([prompt], tiny.encoder, config_of(200), info_of, answer_next=True)
    made = tiny.encoder.document([prompt.resolved(plans)], plans, answer_next=True)
    assert made.num_tokens <= 200 and times_line(plans[0]) in told(tiny, made)
    assert bool((made.labels_T == IGNORE_INDEX).all())


# --------------------------------------------------------------------------------------------------- shared trunks


@pytest.mark.parametrize("pack_tokens", [280, 320, 5000])
def test_branches_share_the_trunk_with_timestamps(tiny: Tiny, pack_tokens: int) -> None:
    """The times stand before the video, once, in the trunk; each question reads them as if it were alone."""
    config = config_of(pack_tokens, share_videos=True, frames_for_sharing=0.5)
    documents = make_dataset(RECORDS["several questions"], tiny.encoder, config, info_of)
    shared = documents.documents[0].conversations
    assert len(shared) > 1 and max(documents.lengths) <= pack_tokens
    made = documents.build(0)
    trunk = slice(0, made.prefix_length)
    text = tiny.encoder.tokenizer.decode(made.ids_T[trunk][~made.media_mask_T[trunk]])
    assert times_line(made.media[0]) in text
    assert (len(made.media[0].frame_indices) == 20) == (pack_tokens == 5000)
    for branch, one in enumerate(shared):
        alone = document(tiny.encoder, [one.resolved(made.media)], Media(made.media, ()))
        assert told(tiny, made, branch) == told(tiny, alone)
        assert told(tiny, made, branch).count("seen at") == 1


def test_branches_share_the_trunk_with_subtitles(tiny: Tiny) -> None:
    """They stand behind the video, so each branch has its own; the video is there once."""
    (one,) = RECORDS["times and subtitles"]
    asked = [
        replace(one, id=f"q{i}", turns=(Turn("user", (*one.turns[0].parts, f" {i}?")), one.turns[1])) for i in (1, 2)
    ]
    documents = make_dataset(asked, tiny.encoder, config_of(2000), info_of)
    made = documents.build(0)
    assert len(documents.documents) == 1 and len(made.suffix_lengths) == 2 and len(made.media) == 1
    assert made.num_tokens == documents.lengths[0]
    for branch, conversation in enumerate(asked):
        assert_whole_text(tiny, told(tiny, made, branch), conversation, made.media)
        assert told(tiny, made, branch).count(HEADING) == 1
