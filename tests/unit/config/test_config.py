"""Strict settings: round trip, errors of one line, overrides, what a resumed run may change."""

from __future__ import annotations

import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import vft.data.formats  # noqa: F401  checks the sources
from vft.common.errors import UserError
from vft.config import run as config
from vft.config.run import Config, differences, dump, load
from vft.config.toml import COUNTERPARTS, show

SMALL = """
output_dir = "runs/x"
[model]
path = "m"
[lora]
rank = 8
alpha = 16
[data]
root = "d"
sources = [{format = "messages", path = "a.jsonl"}, {format = "llava_video", path = "b.json", weight = 2}]
[data.video]
fps = 1
[train]
max_steps = 20
warmup_steps = 2
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_arrive(small: Path) -> None:
    got = load(small)
    assert got.output_dir == Path("runs/x")
    assert got.lora is not None
    assert (got.lora.rank, got.lora.alpha, got.lora.targets) == (8, 16.0, ("language_model.*",))
    assert [(s.path, s.weight, s.take) for s in got.data.sources] == [("a.jsonl", None, "all"), ("b.json", 2.0, "all")]
    assert (got.data.video.fps, got.data.video.frames) == (1.0, None)
    assert (got.train.max_steps, got.train.epochs) == (20, None)


def test_one_of_two_is_filled_in(small: Path) -> None:
    got = load(small, ["data.video=", "train.max_steps=", "data.video.max_frames=8"])
    assert (got.data.video.fps, got.data.video.frames) == (2.0, None)
    assert (got.train.max_steps, got.train.epochs) == (None, 1)


@given(
    st.fixed_dictionaries(
        {
            "output_dir": st.from_regex(r"[\w./ \"'#=\\-]+", fullmatch=True),
            "seed": st.integers(0, 2**63 - 1),
            "model": st.fixed_dictionaries({"path": st.text(st.characters(exclude_categories=["Cs"]), min_size=1)}),
        },
        optional={
            "lora": st.fixed_dictionaries({"alpha": st.floats(1e-300, 1e300), "dropout": st.floats(0, 0.999)}),
            "data": st.fixed_dictionaries(
                {"video": st.fixed_dictionaries({"frames": st.integers(1, 10**6)})},
                optional={"sources": st.just([{"format": "llava_video", "path": "x", "take": "random:7"}])},
            ),
            "train": st.fixed_dictionaries({"learning_rate": st.floats(1e-300, 1e300), "epochs": st.integers(1, 99)}),
        },
    )
)
def test_dump_round_trips(tmp_path_factory: pytest.TempPathFactory, table: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("round") / "c.toml"
    before = Config.model_validate(table)
    path.write_text(dump(before), encoding="utf-8")
    assert load(path) == before
    assert differences(load(path), before, ignore=()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[data.video]\nfpz = 2", "data.video.fpz = 2: unknown key; did you mean fps?"),
        ("[train]\nlearning_rate = -1", "train.learning_rate = -1: must be greater than 0"),
        ("[train]\nlearning_rate = nan", "train.learning_rate = NaN: must be a finite number"),
        ("[trian]\nmax_steps = 3", "[trian]: unknown section; did you mean train?"),
        ("learning_rate = 1e-4", "learning_rate = 0.0001: unknown key; did you mean train.learning_rate?"),
        (
            "[lora]\nradius = 4",
            "lora.radius = 4: unknown key; known here: rank, alpha, dropout, targets, rslora, ranks, alphas, "
            "dora, init, loraplus_ratio",
        ),
        ("[lora]\ndropout = 1.0", "lora.dropout = 1.0: must be less than 1"),
        ("[lora]\nrank = 8.0", "lora.rank = 8.0: must be a whole number; write 8"),
        ("[lora]\nrank = true", "lora.rank = true: must be a whole number"),
        (
            "[train.component_learning_rates]\ntower = 1e-5",
            "train.component_learning_rates.tower = \"tower\": must be 'language_model', 'vision_encoder' or "
            "'projector'",
        ),
        ("[lora]\nrslora = 1", "lora.rslora = 1: must be true or false"),
        ("[lora]\ntargets = []", "lora.targets = []: must not be empty"),
        ('[train]\nlearning_rate = "1e-4"', 'train.learning_rate = "1e-4": must be a number; write 0.0001'),
        ('[train]\nprecision = "fp16"', "train.precision = \"fp16\": must be 'bf16' or 'fp32'"),
        ("[train]\nbetas = [0.9, 1.0]", "train.betas.1 = 1.0: must be less than 1"),
        (
            "[[data.sources]]\npath = 'x'",
            "data.sources.0.format: missing; How the records are laid out: a module of `vft/data/formats/`, or "
            "`module:Class` of your own",
        ),
        ("[[data.sources]]\nformat = 'messages'\npath = 3", "data.sources.0.path = 3: must be a string"),
        ("[lora]\nr = 4", "lora.r = 4: unknown key; here it is lora.rank"),
        (
            "[data]\nsources = 'a.jsonl'",
            'data.sources = "a.jsonl": must be a list, such as '
            'data.sources = [{format = "messages", path = "a.jsonl"}]',
        ),
        (
            "objective = 'dpo'",
            'objective = "dpo": must be a table; its settings are objective.kind, objective.beta, objective.reference, '
            "objective.reference_passes, objective.label_smoothing, objective.gamma, objective.desirable_weight, "
            "objective.undesirable_weight, objective.rpo_alpha",
        ),
        ("lora = false", "lora = false: must be a table; lora= takes it out"),
        (
            "data.sources = ['a.jsonl']",
            'data.sources.0 = "a.jsonl": must be a table, such as {format = "messages", path = "a.jsonl"}',
        ),
    ],
)
def test_message(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'output_dir = "x"\nmodel.path = "m"\n{line}\n')
    assert error_of(path) == f"{path}: {message}"


def test_message_of_bare_target_names_the_towers(small: Path) -> None:
    message = error_of(small, 'lora.targets=["q_proj"]')
    assert 'lora.targets.0 = "q_proj"' in message
    assert "language_model.q_proj" in message


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["data.video.frames=8"], ["fps = 1.0", "frames = 8", "contradict", "data.video.fps= keeps frames"]),
        (["train.epochs=2"], ["max_steps = 20", "epochs = 2", "contradict"]),
        (['model.train=["projector"]'], ["projector", "[lora]", "contradict"]),
        (["lora=", 'model.train=["projector"]', "model.quantize=nf4"], ["model.quantize", "nf4", "[lora] table"]),
        (["data.video.min_frames=40"], ["min_frames = 40", "max_frames = 32"]),
        (["data.video.max_pixels=100"], ["data.video", "min_pixels = 3136", "max_pixels = 100"]),
        (["data.image.max_pixels=100"], ["data.image", "min_pixels = 3136", "max_pixels = 100"]),
        (["data.video.total_pixels=100"], ["min_pixels = 3136", "total_pixels = 100"]),
        (["parallel.offload=frozen", "parallel.reshard_after_forward=false"], ["offload", "reshard_after_forward"]),
        (["train.warmup_steps=21"], ["warmup_steps = 21", "max_steps = 20"]),
    ],
)
def test_contradiction_names_both_values(small: Path, overrides: list[str], names: list[str]) -> None:
    message = error_of(small, *overrides)
    assert message.startswith(f"{small} and command line: ")
    for name in names:
        assert name in message


def test_no_contradiction_at_the_bounds(small: Path) -> None:
    load(small, ["train.warmup_steps=20", "data.video.min_frames=32", "data.video.min_pixels=100352"])


def test_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("a = 1\nb = = 2\n")
    assert re.search(r"c\.toml: not TOML: .*line 2, column 5", error_of(path))
    path.write_bytes(b"a = '\xff'")
    assert error_of(path) == f"{path}: not TOML: byte 5 is not UTF-8"
    assert error_of(tmp_path / "absent.toml") == f"{tmp_path}/absent.toml: no such file"


def test_overrides(small: Path) -> None:
    got = load(
        small,
        [
            "train.schedule=linear",
            "train.learning_rate=3e-5",
            "model.path=Qwen/Qwen2.5-VL-7B-Instruct",
            "data.sources.1.path=other.json",
            "log.tensorboard=true",
            'lora.targets=["projector.*", "language_model.q_proj"]',
            "output_dir=runs/a = b",
        ],
    )
    assert (got.train.schedule, got.train.learning_rate) == ("linear", 3e-5)
    assert got.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert [source.path for source in got.data.sources] == ["a.jsonl", "other.json"]
    assert got.log.tensorboard is True
    assert got.lora is not None and got.lora.targets == ("projector.*", "language_model.q_proj")
    assert got.output_dir == Path("runs/a = b")


def test_empty_override_takes_away(small: Path) -> None:
    got = load(small, ["lora=", 'model.train=["projector"]', "data.sources.0=", "checkpoint.every_steps="])
    assert got.lora is None
    assert [source.path for source in got.data.sources] == ["b.json"]
    assert load(small, ["lora=", "lora.rank="]).lora is None  # Taking nothing away makes no table.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "train.max_steps: an override is section.key=value"),
        ("=3", "=3: an override is section.key=value"),
        ("train.max_steps=abc", 'train.max_steps = "abc": must be a whole number'),
        ("train.max_stepz=4", "train.max_stepz = 4: unknown key; did you mean max_steps?"),
        ("train.max_steps.x=4", "train.max_steps.x=4: train.max_steps = 20 is not a table"),
        ("data.sources.2.path=c", "data.sources.2.path=c: data.sources has 2 entries, counted from 0; no 2"),
        (
            "data.sources.x.path=c",
            "data.sources.x.path=c: data.sources has 2 entries, counted from 0; no x"
            "; did you mean data.sources.0.x.path?",
        ),
        ("seed=1\nother = 2", 'seed = "1\\nother = 2": must be a whole number'),
    ],
)
def test_message_of_override(small: Path, override: str, message: str) -> None:
    assert error_of(small, override) == f"command line: {message}"


def test_a_list_whose_quotes_the_shell_took(small: Path) -> None:
    config = load(small, ["lora.targets=[language_model.*, projector.*]", "model.train=", "lora.ranks="])
    assert config.lora is not None and config.lora.targets == ("language_model.*", "projector.*")
    assert '"language_model.q_proj"' in error_of(small, "lora.targets=[q_proj]")
    sources = load(small, ["data.sources=[{format=messages,path=a.jsonl,repeats=2}]"]).data.sources
    assert [(source.format, source.path, source.repeats) for source in sources] == [("messages", "a.jsonl", 2)]
    assert """texts need "", and the whole '' for the shell""" in error_of(small, "lora.targets=[a b]")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("lora.targets=all", 'must be a list, and of its entries "all" must begin with a component'),
        ("lora.targets=(projector.a, projector.b)", 'such as lora.targets = ["projector.a", "projector.b"]'),
        ("train.betas=0.9,0.95", "such as train.betas = [0.9, 0.95]"),
        ("train.betas=0.9", "such as train.betas = [0.9, 0.999]"),
        ("train.learning_rate=.0001", "write 0.0001"),
        ("train.learning_rate=1e−4", "write 0.0001"),
        ("eval.split=10%", "write 0.1"),
        ("train.max_steps=1e3", "write 1000"),
        ("train.max_steps=1,000", "write 1000"),
        ("data.video.max_pixels=224x224", "write 50176"),
        ("parallel.compile=yes", "parallel.compile = \"yes\": must be true or false, or 'auto'"),
        ("parallel.shard=-1", "parallel.shard = -1: must be greater than or equal to 0, or 'auto'"),
        ("objective.beta=1", "command line: objective.kind: missing; The loss"),
        ("data.sources.path=c", "did you mean data.sources.0.path?"),
        ("lora.ranks=16", "lora.ranks = 16: must be a table"),
        ("data.sources.0.limit.x=1", "data.sources.0.limit"),
        ("deepspeed=z3.json", "unknown key; there is none here: shards and copies are chosen by parallel.shard"),
        ("train.val_size=0.1", "unknown key; here it is eval.split"),
    ],
)
def test_the_fix_is_told(small: Path, override: str, fix: str) -> None:
    assert fix in error_of(small, override)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert error_of(tmp_path / "run") == f"{tmp_path}/run: is a folder, not a file"
    (tmp_path / "run" / "config.toml").touch()
    assert error_of(tmp_path / "run").endswith(f"is a folder, not a file; name {tmp_path}/run/config.toml")
    (tmp_path / "c.yaml").write_text("lora:\n")
    assert f"; `vft config import {tmp_path}/c.yaml` reads" in error_of(tmp_path / "c.yaml")


def test_what_other_trainers_call_it(small: Path) -> None:
    """Each counterpart is a setting that there is."""
    assert "train.packs_per_step, the rows" in error_of(small, "train.batch_size=4")
    for name, ours in COUNTERPARTS.items():
        key = ours.partition(",")[0]
        wrong = name.replace("sources.", "sources.0.") if "." in name else f"train.{name}"
        assert error_of(small, f"{wrong}=1") in (
            f"{where}command line: {wrong} = 1: unknown key; here it is {ours}" for where in ("", f"{small} and ")
        )
        assert "unknown" not in error_of(small, f"{key}=[3]"), key  # known, and no list of numbers


def test_unfinished_toml_value_is_no_string(small: Path) -> None:
    assert "not a TOML value" in error_of(small, 'lora.targets=["projector.*"')


def test_training_needs_something_to_train_and_to_read(small: Path) -> None:
    load(small).require_training()
    for overrides, key in [
        (["lora="], "model.train"),
        (["data.sources="], "data.sources"),
        (["lora=", 'model.train=["projector"]', "model.adapter=runs/a"], "model.adapter"),
    ]:
        with pytest.raises(UserError, match=re.escape(key)):
            load(small, overrides).require_training()


def test_differences(small: Path) -> None:
    a = load(small)
    b = load(small, ["lora.rank=4", "train.max_steps=40", "data.sources.1.weight=3.0", "checkpoint.keep_last=9"])
    assert differences(a, b) == [("lora.rank", 8, 4), ("data.sources.1.weight", 2.0, 3.0)]
    everything = {key for key, _, _ in differences(a, b, ignore=())}
    assert everything == {"lora.rank", "data.sources.1.weight", "train.max_steps", "checkpoint.keep_last"}
    full = load(small, ["lora=", 'model.train=["projector"]'])
    assert ("lora.rank", 8, None) in differences(a, full)
    assert ("model.train", [], ["projector"]) in differences(a, full)


def test_resume_may_change_names_real_keys(small: Path) -> None:
    known = {".".join(key.split(".")[:n]) for key in config.flatten(load(small).model_dump()) for n in (1, 2)}
    assert known >= config.RESUME_MAY_CHANGE


def test_frozen(small: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(small).train.learning_rate = 1.0  # type: ignore[misc]


def test_home_folder(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert load(small, ["output_dir=~/runs"]).output_dir == Path("/home/x/runs")


def test_cache_folder(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("VFT_CACHE", raising=False)
    assert load(small).data.cache_path == Path("/home/x/.cache/vft")
    monkeypatch.setenv("VFT_CACHE", "/elsewhere")
    assert load(small).data.cache_path == Path("/elsewhere")
    assert load(small, ["data.cache_dir=~/here"]).data.cache_path == Path("/home/x/here")


# ----------------------------------------------------------------------------------------- names of earlier versions

HEAD = 'output_dir = "x"\nmodel.path = "m"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.toml"


@pytest.mark.parametrize(
    ("old", "text", "new", "expected"),
    [
        ("data.clip_deadline_s", "5.0", "data.decode_timeout_s", 5.0),
        ("parallel.tower_checkpointing", '"full"', "parallel.vision_checkpointing", "full"),
    ],
)
def test_an_old_key(
    file: Path, caplog: pytest.LogCaptureFixture, old: str, text: str, new: str, expected: object
) -> None:
    file.write_text(f"{HEAD}{old} = {text}\n")
    assert attrgetter(new)(load(file)) == expected
    assert caplog.messages == [f"{file}: {old} is called {new} now"]
    file.write_text(HEAD)
    assert attrgetter(new)(load(file, [f"{old}={text}"])) == expected, "on the command line"
    file.write_text(f"{HEAD}{old} = {text}\n{new} = {text}\n")
    with pytest.raises(UserError) as both:
        load(file)
    name = new.rpartition(".")[2]
    shown = show(expected)
    assert str(both.value) == f"{file}: {old} = {shown}: unknown key; did you mean {name}?" or old in str(both.value)


def test_the_command_line_goes_before_the_file_under_either_name(file: Path) -> None:
    for in_file, override in (("clip_deadline_s", "decode_timeout_s"), ("decode_timeout_s", "clip_deadline_s")):
        file.write_text(f"{HEAD}data.{in_file} = 5.0\n")
        assert load(file, [f"data.{override}=7.0"]).data.decode_timeout_s == 7.0


def test_old_names_of_components(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(
        f'{HEAD}[lora]\ntargets = ["language_model.*", "vision_tower.qkv", "merger.*"]\n'
        'ranks = {"vision_tower.qkv" = 4}\nalphas = {"merger.*" = 8.0}\n'
        "[train]\ntower_learning_rates = {vision_tower = 1e-5, merger = 2e-5}\n"
    )
    config = load(file)
    assert config.lora is not None
    assert config.lora.targets == ("language_model.*", "vision_encoder.qkv", "projector.*")
    assert config.lora.ranks == {"vision_encoder.qkv": 4} and config.lora.alphas == {"projector.*": 8.0}
    assert config.train.component_learning_rates == {"vision_encoder": 1e-5, "projector": 2e-5}
    assert caplog.messages == [
        f"{file}: {line} now"
        for line in (
            "train.tower_learning_rates is called train.component_learning_rates",
            "lora.targets: vision_tower.qkv is called vision_encoder.qkv",
            "lora.targets: merger.* is called projector.*",
            "lora.ranks: vision_tower.qkv is called vision_encoder.qkv",
            "lora.alphas: merger.* is called projector.*",
            "train.component_learning_rates: vision_tower is called vision_encoder",
            "train.component_learning_rates: merger is called projector",
        )
    ]


def test_old_names_of_components_on_the_command_line(file: Path) -> None:
    file.write_text(HEAD)
    config = load(file, ['model.train=["vision_tower"]', "train.tower_learning_rates.vision_tower=1e-5"])
    assert config.model.train == ("vision_encoder",)
    assert config.train.component_learning_rates == {"vision_encoder": 1e-5}


def test_a_source_is_not_left_unchecked() -> None:
    """Formats are above the settings, and register their checks when they are imported."""
    code = "from vft.config.data import SourceConfig; SourceConfig(format='no such', path='a')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: import vft.data.formats")
