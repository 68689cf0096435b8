"""Model folders, adapters, checkpoints and caches made by someone who wants their code run: none of it is.

Everything that others would unpickle or import is planted with code that leaves a mark. Files that are never read lie
beside good ones, and the runs come out as without them; files that are read are replaced by it, and each is refused
in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.reliability.watched import PLANTED
from tests.runs.commands import CAPTION, Commands, Result, column
from tests.runs.world import World
from vft.adapters.peft_format import Adapter
from vft.common.errors import UserError
from vft.common.types import Conversation, MediaRef, Turn
from vft.data.chat import ChatEncoder
from vft.data.media.index import build as build_index
from vft.models import build
from vft.models.pretrained import Pretrained
from vft.training.checkpoint import find_damage

WATCHED = str(Path(__file__).with_name("watched.py"))
NEVER_READ = (
    *("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("consolidated.00.pth", "adapter_model.bin", "tokenizer.pkl", "vocab.pkl", "data.pickle", "scaler.joblib"),
    *(".metadata", "trainable.pt", "state.pkl", "__0_0.distcp"),
)
"""What others unpickle."""
AUTO_MAP = {
    name: f"{PLANTED}.Planted"
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
} | {"AutoTokenizer": [f"{PLANTED}.Planted", f"{PLANTED}.Planted"]}
CONFIGS = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("processor_config.json", "generation_config.json", "adapter_config.json"),
)


ROOM = ("data.pack_tokens=2048", "--gpus", "1", "--gpu-memory-gib", "80")


class Payload:
    """Makes the folder that `mark` names when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that planted code makes; it isn't there, before and after."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))  # it would work
    assert mark.is_dir()
    mark.rmdir()
    yield mark
    assert not mark.exists()


def plant(folder: Path, mark: Path) -> None:
    """Pickles under the names that others read, and code that the configurations ask for."""
    bad = pickle.dumps(Payload(mark))
    for number, name in enumerate(NEVER_READ):
        if number % 2:
            (folder / name).write_bytes(bad)
        else:
            with (folder / name).open("wb") as file:
                torch.save({"state_dict": Payload(mark)}, file)
    np.save(folder / "statistics.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    (folder / f"{PLANTED}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Planted: ...\n")
    for name in CONFIGS:
        file = folder / name
        if name in ("config.json", "tokenizer_config.json", "adapter_config.json") and not file.exists():
            continue
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, "auto_map": AUTO_MAP}))


def watched(commands: Commands, log: Path, program: str, *arguments: object) -> Result:
    """Run a command; nothing was unpickled or imported."""
    result = commands.run(WATCHED, program, *arguments, WATCH_LOG=str(log))
    assert not log.exists(), log.read_text()
    return result


def test_whole_commands_among_planted_files(world: World, commands: Commands, tmp_path: Path, mark: Path) -> None:
    """Training, going on, answering, scoring, merging, planning and looking: as without the planted files."""
    settings: dict[str, Any] = {
        "data": {"cache": "frames", "workers": 1, "cache_dir": str(tmp_path / "cache")},
        "checkpoint": {"every_steps": 2},
        "eval": {"sources": [{"format": "messages", "path": "videos.json"}], "max_new_tokens": 2},
        "train": {"max_steps": 4, "schedule": "constant"},
    }
    plain = commands.train(world.config(tmp_path / "plain.toml", settings))
    hostile = World(tmp_path / "data", tmp_path / "base", world.other_base, world.family)
    shutil.copytree(world.root, hostile.root)
    shutil.copytree(world.base, hostile.base)
    for folder in (hostile.root, hostile.base):
        plant(folder, mark)
    config, run, log = hostile.config(tmp_path / "run.toml", settings), tmp_path / "run", tmp_path / "log"
    watched(commands, log, CAPTION, config, "train.max_steps=2").ok()
    for folder in (run, run / "adapter", *run.glob("checkpoints/*")):
        plant(folder, mark)
    damaged = pickle.dumps(Payload(mark))
    cached = [*tmp_path.glob("cache/frames/??/*"), *tmp_path.glob("cache/*.parquet")]
    assert len(cached) >= 5
    for file in cached:
        file.write_bytes(damaged + bytes(max(0, file.stat().st_size - len(damaged))))
    watched(commands, log, CAPTION, config).ok()
    assert column(run, "loss") == column(plain, "loss")
    plant(run / "adapter", mark)
    adapter, clip = ("--adapter", run / "adapter"), hostile.root / "red.mp4"
    answers = watched(commands, log, "tools/predict.py", "--model", hostile.base, *adapter, clip).ok()
    watched(commands, log, "tools/evaluate.py", config, *adapter).ok()
    watched(commands, log, "tools/inspect_batch.py", config, "--output", tmp_path / "look", "--forward").ok()
    merged = tmp_path / "merged"
    watched(commands, log, "tools/merge_lora.py", "--base", hostile.base, *adapter, "--output", merged).ok()
    names = {path.name for path in merged.iterdir()}
    assert not names & {*NEVER_READ, f"{PLANTED}.py", "statistics.npy"} and "model.safetensors" in names
    again = watched(commands, log, "tools/predict.py", "--model", merged, clip).ok()
    assert again.stdout == answers.stdout
    print("7 commands, 0 pickles read, 0 modules of a checkpoint imported")


