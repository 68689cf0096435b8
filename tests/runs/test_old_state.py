"""What an older vft left is not mixed with what this one makes: of one from before rules had numbers it is stored."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.runs.commands import CAPTION, REPOSITORY, Commands, metrics
from tests.runs.same import without_times
from vft.common.errors import UserError
from vft.common.rules import CHANGES, VERSION, changed_since
from vft.models.pretrained import Pretrained
from vft.training.checks import check_rules

TOOLS = REPOSITORY / "tools"
has_its_weights = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="on this CPU torch draws other weights from the seed than those of the stored run",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the old run was made with."""
    return FAMILIES["qwen2_5_vl"].save(tmp_path_factory.mktemp("old") / "base")


@pytest.fixture
def old(tmp_path: Path, base: Path) -> Path:
    """A copy of what was left."""
    folder = tmp_path / "old"
    shutil.copytree(REPOSITORY / "tests" / "runs" / "old_state", folder)
    (folder / "base").symlink_to(base)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Digest of every file but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


@has_its_weights
def test_the_stored_base_is_the_one(old: Path, base: Path) -> None:
    """Else the tests below would be refused for another reason."""
    state = json.loads((old / "run" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert "rules" not in state and state["base"] == Pretrained.open(str(base)).fingerprint


def test_a_run_is_not_gone_on_with(commands: Commands, old: Path) -> None:
    """The line says what changed and how to go on; nothing in the folder is touched, whether more steps are asked for
    or it was done."""
    before = content(old / "run")
    for override in ((), ("train.max_steps=6",)):
        error = commands.run(CAPTION, "config.toml", *override, cwd=old).error
        assert f"run: the run there was begun under rules 1; those of today, {VERSION}, differ: " in error
        assert "questions that share a video see the frames that they would see alone" in error
        assert "Name another output_dir to begin anew, or finish it with the vft that began it" in error
        assert content(old / "run") == before


def test_the_checkpoint_says_it_too(commands: Commands, old: Path) -> None:
    """Where run.json is gone, or all but the checkpoints."""
    (old / "run" / "run.json").unlink()
    assert "run: the run there was begun under rules 1;" in commands.run(CAPTION, "config.toml", cwd=old).error
    (old / "run" / "config.toml").unlink()
    error = commands.run(CAPTION, "config.toml", cwd=old).error
    assert "checkpoints/step-000004: the run there was begun under rules 1; those of today" in error


def test_a_new_run_beside_it(commands: Commands, old: Path) -> None:
    """Neither the old index nor old frames are read, though they are of the same files and say something else."""
    table = pq.read_table(old / "cache" / "media.parquet")
    rows = table.to_pylist()
    assert table.schema.metadata[b"scan_version"] == b"2" and len(rows) == 4
    for row in rows:
        file = old / "data" / Path(row["path"]).name
        status = file.stat()
        row |= {"path": str(file.resolve()), "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        row |= {"reason": "not_a_video", "message": "said by the old index"}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), old / "cache" / "media.parquet")
    frames = [path for path in (old / "cache" / "frames").rglob("*") if path.is_file()]
    commands.run(CAPTION, "config.toml", "output_dir=new", cwd=old).ok()
    assert all(path.exists() for path in frames)
    commands.run(CAPTION, "config.toml", "output_dir=fresh", "data.cache_dir=fresh_cache", cwd=old).ok()
    assert without_times(old / "new") == without_times(old / "fresh")
    assert len(list((old / "cache" / "frames").rglob("*-*"))) == len(frames) + 4
    state = json.loads((old / "new" / "checkpoints" / "step-000004" / "state.json").read_text())
    about = json.loads((old / "new" / "run.json").read_text())
    assert state["rules"] == about["rules"] == VERSION
    commands.run(CAPTION, "config.toml", "output_dir=new", "train.max_steps=6", cwd=old).ok()
    assert len(metrics(old / "new")) >= 6
    told = commands.run(str(TOOLS / "compare.py"), old / "run", old / "new").ok().stdout
    assert f"by different rules (run 1, new {VERSION}): scores don't compare" in " ".join(told.split())


def test_an_old_best_is_not_compared_with(commands: Commands, old: Path) -> None:
    """Where so much of a run was removed that another one begins in its folder, its best begins too."""
    shutil.rmtree(old / "run" / "checkpoints")
    for name in ("config.toml", "run.json"):
        (old / "run" / name).unlink()
    (old / "run" / "best.json").write_text('{"step": 2, "metric": "rouge_l", "value": 0.99}\n')
    (old / "run" / "best" / "adapter_model.safetensors").write_bytes(b"old")
    commands.run(CAPTION, "config.toml", cwd=old).ok()
    best = json.loads((old / "run" / "best.json").read_text())
    scores = [line["eval_rouge_l"] for line in metrics(old / "run") if "eval_rouge_l" in line and line["step"]]
    assert best["metric"] == "rouge_l" and best["value"] == max(scores) < 0.99
    assert (old / "run" / "best" / "adapter_model.safetensors").read_bytes() != b"old"
    assert json.loads((old / "run" / "run.json").read_text())["rules"] == VERSION


@has_its_weights
def test_an_old_adapter_still_works(commands: Commands, old: Path) -> None:
    """What was trained stays of use: scored, asked and merged by today's rules."""
    adapter = old / "run" / "adapter"
    evaluated = commands.run(
        str(TOOLS / "evaluate.py"), "config.toml", "output_dir=scored", "--adapter", adapter, cwd=old
    )
    assert "rouge_l" in evaluated.ok().stdout + evaluated.stderr
    ask = (str(TOOLS / "predict.py"), "--model", "base", "--max-new-tokens", "4")
    one = commands.run(*ask, "--adapter", adapter, "--json", old / "data" / "red.mp4", cwd=old).ok().stdout
    merge = (str(TOOLS / "merge_lora.py"), "--base", "base", "--adapter", adapter, "--output", old / "merged")
    commands.run(*merge, cwd=old).ok()
    ask = (str(TOOLS / "predict.py"), "--model", "merged", "--max-new-tokens", "4", "--json")
    two = commands.run(*ask, old / "data" / "red.mp4", cwd=old).ok().stdout
    assert json.loads(one)["prediction"] == json.loads(two)["prediction"]


def test_old_answers_are_not_added_to(commands: Commands, old: Path) -> None:
    """A file of answers from before rules had numbers is left as it is."""
    ask = (
        str(TOOLS / "predict.py"),
        "--model",
        "base",
        "--max-new-tokens",
        "2",
        "--output",
        "answers.jsonl",
        "data/red.mp4",
    )
    commands.run(*ask, cwd=old).ok()
    file = old / "answers.jsonl"
    line = json.loads(file.read_text())
    del line["settings"]["rules"]
    file.write_text(json.dumps(line) + "\n")
    before = file.read_bytes()
    error = commands.run(*ask, "data/blue.mp4", cwd=old).error
    assert "answers.jsonl:1: was answered with rules = None" in error and f"now rules = {VERSION}" in error
    assert file.read_bytes() == before


def test_rules_are_told_apart() -> None:
    assert changed_since({"rules": VERSION}) == ""
    assert all(change in changed_since({}) for changes in CHANGES.values() for change in changes)
    for state in ({"rules": VERSION + 1}, {"rules": "2"}, {"rules": None}):
        with pytest.raises(UserError, match=r"which this vft does not know .* Name another output_dir"):
            check_rules(Path("run"), state)
    assert sorted(CHANGES) == list(range(2, VERSION + 1))
