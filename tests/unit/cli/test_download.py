"""tools/download.py: says before it fetches, fetches what is named, and ends on one line where it can't."""

from __future__ import annotations

import json
import re
import tomllib
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow.parquet
import pytest

from tests.helpers.main import run_main
from vft import benchmarks
from vft.cli import download
from vft.common.types import MediaRef
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats as sources

ROOT = Path(__file__).parents[3]


class Hub:
    """In the place of snapshot_download: two files a part, of which one is there."""

    def __init__(self, size: int = 1000, files: int = 2, error: Exception | None = None) -> None:
        self.size, self.files, self.error = size, files, error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repository: str, **arguments: Any) -> Any:
        self.calls.append({"repository": repository, **arguments})
        if self.error is not None:
            raise self.error
        files = [SimpleNamespace(file_size=self.size, will_download=i > 0) for i in range(self.files)]
        return files if arguments["dry_run"] else str(arguments["local_dir"])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    def run(hub: Hub, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        monkeypatch.setattr(download, "free_bytes", lambda folder: 5_000_000_000)
        done = run_main(download.main, capsys, *arguments, "--root", tmp_path / "new")
        return done.status, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("name", download.SETS)
def test_nothing_is_fetched_unasked(run: Any, tmp_path: Path, name: str) -> None:
    hub = Hub()
    status, printed, _ = run(hub, name)
    assert status == 0 and not hub.calls and not (tmp_path / "new").exists()
    dataset = download.SETS[name]
    assert dataset.page in printed and f"licence: {dataset.licence}" in printed and "free there: 5.0 GB" in printed
    for part in dataset.parts.values():
        assert f"{part.repository}: {', '.join(part.patterns)}" in printed
    assert ("Nothing has been fetched" in printed) == bool(dataset.parts)
    assert dataset.parts or "By hand" in printed


def test_parts_are_fetched(run: Any, tmp_path: Path) -> None:
    hub = Hub(size=2_500_000_000)
    parts = ("--part", "0_30_s_nextqa", "--part", "1_2_m_nextqa")
    status, printed, errors = run(hub, "llava-video-178k", *parts)
    assert status == 0 and not hub.calls
    status, printed, errors = run(hub, "llava-video-178k", *parts, "--yes")
    assert status == 0, errors
    assert "fetching 5.00 GB" in printed and "tar -xzf" in printed
    assert [(call["allow_patterns"], call["dry_run"]) for call in hub.calls] == [
        (["0_30_s_nextqa/*"], True),
        (["1_2_m_nextqa/*"], True),
        (["0_30_s_nextqa/*"], False),
        (["1_2_m_nextqa/*"], False),
    ]
    assert {call["repository"] for call in hub.calls} == {"lmms-lab/LLaVA-Video-178K"}
    assert {call["local_dir"] for call in hub.calls} == {tmp_path / "new" / "LLaVA-Video-178K"}
    assert {call["repo_type"] for call in hub.calls} == {"dataset"}


def test_without_names_all_parts(run: Any, tmp_path: Path) -> None:
    hub = Hub()
    assert run(hub, "shot2story", "--yes")[0] == 0
    fetched = [(call["repository"], call["repo_type"], call["local_dir"]) for call in hub.calls[2:]]
    folder = tmp_path / "new" / "Shot2Story"
    assert fetched == [
        ("mhan/shot2story", "dataset", folder),
        ("mhan/shot2story-videos", "model", folder / "videos"),
    ]


def test_what_is_not_on_the_hub_is_told(run: Any) -> None:
    hub = Hub()
    status, printed, _ = run(hub, "ucf101", "--yes")
    assert status == 0 and not hub.calls
    assert "wget -c https://www.crcv.ucf.edu/data/UCF101/UCF101.rar" in printed


@pytest.mark.parametrize(
    ("hub", "arguments", "message"),
    [
        (Hub(size=6_000_000_000), (), r"6\.0 GB are to be fetched and 5\.0 GB are free"),
        (Hub(files=0), (), r"has no files videomme/\*"),
        (Hub(error=ConnectionError("no route\nto host")), (), r"\(no route\); check the network"),
        (Hub(error=TimeoutError()), (), r"\(TimeoutError\); check the network"),
        (Hub(), ("--part", "video"), r"--part video: Video-MME has no such part; its parts are questions, "),
    ],
)
def test_mistakes_are_one_line(run: Any, hub: Hub, arguments: tuple[str, ...], message: str) -> None:
    status, _, errors = run(hub, "video-mme", "--part", "questions", *arguments, "--yes")
    assert status == 2 and re.search(message, errors) and errors.count("\n") == 1
    assert all(call["dry_run"] for call in hub.calls)


def test_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The hub's own client, where it may not reach the network, with a folder that is there already."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "VideoXum").mkdir()
    (tmp_path / "VideoXum" / "train_videoxum.json").write_text("[]")
    done = run_main(download.main, capsys, "videoxum", "--root", tmp_path, "--yes")
    assert done.stderr.count("\n") == 1 and "jylins/videoxum: annotations can't be" in done.error


@pytest.mark.parametrize("name", [name for name, one in download.SETS.items() if one.source])
def test_sources_are_those_of_the_page(name: str) -> None:
    """What the tool says can be read as a configuration, and docs/use/data.md says the same of the set."""
    dataset = download.SETS[name]
    SourceConfig.model_validate(tomllib.loads(f"source = {dataset.source}")["source"])
    page = (ROOT / "docs" / "use" / "data.md").read_text(encoding="utf-8")
    assert dataset.source in page and f"vft download {name}" in page and dataset.page in page


@pytest.mark.parametrize("name", benchmarks.names())
def test_every_benchmark_says_where_its_data_are(run: Any, name: str) -> None:
    (key,) = [key for key, one in download.SETS.items() if name in one.benchmarks]
    benchmark, dataset = benchmarks.find(name), download.SETS[key]
    assert benchmark.page == dataset.page and benchmark.path.split("/")[0] == dataset.folder
    status, printed, _ = run(Hub(), key)
    assert status == 0 and f"vft benchmark {name} --model MODEL --root " in printed
    page = (ROOT / "docs" / "use" / "benchmarks.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"`{benchmark.path.split('*')[0].rstrip('/')}" in row and f" {benchmark.frames} |" in row


ROW = {
    "video_id": "001",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "History",
    "task_type": "Counting",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "question": "What?",
    "options": ["A. One.", "B. Two."],
    "answer": "A",
}
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
HOUND = {  # as in llava/train/train_dpo.py of LLaVA-NeXT, which reads the file
    "id": "v_1_0",
    "video": "v_1",
    "prompt": "<video>\nWhat?",
    "answer": "A cat, on a sofa.",
    "chosen": "A cat.",
    "rejected": "A dog.",
    "chosen_score": 5,
    "rejected_score": 2,
}
RLAIF_V = {  # the fields of the set's card
    "ds_name": "RLAIF-V",
    "image": {"bytes": b"a picture", "path": "000000033471.jpg"},
    "question": "What?",
    "chosen": "A cat.",
    "rejected": "A dog.",
    "origin_dataset": "COCO",
    "origin_split": '{"model": "x", "type": "question answering"}',
    "idx": "0",
    "image_path": "coco/train2017/000000000001.jpg",
}
LAID_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "llava-video-178k": (
        {"x_cap.json": [{"id": "1", "conversations": TALK, "data_source": "0_30_s_academic_v0_1", "video": "c/a.mp4"}]},
        "LLaVA-Video-178K/0_30_s_academic_v0_1/c/a.mp4",
    ),
    "video-mme": ({"test-00000-of-00001.parquet": ROW}, "Video-MME/data/fFjv93ACGo8.mp4"),
    "llava-instruct-150k": (
        {"llava_instruct_150k.json": [{"id": "1", "image": "000000033471.jpg", "conversations": TALK}]},
        "coco/train2017/000000033471.jpg",
    ),
    "llava-hound-dpo": ({"sft_dpo_17k.jsonl": HOUND}, "LLaVA-Hound-DPO/train_300k/v_1"),
    "rlaif-v": ({"RLAIF-V-Dataset_000.parquet": RLAIF_V}, f"cache/files/{sha256(b'a picture').hexdigest()}.jpg"),
    "ucf101": (
        {"trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 1\n", "classInd.txt": "1 YoYo\n"},
        "UCF101/UCF-101/YoYo/v_YoYo_g08_c01.avi",
    ),
    "kinetics-700": (
        {"train.csv": "label,youtube_id,time_start,time_end,split\nyodeling,-0A-b_12345,1,11,train\n"},
        "Kinetics-700/k700-2020/train/-0A-b_12345_000001_000011.mp4",
    ),
    "ssv2": (
        {
            "train.json": [
                {"id": "78687", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]}
            ],
            "labels.json": {"Holding something": "0"},
        },
        "SSv2/20bn-something-something-v2/78687.webm",
    ),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_what_is_laid_out_so_is_found(tmp_path: Path, name: str) -> None:
    """The reader of a set finds its media where the tool has them put."""
    files, medium = LAID_OUT[name]
    source = SourceConfig.model_validate(tomllib.loads(f"source = {download.SETS[name].source}")["source"])
    place = tmp_path / source.path
    folder = place.parent if place.suffix else place
    for path in (folder / "-", tmp_path / medium):
        path.parent.mkdir(parents=True, exist_ok=True)
    if name == "llava-hound-dpo":  # a folder of frames
        (tmp_path / medium).mkdir()
        (tmp_path / medium / "c01_0001.jpeg").write_bytes(b"")
    elif name != "rlaif-v":  # whose picture is in the table
        (tmp_path / medium).write_bytes(b"")
    for file, content in files.items():
        if file.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([content]), folder / file)
        else:
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    config = DataConfig(root=tmp_path, sources=(source,), cache_dir=str(tmp_path / "cache"))
    samples, bad = sources.read(source, config)
    assert not bad and len(samples) == 1
    if "rejected_response" in samples[0].fields:
        assert samples[0].fields["rejected_response"] == "A dog." and samples[0].turns[-1].text == "A cat."
    refs = [part for turn in samples[0].turns for part in turn.parts if isinstance(part, MediaRef)]
    expected = (tmp_path / medium).resolve()
    assert [ref.path for ref in refs] == [(expected / "c01_0001.jpeg",) if expected.is_dir() else expected]
