"""A video that a record gives as pictures: all are shown, at the times that it states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.tiny import Media, Tiny, document, talk
from vft.common.types import Conversation, MediaInfo, MediaOptions, MediaPlan, MediaRef
from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.data import formats as sources
from vft.data.budget import limits_of, plan_media
from vft.data.dataset import Dataset, load_dataset, make_dataset
from vft.data.media.patches import frames_of, load_patches
from vft.data.media.timed_text import FrameTimes
from vft.data.media.video import join_scans, scan
from vft.inference.requests import data_config
from vft.models.llava_next_video.processor import LlavaProcessor
from vft.models.processor import VisionProcessor
from vft.models.qwen2_5_vl.processor import Qwen2_5Processor
from vft.models.qwen3_vl.processor import Qwen3Processor

QWEN = Qwen2_5Processor(image_token=1, video_token=2, tokens_per_second=2.0)
QWEN3 = Qwen3Processor(image_token=1, video_token=2, table_side=48)
LLAVA = LlavaProcessor(image_token=1, video_token=2, patch=14, side=336, stride=2, resolutions=((336, 672),))
SPECS = pytest.mark.parametrize("processor", [QWEN, QWEN3, LLAVA], ids=["qwen2_5_vl", "qwen3_vl", "llava_next_video"])
VIDEO_SETTINGS = [{}, {"fps": 0.5}, {"fps": 30.0}, {"frames": 2}, {"frames": 3}, {"max_frames": 4}, {"min_frames": 30}]


def plan(processor: VisionProcessor, count: int, folder: bool = False, video: Any = None, **options: Any) -> MediaPlan:
    """Of so many pictures."""
    paths = tuple(Path(f"{i}.jpg") for i in range(count))
    ref = MediaRef("video", paths, MediaOptions(**options), is_folder=folder)
    info = join_scans(ref, [MediaInfo("image", 112, 168)] * count)
    return processor.plan(ref, info, limits_of(ref, DataConfig(video=VideoConfig(**video or {}))))


@SPECS
@pytest.mark.parametrize("video", VIDEO_SETTINGS, ids=str)
@pytest.mark.parametrize("options", [{}, {"sample_fps": 8.0}, {"sample_fps": 0.1}, {"fps": 0.25}, {"min_frames": 9}])
def test_every_picture_is_shown(processor: VisionProcessor, video: dict[str, Any], options: dict[str, Any]) -> None:
    """Whatever the settings ask of files; the count is not the rate's."""
    for count in (1, 2, 3, 7, 16, 33, 100):
        made = plan(processor, count, video=video, **options)
        assert made.frame_indices == tuple(range(count))
        assert made.grid_thw[0] == -(-count // processor.temporal)
        rate = options.get("sample_fps") or options.get("fps") or 2.0
        assert made.seconds_per_grid == pytest.approx(processor.temporal / rate)
        assert made.frame_times_s == pytest.approx([i / rate for i in range(count)])


@SPECS
@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"nframes": 4}, (0, 5, 10, 15)),
        ({"max_frames": 4}, (0, 5, 10, 15)),
        ({"sample_fps": 8.0, "fps": 2.0}, (0, 5, 10, 15)),
        ({"timestamps": tuple(i / 8 for i in range(16)), "fps": 2.0}, (0, 5, 10, 15)),
        ({"sample_fps": 8.0, "fps": 8.0}, tuple(range(16))),
        ({"sample_fps": 8.0, "fps": 30.0}, tuple(range(16))),
        ({"sample_fps": 8.0, "video_start": 1.0}, tuple(range(8, 16))),
    ],
)
def test_a_record_may_ask_for_fewer(
    processor: VisionProcessor, options: dict[str, Any], indices: tuple[int, ...]
) -> None:
    assert plan(processor, 16, **options).frame_indices == indices


@SPECS
def test_a_folder_of_frames_is_sampled_as_a_file(processor: VisionProcessor) -> None:
    """The record names no picture there: at 2 fps, as LLaVA-Video takes them, an odd one not left out."""
    assert plan(processor, 7, folder=True).frame_indices == tuple(range(7))
    assert plan(processor, 40, folder=True).frame_indices[-1] == 39
    assert len(plan(processor, 40, folder=True).frame_indices) == 32
    assert plan(processor, 40, folder=True, video={"frames": 4}).frame_indices == (0, 13, 26, 39)
    assert len(plan(processor, 40, folder=True, video={"fps": 1.0}).frame_indices) == 20