def test_plan_among_planted_files(world: World, commands: Commands, tmp_path: Path, mark: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    plant(base, mark)
    config = world.config(tmp_path / "run.toml", {"model": {"path": str(base)}})
    watched(commands, tmp_path / "log", "tools/plan.py", config, *ROOM).ok()


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to spoil."""
    return shutil.copytree(world.base, tmp_path / "base")


def open_all(base: Path) -> str:
    """What a command reads of a model folder before its weights; the template's text of a conversation."""
    checkpoint = Pretrained.open(str(base))
    encoder = ChatEncoder(checkpoint.tokenizer, build(checkpoint, torch.float32).processor)
    turns = (Turn("user", ("What?",)), Turn("assistant", ("A dog.",)))
    return str(encoder.tokenizer.decode(encoder.encode(Conversation("x", turns, "a.json:1")).ids))


def refused(work: Callable[[], object], *named: str) -> str:
    """The one line with which `work` ends."""
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 1000, line
    assert all(text in line for text in named), line
    return line


DEEP = "[" * 100_000 + "]" * 100_000
JSON_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", [*JSON_FILES, INDEX, "model.safetensors"])
def test_a_pickle_under_a_name_that_is_read(base: Path, mark: Path, name: str) -> None:
    (base / name).write_bytes(pickle.dumps(Payload(mark)))
    refused(lambda: open_all(base), str(base))


def test_weights_as_a_pickle_alone(base: Path, mark: Path) -> None:
    (base / "model.safetensors").unlink()
    plant(base, mark)
    refused(lambda: open_all(base), str(base), "safetensors only")


@pytest.mark.parametrize("text", [DEEP, f'{{"x": {DEEP}}}', "{", "[]", "", "\ufeff{}", '{"a": NaN' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", [*JSON_FILES, INDEX])
def test_json_that_is_absurd(base: Path, name: str, text: str) -> None:
    (base / name).write_text(text)
    refused(lambda: open_all(base), str(base))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "/dev/zero", "../base2/model.safetensors", "model.bin", 7, None, ["a"]]
)
def test_an_index_that_leads_elsewhere(base: Path, name: object) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(lambda: open_all(base), str(base / INDEX), "model.norm.weight")


HEADERS = {
    "2^60": (2**60).to_bytes(8, "little") + b"{}",
    "2^64 - 1": b"\xff" * 8 + b"{}",
    "200 MB": (200 << 20).to_bytes(8, "little") + b"{}" + b" " * ((200 << 20) - 2),
    "deep": len(DEEP).to_bytes(8, "little") + DEEP.encode(),
    "beyond the end": b"\x40" + bytes(7) + b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}',
    "empty": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers_of_weights(base: Path, world: World, learned: Path, content: bytes, tmp_path: Path) -> None:
    for file in (base / "model.safetensors", base / "model-00001-of-00001.safetensors"):
        file.write_bytes(content)
    refused(lambda: open_all(base), str(base / "model.safetensors"), "not a readable safetensors file")
    adapter = shutil.copytree(learned / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(lambda: Adapter.open(adapter, {}), str(adapter), "not a readable safetensors file")


def test_headers_of_a_base_in_several_files(
    world: World, commands: Commands, base: Path, learned: Path, tmp_path: Path
) -> None:
    """Merging reads them itself."""
    about = json.loads((learned / "adapter" / "vft.json").read_text())
    names = list(Pretrained.open(str(base)).weight_files)
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    (base / "model.safetensors").write_bytes(HEADERS["2^60"])
    adapter = shutil.copytree(learned / "adapter", tmp_path / "adapter")
    about["base_fingerprint"] = Pretrained.open(str(base)).fingerprint
    (adapter / "vft.json").write_text(json.dumps(about))
    merge = ("--base", base, "--adapter", adapter, "--output", tmp_path / "merged")
    assert str(base / "model.safetensors") in commands.run("tools/merge_lora.py", *merge).error
    assert (
        str(base / "model.safetensors")
        in commands.run("tools/predict.py", "--model", base, world.root / "red.mp4").error
    )
    assert not (tmp_path / "merged").exists()


def test_pipes_in_the_place_of_files(base: Path) -> None:
    """Whoever opened one would wait for ever."""
    for name in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        kept = base / f"{name}.kept"
        (base / name).rename(kept)
        os.mkfifo(base / name)
        refused(lambda: open_all(base), str(base))
        (base / name).unlink()
        kept.rename(base / name)
    open_all(base)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_with_sums_that_are_right(
    learned: Path, tmp_path: Path, mark: Path, commands: Commands, world: World, name: str
) -> None:
    """Whoever makes one can make its manifest too."""
    (newest,) = (learned / "checkpoints").iterdir()
    folder = shutil.copytree(newest, tmp_path / "checkpoints" / newest.name)
    bad = DEEP.encode() if name == "state.json" else pickle.dumps(Payload(mark))
    (folder / name).write_bytes(bad)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(bad), "sha256": hashlib.sha256(bad).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    assert find_damage(folder) is None
    shutil.copytree(learned, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "checkpoints").rename(tmp_path / "run" / "checkpoints")
    config = shutil.copy(learned / "config.toml", tmp_path / "run.toml")
    settings = f"output_dir={tmp_path / 'run'}", "train.max_steps=61"
    (tmp_path / "run" / "config.toml").unlink()
    error = commands.run(CAPTION, config, *settings).error
    assert str(tmp_path / "run" / "checkpoints" / newest.name / name) in error


def test_manifests_that_lead_elsewhere(learned: Path, tmp_path: Path) -> None:
    (newest,) = (learned / "checkpoints").iterdir()
    folder = shutil.copytree(newest, tmp_path / newest.name)
    os.mkfifo(folder / "pipe")
    for name in ("pipe", "/dev/zero", "../none", ".", ""):
        (folder / "manifest.json").write_text(json.dumps({"step": 60, "files": {name: {"bytes": 1, "sha256": ""}}}))
        assert find_damage(folder) is not None
    (folder / "manifest.json").write_text(DEEP)
    assert find_damage(folder) is not None


# ------------------------------------------------------------------------------------------------------- custom code


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_a_configuration_needs(base: Path, mark: Path, name: str) -> None:
    """Of a model type that transformers doesn't know, the configuration can't be had without it."""
    plant(base, mark)
    content = json.loads((base / name).read_text())
    content |= {"model_type": "planted", "tokenizer_class": "PlantedTokenizer", "architectures": ["Planted"]}
    (base / name).write_text(json.dumps(content))
    if name == "config.json":
        line = refused(lambda: open_all(base), str(base / name), "auto_map", "never run")
        assert "model_type = 'planted'" in line
    else:
        open_all(base)  # tokenizer.json is enough
    assert PLANTED not in json.dumps(sorted(__import__("sys").modules))


# --------------------------------------------------------------------------------------------------- chat templates

LOOP = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
ESCAPES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "attr": "{{ messages|attr('__class__')|attr('__base__') }}",
    "import": "{% import 'os' as os %}{{ os.mkdir('MARK') }}",
    "include": "{% include '/etc/passwd' %}",
    "append": "{{ messages.append(messages[0]) }}",
    "range": "{% for i in range(10000000) %}{% endfor %}",
    "syntax": "{% for %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "raise": "{{ raise_exception('one\ntwo') }}",
    "nothing": "",
}
TOO_MUCH = {
    "time": (LOOP, "more than 3 s"),
    "memory": ("{{ 'a' * 3000000000 }}", "512 MiB"),
    "doubled": ("{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "MiB"),
    "filled": ("{{ 'a'|center(3000000000) }}", "512 MiB"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_leaves_its_sandbox(base: Path, mark: Path, name: str) -> None:
    (base / "chat_template.jinja").write_text(ESCAPES[name].replace("MARK", str(mark)))
    line = refused(lambda: open_all(base), "the chat template")
    assert "root:" not in line  # of /etc/passwd


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_without_end(base: Path, name: str) -> None:
    text, expected = TOO_MUCH[name]
    (base / "chat_template.jinja").write_text(text)
    refused(lambda: open_all(base), str(base), "the chat template takes", expected)


def test_a_template_ends_a_command_in_one_line(world: World, commands: Commands, base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text(ESCAPES["attributes"])
    config = world.config(tmp_path / "run.toml", {"model": {"path": str(base)}})
    error = commands.run(CAPTION, config).error
    assert "SecurityError" in error and "videos.json" in error
    result = commands.run("tools/predict.py", "--model", base, world.root / "red.mp4")
    assert result.status == 1 and "SecurityError" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ Parquet


def test_an_index_whose_columns_are_pickled_types(world: World, tmp_path: Path, mark: Path) -> None:
    """Old releases of pyarrow unpickled a column's type (CVE-2023-47248)."""
    known = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": b""}
    known[b"ARROW:extension:metadata"] = pickle.dumps(Payload(mark))
    field = pa.field("path", pa.string(), metadata=known)
    (tmp_path / "cache").mkdir()
    table = pa.Table.from_arrays([pa.array(["x"])], schema=pa.schema([field], metadata={"scan_version": "1"}))
    pq.write_table(table, tmp_path / "cache" / "media.parquet")
    index = build_index([MediaRef("video", world.root / "red.mp4")], tmp_path / "cache", 1, 30.0)
    assert index.info(MediaRef("video", world.root / "red.mp4")).num_frames == 12
