"""Settings under the names of earlier versions: read as before, with a warning for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from vft.common.errors import UserError
from vft.config.run import Config, load
from vft.config.toml import show

HEAD = 'output_dir = "x"\nmodel.path = "m"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.toml"


def value(config: Config, key: str) -> object:
    """The setting with this dotted key."""
    found: object = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


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
    assert value(load(file), new) == expected
    assert caplog.messages == [f"{file}: {old} is called {new} now"]
    file.write_text(HEAD)
    assert value(load(file, [f"{old}={text}"]), new) == expected, "on the command line"
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