@SPECS
def test_a_setting_samples_lists_too(processor: VisionProcessor) -> None:
    video = {"sample_lists": True}
    assert len(plan(processor, 40, video=video).frame_indices) == 32
    assert plan(processor, 40, video={**video, "frames": 4}).frame_indices == (0, 13, 26, 39)
    assert len(plan(processor, 40, video={**video, "fps": 1.0}, sample_fps=4.0).frame_indices) == 10


def test_frames_asked_of_predict_hold_for_lists_too() -> None:
    for option, value, count in (("max_frames", 4, 4), ("frames", 6, 6), ("fps", 1.0, 8), ("max_pixels", 7_000, 16)):
        video = data_config({}, {option: value}).video.model_dump(exclude_none=True)
        assert len(plan(QWEN, 16, video=video).frame_indices) == count, option


def test_times_of_their_own_reach_the_positions() -> None:
    """Two positions a second. Of a pair the first one's time counts; frames that are left out take theirs with them."""
    even, uneven = (plan(QWEN, 6, timestamps=times) for times in ((0, 1, 2, 3, 4, 5), (10, 10.5, 12, 13, 30, 31)))
    assert QWEN.run_times(even).tolist() == QWEN.run_times(plan(QWEN, 6, sample_fps=1.0)).tolist() == [0, 4, 8]
    assert even.seconds_per_grid == 2.0 and even.info.duration_s == 6.0
    assert QWEN.run_times(uneven).tolist() == [0, 4, 40]
    assert uneven.frame_times_s == (10, 10.5, 12, 13, 30, 31) and uneven.seconds_per_grid == pytest.approx(2 * 21 / 5)
    fewer = plan(QWEN, 6, timestamps=(0, 1, 2, 3, 30, 31), nframes=4)
    assert fewer.frame_indices == (0, 2, 3, 5) and QWEN.run_times(fewer).tolist() == [0, 6]


def test_times_of_their_own_reach_qwen3s_text() -> None:
    """Halfway through each pair; the one that is repeated stands at its own time."""
    made = plan(QWEN3, 3, timestamps=(0.0, 1.5, 4.0))
    assert QWEN3.lead(made) == "<0.8 seconds>"  # 0.75
    assert QWEN3.expand(made)[1] == "<|vision_end|><4.0 seconds><|vision_start|>"


@SPECS
def test_times_of_their_own_reach_the_line_of_times(processor: VisionProcessor) -> None:
    made = plan(processor, 3, timestamps=(0.0, 1.5, 4.0))
    assert FrameTimes(0).resolve([made]) == "A video of 6.0 s, seen at 0.0, 1.5, 4.0 s:\n"


def test_pictures_of_one_moment() -> None:
    """Times rounded to whole seconds, and a range in which all are equal."""
    made = plan(QWEN, 4, timestamps=(0.0, 0.0, 1.0, 1.0))
    assert made.frame_indices == (0, 1, 2, 3) and QWEN.run_times(made).tolist() == [0, 2]
    assert plan(QWEN, 4, timestamps=(0.0, 0.0, 1.0, 1.0), video_end=0.5).frame_indices == (0, 1)


# ------------------------------------------------------------------------------------------ in all formats of records


def frames_in(folder: Path, count: int) -> list[str]:
    """Names of pictures that say by their grey which they are."""
    names = [f"{folder.name}/{i}.png" for i in range(count)]
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (56, 56), (20 * i,) * 3).save(folder.parent / name)
    return names


