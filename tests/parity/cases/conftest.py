"""Inputs that once failed silently, each in a folder of its own beside the reference checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.runs.commands import REPOSITORY, Commands, Result, commands_in
from vft.common.types import IGNORE_INDEX


@dataclass
class Look:
    """What `tools/inspect_batch.py` said, and the batch that it wrote (empty where it refused)."""

    result: Result
    tokenizer: PreTrainedTokenizerBase
    batch: dict[str, torch.Tensor] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """The text of each branch behind its shared prefix, in row order; a run of media tokens stands as one."""
        return [self._text(rows) for rows in self._branches()]

    def supervised(self) -> list[list[str]]:
        """The supervised runs of each branch."""
        labels = self.batch["labels_T"].tolist()
        found: list[list[str]] = []
        for rows in self._branches():
            runs: list[list[int]] = [[]]
            for row in rows:
                if labels[row] == IGNORE_INDEX:
                    runs.append([])
                else:
                    runs[-1].append(labels[row])
            found.append([self.tokenizer.decode(run) for run in runs if run])
        return found

    def grids(self) -> list[list[int]]:
        """Grid of each medium."""
        return self.batch["grid_thw"].tolist()

    def frame_times(self) -> list[float]:
        """Times of all frames of all media, in seconds."""
        return [round(time, 3) for time in self.batch["frame_times_s"].tolist()]

    def greys(self) -> list[float]:
        """Mean grey (0 to 255) of every frame of every medium; the cases' clips say by it which frame it is."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None]
        pixels, row, found = self.batch["pixels_PD"], 0, []
        for times, height, width in self.grids():
            for _ in range(times):
                pair = pixels[row : row + height * width].reshape(height * width, 3, 2, -1)
                grey = (pair.mean(dim=(0, 3)) * std + mean) * 255
                found += [round(float(grey[:, i].mean()), 1) for i in (0, 1)]
                row += height * width
        return found

    def _branches(self) -> list[list[int]]:
        documents, branches = self.batch["document_T"].tolist(), self.batch["branch_T"].tolist()
        keys = sorted(set(zip(documents, branches, strict=True)))
        pairs = list(zip(documents, branches, strict=True))
        return [[row for row, pair in enumerate(pairs) if pair == key] for key in keys]

    def _text(self, rows: list[int]) -> str:
        ids = self.batch["input_ids_T"].tolist()
        pads = set(self.tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|image_pad|>"]))
        kept = [row for i, row in enumerate(rows) if i == 0 or ids[row] not in pads or ids[rows[i - 1]] != ids[row]]
        return self.tokenizer.decode([ids[row] for row in kept])


@dataclass
class Case:
    """A copy of one case's folder; commands run there, with the reference checkpoint as `model.path`."""

    folder: Path
    tiny: Path
    commands: Commands

    def run(self, program: str, *arguments: object) -> Result:
        """A recipe's module (`vft.recipes.qa`) or a tool (`tools/predict.py`)."""
        script = str(REPOSITORY / program) if program.endswith(".py") else program
        return self.commands.run(script, *arguments, cwd=self.folder)

    def look(self, records: str, *overrides: str, format: str = "messages", model: Path | None = None) -> Look:
        """Inspect the first batch of `data/<records>` with the case's `config.toml`."""
        output = self.folder / "out" / Path(records).stem
        source = f'data.sources=[{{format="{format}", path="{records}"}}]'
        path = f"model.path={model or self.tiny}"
        given = (path, source, "data.workers=0", *overrides)  # to start workers takes longer than all the rest
        result = self.run("tools/inspect_batch.py", "config.toml", *given, "--output", output)
        tokenizer = AutoTokenizer.from_pretrained(model or self.tiny)
        batch = load_file(output / "batch.safetensors") if result.status == 0 else {}
        return Look(result, tokenizer, batch)


@pytest.fixture(scope="session")
def case_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands for all cases."""
    with commands_in(tmp_path_factory.mktemp("commands"), PYTHONPATH=str(REPOSITORY)) as running:
        yield running


@pytest.fixture
def case(reference: Path, tmp_path: Path, case_commands: Commands) -> Callable[[str], Case]:
    """A fresh copy of the case of that name."""
    source = reference.parent / "cases"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")

    def copy(name: str) -> Case:
        folder = tmp_path / "cases" / name
        shutil.copytree(source / name, folder)
        if not (folder.parent / "_common").exists():
            shutil.copytree(source / "_common", folder.parent / "_common")
            (tmp_path / "reference").symlink_to(reference)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        for script in folder.glob("*.py"):  # written when modules had other names
            text = script.read_text().replace("from vft.task import", "from vft.common.task import")
            text = text.replace("from vft.types import", "from vft.common.types import")
            script.write_text(text.replace("from tests.models.families", "from tests.helpers.families"))
        return Case(folder, reference / "qwen2_5_vl_tiny", case_commands)

    return copy
