"""What of the comparison with lmms-eval can be seen without it; all of it where VFT_LMMS_PYTHON names its Python."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peer_lmms_eval
import pytest

from tests.helpers.benchmarks import asked, read
from tests.runs.commands import REPOSITORY, Commands
from tests.runs.fixtures import commands as commands
from vft.benchmarks import find
from vft.reporting.serving import processor_files

TOOL = str(REPOSITORY / "tools/bench/peer_lmms_eval.py")
BASE = REPOSITORY / "tools" / "demo_world" / "base"


def test_questions_are_mvbenchs(tmp_path: Path) -> None:
    rows = peer_lmms_eval.write_questions(tmp_path, 6)
    samples, bad = read(find("mvbench"), tmp_path)
    questions = asked(find("mvbench"), samples)
    assert not bad and len(questions) == len(rows) == 6
    assert len({row["question"] for row in rows}) == 4 and len({row["video"] for row in rows}) == 6
    for row, one in zip(rows, questions, strict=True):
        assert list(one.references) == ["ABCDE"[list(row["candidates"]).index(row["answer"])]]
        assert all(file.exists() for file in one.prompt.media[0].files)


@pytest.mark.parametrize("is_nested", [False, True])
def test_lmms_evals_folder_does_not_sample(tmp_path: Path, is_nested: bool) -> None:
    """Of what `vft merge` writes, that alone is another in the folder of links."""
    release = json.loads((BASE / "preprocessor_config.json").read_text())
    files = (
        {"processor_config.json": {"video_processor": release}} if is_nested else {"preprocessor_config.json": release}
    )
    model = tmp_path / "merged"
    model.mkdir()
    written = processor_files("qwen2_5_vl", files, {"frames": 8}, {})
    for name, content in {**written, "config.json": {}}.items():
        (model / name).write_text(json.dumps(content, indent=2))
    folder = peer_lmms_eval.without_sampling(model, tmp_path / "links")
    changed = []
    for name, content in written.items():
        found = json.loads((folder / name).read_text())
        assert json.loads((model / name).read_text()) == content
        for own, others in ((found, content), (found.get("video_processor"), content.get("video_processor"))):
            if own and others and others.get("do_sample_frames"):
                changed.append(name)
                assert own == {**others, "do_sample_frames": False}
    assert changed == ["processor_config.json" if is_nested else "video_preprocessor_config.json"]
    assert (folder / "config.json").is_symlink()


def test_without_lmms_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no failure; a wrong folder is one."""
    python = tmp_path / "python"
    monkeypatch.setattr("sys.argv", [TOOL, "--model", str(BASE), "--lmms-python", str(python)])
    peer_lmms_eval.main()
    said = capsys.readouterr().out
    assert said.startswith(f"skipped: {python} has no lmms_eval") and said.count("\n") == 1
    monkeypatch.setattr("sys.argv", [TOOL, "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        peer_lmms_eval.main()
    assert stop.value.code == 2 and f"error: --model {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("more", "rounded"), [("", 0), ("--max-pixels 3136", 0), ("--frames 8", 1)])
def test_lmms_eval_and_vft_give_the_same(commands: Commands, tmp_path: Path, more: str, rounded: int) -> None:
    """With the positions of transformers corrected every text is the same, but for what bf16 rounds: in float32 the
    one in `rounded` is the same too. The model is the demo's base, with the decoding of a merged model, and with the
    frames of training in its processor."""
    interpreter = os.environ.get("VFT_LMMS_PYTHON")
    if not interpreter:
        pytest.skip("VFT_LMMS_PYTHON names no interpreter with lmms_eval")
    model = tmp_path / "model"
    model.mkdir()
    for file in BASE.iterdir():
        (model / file.name).symlink_to(file)
    release = {"preprocessor_config.json": json.loads((BASE / "preprocessor_config.json").read_text())}
    decoding = json.loads((BASE / "generation_config.json").read_text())
    own = {**processor_files("qwen2_5_vl", release, {"frames": 4}, {}), "generation_config.json": decoding}
    decoding["repetition_penalty"] = 1.0
    for name, content in own.items():
        (model / name).unlink(missing_ok=True)
        (model / name).write_text(json.dumps(content))
    words = ["--model", model, "--lmms-python", interpreter, "--released-positions", "--questions", 8, *more.split()]
    commands.run(TOOL, *words, "--output", tmp_path / "made.json").ok()
    made = json.loads((tmp_path / "made.json").read_text())
    assert len({line["vft"] for line in made["texts"]}) > 4
    assert sum(line["vft"] != line["lmms-eval"] for line in made["texts"]) <= rounded
