"""Several processes train what one does: the same samples in each step, the same losses, the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.models.families import FAMILIES
from tests.runs.commands import Commands, column, largest_difference
from tests.runs.world import FULL_TUNING, MIXED, TOWER_LORA, World, make_world

SAME = ("step", "epoch", "num_targets", "tokens", "samples", "lr", "sample_digest")
TWENTY: dict[str, Any] = {"train": {"max_steps": 20, "packs_per_step": 4, "warmup_steps": 2}}
DROPOUT: dict[str, Any] = {"lora": {"dropout": 0.05}}
# AdamW divides by the root of the mean square: without this a gradient that is rounding error alone (of the keys'
# bias, say, which the softmax cancels) would move its weight as far as any other, in a direction of its own.
DAMPED: dict[str, Any] = {"train": {"eps": 1e-3}}

Run = tuple[int, dict[str, Any]]


class Runs:
    """Runs each combination of processes and settings once."""

    def __init__(self, commands: Commands, world: World, folder: Path) -> None:
        self.commands, self.world, self.folder = commands, world, folder
        self.done: dict[str, Path] = {}

    def __call__(self, processes: int, *settings: dict[str, Any]) -> Path:
        """The folder of a run of 20 steps."""
        key = repr((processes, settings))
        if key not in self.done:
            config = self.world.config(self.folder / f"run{len(self.done)}.toml", TWENTY, *settings)
            if processes == 1:
                self.commands.train(config)
            else:
                self.commands.torchrun(processes, config).ok()
            self.done[key] = config.with_suffix("")
        return self.done[key]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_next_video"])
def each_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with a model of each family."""
    if request.param == "qwen2_5_vl":
        return request.getfixturevalue("world")
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def runs(commands: Commands, each_world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What has been trained so far."""
    return Runs(commands, each_world, tmp_path_factory.mktemp("runs"))


def assert_equal(one: Path, several: Path) -> None:
    """The same samples and, within 1e-5, the same losses; and it did learn."""
    losses = column(one, "loss")
    assert losses[-1] < 0.9 * losses[0]
    for key in SAME:
        assert column(several, key) == column(one, key), key
    difference = largest_difference(losses, column(several, "loss"))
    print(f"largest relative difference of a loss: {difference:.1e}")  # pytest -rP shows it
    assert difference <= 1e-5
    # Norms are of gradients that cancel in part, so that rounding shows more.
    assert largest_difference(column(one, "grad_norm"), column(several, "grad_norm")) <= 1e-4


def test_two_processes_adapters_on_all_parts_mixed_media_dropout(runs: Runs) -> None:
    # Most steps give one of the two processes packs without a picture while the other has some.
    settings = (MIXED, TOWER_LORA, DROPOUT)
    one, two = runs(1, *settings), runs(2, *settings)
    assert_equal(one, two)
    files = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    assert files[0].keys() == files[1].keys()
    assert any(".vision_tower." in name or ".visual." in name for name in files[0])
    assert (one / "adapter" / "adapter_config.json").read_bytes() == (
        two / "adapter" / "adapter_config.json"
    ).read_bytes()


def test_two_processes_full_fine_tuning(runs: Runs, each_world: World) -> None:
    settings = (MIXED, FULL_TUNING, DAMPED)
    one, two = runs(1, *settings), runs(2, *settings)
    assert_equal(one, two)
    base, first, second = (
        load_file(folder / "model.safetensors") for folder in (each_world.base, one / "model", two / "model")
    )
    trained = tuple(prefix for part in FAMILIES[each_world.family].towers.values() for prefix in part)
    assert base.keys() == first.keys() == second.keys()
    for name, weight in first.items():
        assert (weight.shape, weight.dtype) == (base[name].shape, base[name].dtype), name
        if not name.endswith("k_proj.bias"):  # which a softmax cancels: its gradient is rounding, or nothing
            assert weight.equal(base[name]) != name.startswith(trained), name
        assert (weight - second[name]).abs().max() <= 1e-5 * weight.abs().max(), name


@pytest.mark.slow
def test_packs_that_two_processes_can_not_share(commands: Commands, world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"train": {"packs_per_step": 3}})
    result = commands.torchrun(2, config)
    assert result.status != 0
    ours = [line for line in result.stderr.splitlines() if "packs_per_step" in line]
    assert len(ours) == 1 and ours[0].startswith("error: train.packs_per_step = 3") and "processes, 2" in ours[0]
    assert not (tmp_path / "run").exists()


VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "replicas": ({"parallel": {"shard": 1}},),
    "recomputed mlp": ({"parallel": {"activation_checkpointing": "mlp"}},),
    "recomputed selectively": ({"parallel": {"activation_checkpointing": "selective"}},),
    "recomputed in full": ({"parallel": {"activation_checkpointing": "full"}},),
    "replicas recomputed": ({"parallel": {"shard": 1, "activation_checkpointing": "full"}},),
}


@pytest.mark.parametrize("mode", [pytest.param("mlp", marks=pytest.mark.slow), "selective", "full"])
def test_recomputing_changes_nothing(runs: Runs, mode: str) -> None:
    settings = (MIXED, TOWER_LORA, DROPOUT)
    changed = runs(1, *settings, {"parallel": {"activation_checkpointing": mode}})
    assert column(changed, "loss") == column(runs(1, *settings), "loss")


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("media", [{}, MIXED], ids=["videos", "mixed"])
def test_two_processes_frozen_tower(runs: Runs, media: dict[str, Any], dropout: dict[str, Any]) -> None:
    assert_equal(runs(1, media, dropout), runs(2, media, dropout))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("parts", [(TOWER_LORA, DROPOUT), (FULL_TUNING, DAMPED)], ids=["lora", "full"])
def test_two_processes_variants(runs: Runs, parts: tuple[dict[str, Any], ...], name: str) -> None:
    assert_equal(runs(1, MIXED, *parts), runs(2, MIXED, *parts, *VARIANTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(TOWER_LORA, DROPOUT), (FULL_TUNING, DAMPED)], ids=["lora", "full"])
def test_four_processes_as_two_replicas_of_two_shards(runs: Runs, parts: tuple[dict[str, Any], ...]) -> None:
    assert_equal(runs(1, MIXED, *parts), runs(4, MIXED, *parts, {"parallel": {"shard": 2}}))


@pytest.mark.slow
def test_evaluation_in_two_processes(runs: Runs) -> None:
    settings = ({"eval": {"every_steps": 20, "max_new_tokens": 12, "batch_size": 1}},)
    one, two = runs(1, *settings), runs(2, *settings)
    files = [folder / "predictions" / "step-000020.jsonl" for folder in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert column(one, "step") == column(two, "step") == [*range(1, 21), 20]
