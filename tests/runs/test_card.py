"""The card beside an adapter: others read its head, and the code in it runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs.world import ANSWERS, PROMPT, World
from vft.cli.merge_lora import merge
from vft.models.pretrained import Pretrained
from vft.reporting import write_card


def test_an_adapter_says_what_it_is(learned: Path, world: World) -> None:
    card = (learned / "adapter" / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    facts = dict(line.split(": ", 1) for line in head.splitlines())
    base = json.loads((learned / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert json.loads(facts["base_model"]) == base and facts["library_name"] == "peft"
    assert "in 60 steps" in body and "rank = 8" in body and "{{" not in body and "\n\n\n\n" not in body
    assert f"--lora-modules tuned={learned / 'adapter'}" in body and "--max-lora-rank 8" in body


@pytest.fixture
def clip(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `clip.mp4` in the current folder, as the cards' code has it."""
    shutil.copy(world.root / "red.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VFT_CACHE", str(tmp_path / "cache"))


def codes(folder: Path) -> list[str]:
    """The Python in a folder's card: with vft, and with transformers."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.mark.usefixtures("clip")
def test_the_code_in_it_runs_to_an_answer(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(codes(learned / "adapter")[0], {})
    assert capsys.readouterr().out == f"{ANSWERS['red']}\n"


@pytest.mark.usefixtures("clip")
def test_the_code_for_transformers_runs(learned: Path) -> None:
    """Its processor needs torchvision, which isn't here: the rest runs, with what is asked laid out by its template."""
    peft = pytest.importorskip("peft")
    names: dict[str, Any] = {}
    before, _, after = codes(learned / "adapter")[1].partition("inputs = ")
    lines = [line for line in before.splitlines() if "rocessor" not in line or line.startswith(("from", "options"))]
    exec("\n".join(lines).replace(", AutoProcessor", ""), names)
    assert isinstance(names["model"], peft.PeftModel) and "print(processor.batch_decode(" in after
    assert names["messages"] == [
        {"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": PROMPT}]}
    ]
    videos = names["options"]["processor_kwargs"]["videos_kwargs"]
    assert videos["num_frames"] == 4 and videos["size"]["longest_edge"] == 56 * 56


@pytest.mark.usefixtures("clip")
def test_a_merged_model_has_a_card(
    learned: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(str(world.base), learned / "adapter", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "with a LoRA adapter merged into it, trained in 60 steps" in card and "PEFT" not in card
    assert "--adapter" not in card and f"vllm serve {tmp_path / 'merged'}" in card and "learning_rate = 0.01" in card
    exec(codes(tmp_path / "merged")[0], {})
    assert capsys.readouterr().out == f"{ANSWERS['red']}\n"
    foreign = shutil.copytree(learned / "adapter", tmp_path / "foreign")
    (foreign / "vft.json").unlink()
    merge(str(world.base), foreign, tmp_path / "other")
    card = (tmp_path / "other" / "README.md").read_text()
    assert "merged into it.\n" in card and "## Training" not in card and "{{" not in card
    exec(codes(tmp_path / "other")[0], {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("plain", "other"), [("dora = false", "dora = true"), ('"language_model.*"', '"language_model.experts.*"')]
)
def test_one_that_vllm_does_not_serve_says_so(
    world: World, learned: Path, tmp_path: Path, plain: str, other: str
) -> None:
    settings = (learned / "config.toml").read_text()
    assert settings.count(plain) == 1
    (tmp_path / "config.toml").write_text(settings.replace(plain, other))
    asked = {"prompt": "Say.", "other_prompts": 2, "system": "Be brief.", "other_systems": 0, "pack_tokens": 256}
    (tmp_path / "vft.json").write_text(json.dumps(asked))
    write_card(tmp_path, tmp_path, 3, Pretrained.open(str(world.base)))
    card = (tmp_path / "README.md").read_text()
    assert "merge it first" in card and "DoRA" in card and "--enable-lora" not in card
    assert "Not evaluated" in card and 'To be asked: "Say." (the most frequent of 3' in card
    assert 'system text of training: "Be brief."' in card and "at most 256 tokens" in card
