"""Whatever happens to the files of a checkpoint: it is noticed, and the one before is taken.

`--count` is the number of damages. Most are read by the loading code alone, every fortieth by a whole run.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.saving import Trained, values
from tests.runs.commands import CAPTION, Commands
from tests.runs.processes import run_together
from tests.runs.same import assert_same
from tests.runs.world import MIXED, World
from vft.common.errors import UserError
from vft.training import checkpoint as checkpoints

PROGRAM = "tests.distributed.saving"
Damage = Callable[[Path, random.Random], bool]
"""Of a file; False where it can't be done to this one."""


def flip_a_bit(file: Path, pick: random.Random) -> bool:
    """Anywhere."""
    content = bytearray(file.read_bytes())
    content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
    file.write_bytes(content)
    return True


def flip_a_bit_of_the_header(file: Path, pick: random.Random) -> bool:
    """Where safetensors keeps names, shapes and offsets, or in the length of that."""
    header = _header(file)
    if not header:
        return False
    content = bytearray(file.read_bytes())
    content[pick.randrange(len(header) + 8)] ^= 1 << pick.randrange(8)
    file.write_bytes(content)
    return True


def cut_off(file: Path, pick: random.Random) -> bool:
    """From a byte to the end, often few: the last blocks were never written."""
    content = file.read_bytes()
    file.write_bytes(content[: pick.choice([0, pick.randrange(len(content)), len(content) - 1])])
    return True


def lengthen(file: Path, pick: random.Random) -> bool:
    """Something behind the end."""
    file.write_bytes(file.read_bytes() + pick.choice([b"\0", b"\n", b" ", b"\0" * 4096]))
    return True


def delete(file: Path, pick: random.Random) -> bool:
    """No such file, or a folder or a link to nowhere in its place."""
    file.unlink()
    pick.choice([lambda: None, file.mkdir, lambda: file.symlink_to("gone")])()
    return True


def lose_a_tensor(file: Path, pick: random.Random) -> bool:
    """All its bytes are zero, as in a file whose blocks were reserved and not written."""
    content, ranges = bytearray(file.read_bytes()), _ranges(file)
    if not ranges:
        return False
    begin, end = pick.choice(ranges)
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)
    return True


def exchange_two_tensors(file: Path, pick: random.Random) -> bool:
    """The file is in order, and holds the same bytes."""
    content, ranges = bytearray(file.read_bytes()), _ranges(file)
    pairs = [(a, b) for a in ranges for b in ranges if a < b and a[1] - a[0] == b[1] - b[0]]
    if not pairs:
        return False
    (a, b), (c, d) = pick.choice(pairs)
    content[a:b], content[c:d] = content[c:d], content[a:b]
    file.write_bytes(content)
    return True


def change_a_number(file: Path, pick: random.Random) -> bool:
    """JSON that reads as before and says something else."""
    content = bytearray(file.read_bytes())
    digits = [i for i, byte in enumerate(content) if byte in b"12345678"]
    if file.suffix != ".json" or not digits:
        return False
    content[pick.choice(digits)] += 1
    file.write_bytes(content)
    return True


def take_another_steps(file: Path, pick: random.Random) -> bool:
    """The file of that name of the other checkpoint."""
    (other,) = (folder / file.name for folder in file.parent.parent.iterdir() if folder != file.parent)
    if not other.is_file():
        return False
    shutil.copyfile(other, file)
    return True


DAMAGES: tuple[Damage, ...] = (
    *(flip_a_bit, flip_a_bit, flip_a_bit_of_the_header, cut_off, lengthen, delete),
    *(lose_a_tensor, exchange_two_tensors, change_a_number, take_another_steps),
)


def damage(folder: Path, pick: random.Random) -> tuple[str, str]:
    """Do one of DAMAGES to one of the files. Returns which, to which."""
    while True:
        how, file = pick.choice(DAMAGES), pick.choice(sorted(folder.iterdir()))
        before = file.read_bytes()
        if how(file, pick) and not (file.is_file() and file.read_bytes() == before):
            return how.__name__, file.name


def _header(file: Path) -> bytes:
    if file.suffix != ".safetensors":
        return b""
    content = file.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _ranges(file: Path) -> list[tuple[int, int]]:
    """First byte and end of each tensor."""
    header = _header(file)
    listed = json.loads(header or b"{}")
    found = (one["data_offsets"] for name, one in sorted(listed.items()) if name != "__metadata__")
    return [(8 + len(header) + begin, 8 + len(header) + end) for begin, end in found]


