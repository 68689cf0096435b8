"""predict asks a clip or a record exactly as training showed it: ids up to the answer, frames, sizes and pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchcodec.encoders import VideoEncoder

from tests.helpers.tiny import CPU, Tiny
from vft.common.task import Question
from vft.config.data import DataConfig
from vft.data.dataset import Dataset, describe_prompts, load_dataset, prompts_of
from vft.data.media.timed_text import with_frame_times
from vft.data.media.video import scan
from vft.data.workers import WorkerPool
from vft.distributed.process_group import World
from vft.inference.engine import Answerer
from vft.inference.requests import data_config, read_requests
from vft.recipes.qa import QuestionAnswering

SYSTEM = "You watch carefully."
ASKED = [("Look: ", "\nWhat is shown?")] * 2 + [("", "How long?")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three records about two clips of ten frames a second."""
    for name, frames in (("long", 200), ("short", 13)):
        shades = torch.linspace(0, 255, frames).to(torch.uint8)
        VideoEncoder(shades[:, None, None, None].expand(frames, 3, 90, 160), frame_rate=10).to_file(
            tmp_path / f"{name}.mp4"
        )
    records = []
    for number, (before, behind) in enumerate(ASKED):
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{before}<video>{behind}"}]
        answer = {"role": "assistant", "content": f"It is {number}."}
        records.append({"messages": [*turns, answer], "videos": ["long.mp4" if number else "short.mp4"]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def trained(tiny: Tiny, root: Path, **settings: Any) -> tuple[Dataset, dict[str, Any]]:
    """The documents of a training, and what is recorded of it."""
    sources = [{"format": "messages", "path": "train.jsonl"}]
    config = DataConfig.model_validate(
        {"root": str(root), "sources": sources, "workers": 0, "cache_dir": str(root / "cache"), **settings}
    )
    documents = load_dataset(config, config.sources, QuestionAnswering().conversations, tiny.encoder, 0)
    asked = describe_prompts(prompts_of(documents.conversations))
    limits = {"video": config.video.model_dump(mode="json", exclude_none=True), "pack_tokens": config.pack_tokens}
    return documents, json.loads(json.dumps({**asked, **limits}))


@pytest.mark.parametrize(
    "settings",
    [
        {"video": {"frames": 8, "max_pixels": 56 * 84}},
        {"video": {"fps": 3.0, "min_frames": 6, "max_frames": 20, "timestamps": True}},
    ],
)
def test_clips_and_records_are_seen_as_in_training(tiny: Tiny, root: Path, settings: dict[str, Any]) -> None:
    documents, about = trained(tiny, root, share_videos=False, **settings)
    assert (about["prompt_before_media"], about["prompt"], about["other_prompts"]) == (*ASKED[0], 1)
    assert about["labels"] == []
    assert (about["system"], about["other_systems"]) == (SYSTEM, 0) and about["prompt_share"] == pytest.approx(2 / 3)
    config = data_config(about, {})
    clips = [root / "short.mp4", root / "long.mp4"]
    items = read_requests([*clips, root / "train.jsonl"], about["prompt"], root, None, "Look: ", about["system"])
    world = World(0, 1, 0, CPU)
    with WorkerPool(0, 60.0) as pool:
        answerer = Answerer(None, tiny.encoder, config, scan, pool, world)
        for item, number in zip(items, (0, 1, 0, 1, 2), strict=True):
            assert isinstance(item.question, Question)
            question = item.question
            if config.video.timestamps:
                question = Question(question.id, with_frame_times(question.prompt), question.references)
            document, _ = answerer.documents(question)
            wanted = documents.build(number)
            assert [plan.frame_indices for plan in document.media] == [plan.frame_indices for plan in wanted.media]
            length = document.num_tokens
            assert torch.equal(document.ids_T, wanted.ids_T[:length]) and length < wanted.num_tokens
            assert torch.equal(document.positions_3T, wanted.positions_3T[:, :length])
            assert tiny.encoder.tokenizer.decode(wanted.ids_T[length:]).lstrip().startswith("It is")
            for ours, theirs in zip(document.media, wanted.media, strict=True):
                assert ours.grid_thw == theirs.grid_thw
                seen = [answerer.frames.submit(pool, plan, tiny.encoder.processor).result() for plan in (ours, theirs)]
                assert torch.equal(seen[0].pixels_PD, seen[1].pixels_PD)


def test_a_clip_is_fitted_into_the_row_of_training(tiny: Tiny, root: Path) -> None:
    """One that takes more than `data.pack_tokens`: the room of the answer, which is not known yet, goes to frames."""
    documents, about = trained(tiny, root, video={"fps": 4.0, "max_frames": 80}, pack_tokens=400, share_videos=False)
    (item,) = read_requests(
        [root / "long.mp4"], about["prompt"], None, None, about["prompt_before_media"], about["system"]
    )
    assert isinstance(item.question, Question)
    with WorkerPool(0, 60.0) as pool:
        answerer = Answerer(None, tiny.encoder, data_config(about, {}), scan, pool, World(0, 1, 0, CPU))
        document, _ = answerer.documents(item.question)
    frames, of_training = (len(one.media[0].frame_indices) for one in (document, documents.build(1)))
    per_pair = documents.build(1).media[0].num_tokens / (of_training / 2)
    answer = documents.lengths[1] - of_training / 2 * per_pair
    assert of_training <= frames < 80 and document.num_tokens <= 400
    assert (frames - of_training) / 2 * per_pair <= answer


def test_max_frames_changes_nothing_else() -> None:
    """The fewest frames of training stay where the most allow them."""
    about = {"video": {"fps": 2.0, "min_frames": 6, "max_frames": 32, "max_pixels": 9999}, "pack_tokens": 700}
    whole = data_config(about, {})
    fewer = data_config(about, {"max_frames": 16, "fps": None})
    changed = {"max_frames": 16, "sample_lists": True}
    assert fewer.video.model_dump() == {**whole.video.model_dump(), **changed} and fewer.pack_tokens == 700
    least = data_config(about, {"max_frames": 2})
    assert (least.video.min_frames, least.video.max_frames) == (2, 2)
    fixed = data_config({"video": {"frames": 8}}, {"max_frames": 16})
    assert fixed.video.frames == 8
