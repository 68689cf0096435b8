"""Several processes train what one does: the same samples in each step, the same losses, the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.families import FAMILIES
from tests.runs.commands import CAPTION, Commands, column, largest_difference, metrics
from tests.runs.processes import run_together
from tests.runs.world import FULL_TUNING, MIXED, VISION_LORA, World, make_world

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
            if processes > 2:
                self.commands.torchrun(processes, config).ok()
            else:
                for one in run_together(self.commands, processes, CAPTION, config):
                    one.ok()
            self.done[key] = config.with_suffix("")
        return self.done[key]


WORLDS = ("qwen2_5_vl", "llava_next_video", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


@pytest.fixture(scope="module", params=WORLDS)
def each_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with a model of each family."""
    if request.param == "qwen2_5_vl":
        return request.getfixturevalue("world")
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def runs(commands: Commands, each_world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What has been trained so far."""
    return Runs(commands, each_world, tmp_path_factory.mktemp("runs"))


def rounding_of(world: World) -> float:
    """How much more rounding shows in a random model of this family than in the plainest ones."""
    return FAMILIES[world.family].tolerance / 1e-4


def assert_equal(one: Path, several: Path, rounding: float = 1.0) -> None:
    """The same samples and, within 1e-5, the same losses; and it did learn."""
    losses = column(one, "loss")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for key in SAME:
        assert column(several, key) == column(one, key), key
    difference = largest_difference(losses, column(several, "loss"))
    print(f"largest relative difference of a loss: {difference:.1e}")  # pytest -rP shows it
    assert difference <= 1e-5 * rounding
    # Norms are of gradients that cancel in part, so that rounding shows more.
    assert largest_difference(column(one, "grad_norm"), column(several, "grad_norm")) <= 3e-4 * rounding


def and_slowly(family: str, *case: str) -> Any:
    """A case with a model of this family, slow unless it is the first."""
    return pytest.param(family, *case, marks=() if family == WORLDS[0] else pytest.mark.slow)


first_family = pytest.mark.parametrize("each_world", [*map(and_slowly, WORLDS)], indirect=True)
RATES: dict[str, Any] = {"train": {"component_learning_rates": {"vision_encoder": 5e-4}}}
DORA: dict[str, Any] = {"dora": True, "rslora": True, "loraplus_ratio": 4.0, "ranks": {"language_model.q_proj": 3}}
ADAPTERS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (),
    "dora": (DAMPED, RATES, {"lora": DORA}),
    "pissa": (DAMPED, RATES, {"lora": {"init": "pissa"}}),
}


@pytest.mark.parametrize(
    ("each_world", "kind"),
    [*((family, "lora") for family in WORLDS), *(and_slowly(f, kind) for f in WORLDS for kind in ("dora", "pissa"))],
    indirect=["each_world"],
)
def test_two_processes_adapters_on_all_parts_mixed_media_dropout(runs: Runs, kind: str) -> None:
    # Most steps give one of the two processes packs without a picture while the other has some.
    settings = (MIXED, VISION_LORA, DROPOUT, *ADAPTERS[kind])
    folders = [runs(processes, *settings) for processes in (1, 2)]
    assert_equal(*folders)
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    assert any(".vision_tower." in name or ".visual." in name for name in one)
    assert any(name.endswith("lora_magnitude_vector") for name in one) == (kind == "dora")
    assert len({(folder / "adapter" / "adapter_config.json").read_bytes() for folder in folders}) == 1
    for name, tensor in one.items() if DAMPED in settings else ():
        assert (tensor - two[name]).abs().max() <= 1e-4 * tensor.abs().max(), name


def test_two_processes_full_fine_tuning(runs: Runs, each_world: World) -> None:
    settings = (MIXED, FULL_TUNING, DAMPED)
    one, two = runs(1, *settings), runs(2, *settings)
    assert_equal(one, two, rounding_of(each_world))
    base, first, second = (
        load_file(folder / "model.safetensors") for folder in (each_world.base, one / "model", two / "model")
    )
    trained = tuple(prefix for part in FAMILIES[each_world.family].components.values() for prefix in part)
    assert base.keys() == first.keys() == second.keys()
    for name, weight in first.items():
        assert (weight.shape, weight.dtype) == (base[name].shape, base[name].dtype), name
        if not name.endswith("k_proj.bias"):  # which a softmax cancels: its gradient is rounding, or nothing
            assert weight.equal(base[name]) != name.startswith(trained), name
        assert (weight - second[name]).abs().max() <= 1e-5 * rounding_of(each_world) * weight.abs().max(), name


@pytest.mark.slow
def test_packs_that_two_processes_can_not_share(commands: Commands, world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"train": {"packs_per_step": 3}})
    result = commands.torchrun(2, config)
    assert result.status != 0
    ours = [line for line in result.stderr.splitlines() if "packs_per_step" in line]
    assert len(ours) == 1 and ours[0].startswith("error: train.packs_per_step = 3") and "processes, 2" in ours[0]
    assert not (tmp_path / "run").exists()


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicas": (2, {"shard": 1}),
    "recomputed mlp": (2, {"activation_checkpointing": "mlp"}),
    "recomputed selectively": (2, {"activation_checkpointing": "selective"}),
    "recomputed in full": (2, {"activation_checkpointing": "full"}),
    "offloaded": (2, {"offload": "frozen"}),
    "offloaded, recomputed": (2, {"offload": "frozen", "activation_checkpointing": "full"}),
    "kept gathered": (2, {"reshard_after_forward": False}),
    "replicas recomputed": (2, {"shard": 1, "activation_checkpointing": "full"}),
    "two replicas of two shards": (4, {"shard": 2}),
}
"""Number of processes, and settings of [parallel]."""


@first_family
@pytest.mark.parametrize("mode", [pytest.param("mlp", marks=pytest.mark.slow), "selective", "full"])
def test_recomputing_changes_nothing(runs: Runs, mode: str) -> None:
    settings = (MIXED, VISION_LORA, DROPOUT)
    changed = runs(1, *settings, {"parallel": {"activation_checkpointing": mode}})
    assert column(changed, "loss") == column(runs(1, *settings), "loss")


@first_family
def test_offloading_changes_nothing(runs: Runs) -> None:
    """In a process group of one: the same gathering and copying, with nobody to share with."""
    settings = (MIXED, VISION_LORA, DROPOUT)
    assert_equal(runs(1, *settings), runs(1, *settings, {"parallel": {"offload": "frozen"}}))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("media", [{}, MIXED], ids=["videos", "mixed"])
def test_two_processes_frozen_tower(runs: Runs, media: dict[str, Any], dropout: dict[str, Any]) -> None:
    assert_equal(runs(1, media, dropout), runs(2, media, dropout))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("parts", [(VISION_LORA, DROPOUT), (FULL_TUNING, DAMPED)], ids=["lora", "full"])
def test_variants_of_several_processes(runs: Runs, parts: tuple[dict[str, Any], ...], name: str) -> None:
    processes, parallel = VARIANTS[name]
    assert_equal(runs(1, MIXED, *parts), runs(processes, MIXED, *parts, {"parallel": parallel}))


@pytest.mark.slow
def test_going_on_with_other_numbers_of_processes(
    runs: Runs, commands: Commands, each_world: World, tmp_path: Path
) -> None:
    """One, two, four, three and one again, four steps each."""
    packs: dict[str, Any] = {"train": {"packs_per_step": 12, "schedule": "constant"}}
    settings = (MIXED, VISION_LORA, DROPOUT, packs)
    config = each_world.config(tmp_path / "run.toml", TWENTY, *settings)
    for number, processes in enumerate((1, 2, 4, 3, 1)):
        for result in run_together(commands, processes, CAPTION, config, f"train.max_steps={4 * (number + 1)}"):
            result.ok()
    assert_equal(runs(1, *settings), tmp_path / "run")


@pytest.mark.slow
def test_evaluation_in_two_processes(runs: Runs) -> None:
    settings = ({"eval": {"every_steps": 20, "max_new_tokens": 12, "batch_size": 1}},)
    one, two = runs(1, *settings), runs(2, *settings)
    files = [folder / "predictions" / "step-000020.jsonl" for folder in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert column(one, "step") == column(two, "step") == [*range(21), 20]


NF4: dict[str, Any] = {"model": {"quantize": "nf4"}}


@first_family
def test_two_processes_on_a_base_of_4_bits(runs: Runs) -> None:
    """The packed rows are shared out, gathered and read back as whole ones are; so are the encoder's adapters."""
    settings = (MIXED, VISION_LORA, DROPOUT, NF4)
    assert_equal(runs(1, *settings), runs(2, *settings))
    assert column(runs(1, *settings), "loss") != column(runs(1, *settings[:3]), "loss")


@first_family
def test_two_processes_on_a_base_of_4_bits_in_bf16(runs: Runs) -> None:
    """The all-gather casts trained weights to bf16, and must leave bytes alone; answers included."""
    evaluated = {"eval": {"every_steps": 20, "at_start": False, "max_new_tokens": 12, "batch_size": 1}}
    settings = (NF4, {"train": {"precision": "bf16"}}, evaluated)
    one, two = (runs(processes, *settings, {"parallel": {"activation_checkpointing": "full"}}) for processes in (1, 2))
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (one, two)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert largest_difference(*losses) <= 0.02 and losses[0][-1] < 0.9 * losses[0][0]
    files = [folder / "predictions" / "step-000020.jsonl" for folder in (one, two)]
    assert len(files[0].read_text().splitlines()) == len(files[1].read_text().splitlines()) == 4


EXPERTS: dict[str, Any] = {"lora": {"targets": ["language_model.*", "language_model.experts.*"]}}
of_experts = pytest.mark.parametrize(
    "each_world", ["qwen3_vl_moe", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)], indirect=True
)


