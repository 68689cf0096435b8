"""The card beside an adapter: others read its head, and the code in it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.runs.world import World
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


def test_the_code_in_it_runs(learned: Path) -> None:
    peft = pytest.importorskip("peft")
    card = (learned / "adapter" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if "rocessor" not in line or line.startswith("from")]
    names: dict[str, object] = {}  # the processor needs torchvision, which isn't here
    exec("\n".join(lines).replace(", AutoProcessor", ""), names)
    assert isinstance(names["model"], peft.PeftModel)


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
