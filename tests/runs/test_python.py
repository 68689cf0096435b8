"""docs/use/python.md, line by line, and what `import vft` offers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_data
import pytest

import vft
from tests.runs.commands import REPOSITORY

PAGE = REPOSITORY / "docs" / "use" / "python.md"


def test_importing_vft_is_quick() -> None:
    """No torch until a name is used; a wrong name lists the right ones."""
    code = "import sys, vft; assert 'load_model' in dir(vft); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="it offers"):
        vft.load_modle  # type: ignore[attr-defined]  # noqa: B018


def test_every_line_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VFT_CACHE", str(tmp_path / "cache"))
    for name in ("tools", "recipes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    make_data.make_data("captions", tmp_path / "data" / "demo", {"train": 32, "held_out": 4}, processes=1)
    found: dict[str, Any] = {}
    text = PAGE.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))  # so that a traceback names the page's line
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), found)
    lines = [json.loads(line) for line in (tmp_path / "runs/notebook/metrics.jsonl").read_text().splitlines()]
    assert found["losses"] == [line["loss"] for line in lines if "loss" in line] and len(found["losses"]) == 4
    assert found["answer"] and isinstance(found["other"], str)
    assert set(found["before"]) == set(found["after"]) >= {"cider_d", "rouge_l"}
    assert "learning_rate" in str(found.get("error", "learning_rate"))
    assert (tmp_path / "runs/from_dict/predictions/adapter.jsonl").is_file()