class Pair:
    """Two checkpoints of small tensors, of steps 1 and 2, that are made whole again after each damage."""

    def __init__(self, root: Path) -> None:
        self.root, self.old, self.new = root, root / "step-000001", root / "step-000002"
        self.content = {path: path.read_bytes() for folder in (self.old, self.new) for path in folder.iterdir()}
        self.reader = Trained()

    def mend(self) -> None:
        """As they were."""
        for folder in (self.old, self.new):
            shutil.rmtree(folder)
            folder.mkdir()
        for path, content in self.content.items():
            path.write_bytes(content)

    def chosen(self) -> tuple[int, list[str]]:
        """The step that a run would go on from, every bit of it as it was, and what it would say."""
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints.logger, "info", lambda text, *arguments: told.append(text % arguments))
            folder = checkpoints.newest_intact(self.root, self.reader.world)
        assert folder is not None
        self.reader.fill(0)
        step = checkpoints.load(folder, self.reader.model, self.reader.optimizer)["step"]
        for name, value in values(step).items():
            assert self.reader.tensors()[name].equal(value), name
        return step, told


@pytest.mark.parametrize("writers", [1, 2])
def test_every_damage_is_noticed(commands: Commands, tmp_path: Path, count: Callable[[int], int], writers: int) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        for result in run_together(commands, writers, PROGRAM, "reshard", root, step, 0, "sync"):
            result.ok()
    pair, pick = Pair(root), random.Random(writers)
    (root / "loaded-2.safetensors").unlink()
    assert pair.chosen() == (2, []) and len(list(pair.new.iterdir())) == 2 + 2 * writers
    done: Counter[str] = Counter()
    for number in range(count(40) // 2):
        how, name = damage(pair.new, pick)
        done[how] += 1
        step, told = pair.chosen()
        assert step == 1, f"{how} of {name} was not noticed"
        (line,) = told
        assert line.startswith(f"{pair.new}: ") and line.endswith("; trying the checkpoint before it")
        assert name.removesuffix(".json") in line, (how, name)  # a file, or that the manifest says otherwise
        if number % 5 == 0:
            how, name = damage(pair.old, pick)
            with pytest.raises(UserError, match="none of 2 checkpoints is whole; remove the folder") as caught:
                pair.chosen()
            assert str(root) in str(caught.value) and "\n" not in str(caught.value)
        pair.mend()
    print(f"{writers} writer(s): {done.total()} damages noticed, each named: {dict(done)}")


SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "train": {"max_steps": 4, "packs_per_step": 4},
    "checkpoint": {"every_steps": 2, "keep_last": 2},
}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_before_the_damage_or_says_that_it_can_not(
    world: World, commands: Commands, tmp_path: Path, count: Callable[[int], int], processes: int
) -> None:
    undisturbed = world.config(tmp_path / "undisturbed.toml", MIXED, SETTINGS)
    for result in run_together(commands, processes, CAPTION, undisturbed):
        result.ok()
    pick, runs = random.Random(processes), max(1, count(1) // 80)
    for number in range(runs):
        config = world.config(tmp_path / f"run{number}.toml", MIXED, SETTINGS)
        folder = shutil.copytree(undisturbed.with_suffix(""), config.with_suffix(""))
        old, new = (folder / "checkpoints" / f"step-00000{step}" for step in (2, 4))
        _, name = damage(new, pick)
        said = run_together(commands, processes, CAPTION, config)[0].ok().stderr
        (line,) = (line for line in said.splitlines() if "trying the checkpoint before it" in line)
        assert line.startswith(f"{new}: ") and name.removesuffix(".json") in line
        assert f"going on from {old}\n" in said
        assert_same(folder, undisturbed.with_suffix(""), 4)
        for one in (old, new):
            damage(one, pick)
        ended = run_together(commands, processes, CAPTION, config)
        assert all(result.status for result in ended)
        assert not any("Traceback" in result.stderr for result in ended)
        (line,) = (line for result in ended for line in result.stderr.splitlines() if line.startswith("error: "))
        assert f"{folder / 'checkpoints'}: none of 2 checkpoints is whole" in line
    print(f"{processes} process(es): {runs} run(s) went on from the checkpoint before, and refused where none was left")