@of_experts
@pytest.mark.parametrize("base", [(), (NF4,)], ids=["whole", "nf4"])
def test_two_processes_adapters_of_experts(runs: Runs, base: tuple[dict[str, Any], ...]) -> None:
    settings = (MIXED, EXPERTS, DAMPED, *base)
    folders = [runs(processes, *settings) for processes in (1, 2)]
    assert_equal(*folders)
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert sum(".experts." in name for name in one) in (2 * 4, 3 * 4)  # A and B of two matrices in a layer
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-4 * tensor.abs().max(), name


@of_experts
def test_adapters_of_experts_recomputed_and_gone_on_with(
    runs: Runs, commands: Commands, each_world: World, tmp_path: Path
) -> None:
    """By another number of processes."""
    settings = (MIXED, EXPERTS, DAMPED)
    recomputed: dict[str, Any] = {"parallel": {"activation_checkpointing": "full"}}
    config = each_world.config(tmp_path / "run.toml", TWENTY, *settings, recomputed)
    for one in run_together(commands, 2, CAPTION, config, "train.max_steps=3"):
        one.ok()
    commands.train(config)
    # The schedule of the first steps was a shorter one.
    assert column(tmp_path / "run", "loss")[:2] == pytest.approx(column(runs(1, *settings), "loss")[:2], rel=1e-5)
    undisturbed = each_world.config(tmp_path / "other.toml", TWENTY, *settings)
    commands.train(undisturbed, "train.max_steps=3")
    commands.train(undisturbed)
    assert_equal(tmp_path / "other", tmp_path / "run")


@pytest.mark.parametrize(
    ("each_world", "parts"),
    [
        ("qwen3_vl_moe", (FULL_TUNING,)),  # rounding alone moves the recurrent family's losses by more in 20 steps
        ("qwen3_vl_moe", (EXPERTS,)),
        pytest.param("qwen3_5_moe", (EXPERTS,), marks=pytest.mark.slow),
    ],
    indirect=["each_world"],
)
def test_two_processes_routing_loss(runs: Runs, parts: tuple[dict[str, Any], ...]) -> None:
    """Each pack has its own, whichever process has it; experts are counted over all."""
    settings = (MIXED, *parts, DAMPED, {"train": {"routing_loss": 0.5}})
    one, two = runs(1, *settings), runs(2, *settings)
    assert_equal(one, two)
    assert column(one, "loss") != column(runs(1, *settings[:-1]), "loss")
    for name in ("routing_loss", "expert_load_max", "expert_load_min", "experts_unused"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5), name