ASKED, SAID = {"role": "user", "content": "<video>When?"}, {"role": "assistant", "content": "Late."}
LLAVA_TURNS = [{"from": "human", "value": "<image>\nWhen?"}, {"from": "gpt", "value": "Late."}]
SHORT_TALK = {"messages": [{"role": "user", "content": "When?"}, SAID]}
TIMES = {"timestamps": [0, 1, 2, 3, 4, 8, 9]}
FORMATS = {
    "typed part": lambda names: {
        "messages": [{"role": "user", "content": [{"type": "video", "video": names, **TIMES}]}, SAID]
    },
    "list of videos": lambda names: {"messages": [ASKED, SAID], "videos": [names], **TIMES},
    "one video": lambda names: {"messages": [ASKED, SAID], "video": names, **TIMES},
    "sharegpt": lambda names: {
        "conversations": [{"from": "human", "value": "<video>When?"}, LLAVA_TURNS[1]],
        "videos": [names],
        **TIMES,
    },
    "llava": lambda names: {"conversations": LLAVA_TURNS, "video": names, **TIMES},
    "question": lambda names: {"question": "When?", "answer": "Late.", "video": names, **TIMES},
    "llava_video": lambda names: {"conversations": LLAVA_TURNS, "video": str(Path(names[0]).parent), **TIMES},
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_seven_are_seen_whatever_the_record(tmp_path: Path, tiny: Tiny, name: str) -> None:
    """From the record to the patches: seven pictures, the last one twice, at positions by their own times."""
    record = FORMATS[name](frames_in(tmp_path / "frames", 7))
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    source = SourceConfig(format="llava_video" if name == "llava_video" else "messages", path="train.jsonl")
    samples, bad = sources.read(source, DataConfig(root=tmp_path))
    assert not bad
    (ref,) = (part for turn in samples[0].turns for part in turn.parts if isinstance(part, MediaRef))
    config = DataConfig(video=VideoConfig(max_frames=8, max_pixels=56 * 56))
    (made,) = plan_media([(ref, scan(ref), limits_of(ref, config))], QWEN, "train.jsonl:1").plans
    patches = load_patches(made, QWEN)
    frames = frames_of(patches.pixels_PD, made, QWEN)
    assert frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100, 120, 120]
    assert QWEN.run_times(made).tolist() == [0, 4, 8, 18]
    encoded = document(
        tiny.encoder, [talk(("user", [ref, "When?"]), ("assistant", "Late."))], Media((made,), (patches,))
    )
    rows = encoded.positions_3T[0][encoded.media_mask_T].view(4, -1)
    assert (rows - rows[0, 0]).tolist() == [[time] * 4 for time in (0, 4, 8, 18)]


def test_a_row_too_short_for_them_takes_frames_and_says_so(tiny: Tiny) -> None:
    """16 pictures of 4 tokens a pair, and 20 tokens too few for all of them: six less."""
    ref = MediaRef("video", tuple(Path(f"{i}.png") for i in range(16)), MediaOptions(sample_fps=1.0))
    asked = talk(("user", [ref, "When?"]), ("assistant", "Late."))
    info = join_scans(ref, [MediaInfo("image", 56, 56)] * 16)

    def documents(pack_tokens: int) -> Dataset:
        return make_dataset([asked], tiny.encoder, DataConfig(pack_tokens=pack_tokens), lambda _: info)

    whole = documents(1000)
    assert whole.num_shortened == 0 and len(whole.build(0).media[0].frame_indices) == 16
    short = documents(whole.lengths[0] - 12)
    kept = short.build(0).media[0]
    assert short.num_shortened == 1 and len(kept.frame_indices) == 10
    assert (kept.frame_indices[0], kept.frame_indices[-1]) == (0, 15)
    assert kept.seconds_per_grid == pytest.approx(2 / (10 / 16))


def test_what_a_row_costs_is_told(tmp_path: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """Once for all sources, with both numbers; nothing where all fits."""
    lines = [json.dumps(FORMATS["one video"](frames_in(tmp_path / "frames", 7))), json.dumps(SHORT_TALK)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    caplog.set_level("INFO")
    for pack_tokens, told in ((1000, ""), (45, "train.jsonl: 1 of 2 samples have fewer frames or pixels than asked")):
        config = DataConfig(root=tmp_path, workers=0, cache_dir=str(tmp_path / "cache"), pack_tokens=pack_tokens)
        source = SourceConfig(format="messages", path="train.jsonl")
        load_dataset(config, [source], lambda s: [Conversation(s.id, s.turns, s.origin)], tiny.encoder, 0)
        messages = [message for message in caplog.messages if "fewer frames" in message]
        assert len(messages) == bool(told) and all(line.startswith(told) and "45" in line for line in messages)
        caplog.clear()
