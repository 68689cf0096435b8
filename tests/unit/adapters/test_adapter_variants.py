"""DoRA, PiSSA, LoRA+, ranks by pattern and learning rates by encoder, beside PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.adapters import adapted, difference, disturb, exported, logits_of, video_batch
from tests.helpers.allocations import allocated_peak
from tests.helpers.tiny import CPU, Tiny, assert_same_gradients, load_prepared, loss_and_gradients
from tests.unit.adapters.test_lora import VARIANTS
from vft.adapters.lora import LoRALinear, initialise, lora_scale, principal_part
from vft.adapters.peft_format import Adapter, attach, check_adapter
from vft.adapters.targets import choose_trainable
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.run import Config, LoraConfig, TrainConfig
from vft.models import build
from vft.models.pretrained import Pretrained
from vft.parallel.parallelize import checkpoint_activations
from vft.preparation.memory import MODES, resident_bytes, run_step
from vft.training.losses import cross_entropy
from vft.training.optimizer import build_optimizer, set_learning_rate


@pytest.fixture(scope="module")
def batch(tiny: Tiny) -> Batch:
    return video_batch(tiny)


# ------------------------------------------------------------------------------------------------ layers beside PEFT


class Small(nn.Module):
    """One linear layer with a bias as large as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(48, 32)
        nn.init.normal_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


AB = ("lora_A", "lora_B")


def peft_layer(**settings: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(Small(), PeftConfig(r=4, lora_alpha=6, target_modules=["proj"], **settings))
    return model.base_model.model.proj


def outcome(layer: nn.Module, dropout_seed: int = 7) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the input, of an uneven loss."""
    x = torch.randn(5, 9, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(dropout_seed)
    out = layer(x)
    layer.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def assert_same_layer(ours: LoRALinear, theirs: Any, *parameters: tuple[Tensor, Tensor]) -> None:
    """Output, and gradients of the input and of these pairs of parameters beside A and B, up to rounding."""
    pairs = list(zip(outcome(ours), outcome(theirs), strict=True))
    for own, other in (*parameters, *((getattr(ours, m).weight, getattr(theirs, m)["default"].weight) for m in AB)):
        assert own.grad is not None
        pairs.append((own.grad, other.grad))
    for one, other in pairs:
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_dora_layer_is_pefts(dropout: float, rslora: bool, training: bool) -> None:
    theirs = peft_layer(use_dora=True, use_rslora=rslora, lora_dropout=dropout, init_lora_weights=False)
    base = nn.Linear(48, 32)
    base.load_state_dict(theirs.base_layer.state_dict())
    ours = LoRALinear(base, LoraConfig(rslora=rslora, dropout=dropout, dora=True), 4, 6).requires_grad_(True)
    change, magnitude = ours.lora_magnitude_change, theirs.lora_magnitude_vector["default"].weight
    assert change is not None
    with torch.no_grad():
        ours.lora_A.weight.copy_(theirs.lora_A["default"].weight)
        ours.lora_B.weight.copy_(theirs.lora_B["default"].weight)
        magnitude.mul_(torch.linspace(0.5, 1.5, 32))
        change.copy_(magnitude - base.weight.norm(dim=1))
    ours.train(training)
    theirs.train(training)
    assert_same_layer(ours, theirs, (change, magnitude))
    assert difference(outcome(theirs)[0], base(torch.zeros(48))) > 0.1


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pissa_layer_is_pefts(dropout: float, rslora: bool) -> None:
    """On the weight as it was, with the start subtracted: what PEFT computes on the residual."""
    theirs = peft_layer(init_lora_weights="pissa", use_rslora=rslora, lora_dropout=dropout)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.manual_seed(3)
    plain, scale = Small().proj, lora_scale(4, 6, rslora)
    assert not torch.equal(plain.weight, theirs.base_layer.weight)
    own_a, own_b = principal_part(plain.weight.detach(), 4, scale, "pissa", 0)
    # Singular vectors are known up to their signs, their products aren't.
    torch.testing.assert_close(own_b @ own_a, (b @ a).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_a.norm(dim=1), own_b.norm(dim=0), rtol=1e-5, atol=1e-6)
    ours = LoRALinear(plain, LoraConfig(rslora=rslora, dropout=dropout, init="pissa"), 4, 6)
    assert ours.lora_A0 is not None and ours.lora_B0 is not None
    with torch.no_grad():
        ours.lora_A0.copy_(a)
        ours.lora_B0.copy_(b)
        for weight in (a, b):
            weight.add_(0.1 * torch.randn_like(weight))
        ours.lora_A.weight.copy_(a)
        ours.lora_B.weight.copy_(b)
    assert_same_layer(ours, theirs)


def test_fast_decomposition() -> None:
    """Near the exact one where singular values fall off, as those of trained weights do; a matter of the seed alone."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 40, generator=generator))[0] for size in (60, 40))
    weight = u * 0.7 ** torch.arange(40) @ v.T
    a, b = principal_part(weight, 8, 2.0, "pissa_niter_4", 5)
    before = torch.get_rng_state()
    again = principal_part(weight, 8, 2.0, "pissa_niter_4", 5)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1]) and torch.equal(before, torch.get_rng_state())
    exact = principal_part(weight, 8, 2.0, "pissa", 0)
    assert float((2 * (b @ a - exact[1] @ exact[0])).norm()) <= 0.01 * float((2 * exact[1] @ exact[0]).norm())
    left = float((weight - 2 * exact[1] @ exact[0]).norm())
    assert left == pytest.approx(math.sqrt(sum(0.7 ** (2 * i) for i in range(8, 40))), rel=1e-4)


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in VARIANTS if "ranks of" not in name])
def test_every_variant_starts_as_the_base(tiny: Tiny, batch: Batch, name: str, dtype: torch.dtype) -> None:
    """To the last bit; PEFT's PiSSA is off by what the residual loses in rounding."""
    lora = VARIANTS[name]
    plain = load_prepared(tiny.path, lambda it: None, dtype)[0]
    model = load_prepared(tiny.path, lambda it: choose_trainable(it, lora, ()), dtype)[0]
    initialise(model, 0)
    assert torch.equal(logits_of(model, batch), logits_of(plain, batch))


def test_pissa_of_peft_starts_where_ours_does(tiny: Tiny) -> None:
    lora = LoraConfig(rank=4, alpha=6, init="pissa", targets=("language_model.q_proj", "vision_encoder.qkv"))
    model, _ = adapted(tiny, lora)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": r".*(q_proj|qkv)"}
    theirs = get_peft_model(tiny.load(tiny.path), PeftConfig(init_lora_weights="pissa", **settings))
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert len(found) == 6
    for name, layer in found.items():
        other = theirs.base_model.model.get_submodule(model.peft_name(name))
        wanted = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B.weight @ layer.lora_A.weight, wanted, rtol=1e-4, atol=1e-5)


def test_pissa_is_exported_as_a_plain_adapter(tiny: Tiny, tmp_path: Path) -> None:
    exported(tiny, tmp_path / "adapter", VARIANTS["pissa"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["init_lora_weights"]) == (8, 16, False, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    shapes = {tuple(t.shape) for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()}
    assert (8, 64) in shapes and (64, 8) in shapes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_recomputing_changes_nothing(tiny: Tiny, batch: Batch, name: str, mode: str) -> None:
    """Under each mode of activation checkpointing, with dropout; and what a step holds is known beforehand."""
    lora = VARIANTS[name].model_copy(update={"dropout": 0.2})
    results = []
    for one in ("none", mode):
        model = adapted(tiny, lora)[0]
        disturb(model)
        checkpoint_activations(model, one)
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, batch))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1])
    made = build(Pretrained.open(str(tiny.path)), torch.float32)
    choose_trainable(made, lora, ())
    checkpoint_activations(made, mode)
    weights = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())
    assert resident_bytes(made, 1) == weights
    model.zero_grad()
    planned = run_step(made, cross_entropy, batch, CPU).peak
    assert planned == pytest.approx(allocated_peak(lambda: cross_entropy(model, batch).backward()), rel=0.03)


def test_lengths_are_kept_only_while_a_model_answers(tiny: Tiny, batch: Batch) -> None:
    """After a step between two evaluations the second one sees it."""
    model = adapted(tiny, VARIANTS["dora"])[0]
    disturb(model)
    model.eval()
    before = logits_of(model, batch)
    assert torch.equal(before, logits_of(model, batch))
    model.train()
    disturb(model, seed=1)
    model.eval()
    found = logits_of(model, batch)
    model.train()
    assert difference(before, found) > 0.01
    assert torch.equal(found, logits_of(model, batch))  # dropout is 0: training computes everything anew


def test_training_goes_on_from_an_adapter_of_its_kind(tiny: Tiny, batch: Batch, tmp_path: Path) -> None:
    """To the last bits; with other settings it would be another function, and is refused with both values."""
    ours = exported(tiny, tmp_path / "adapter", VARIANTS["dora ranks rslora"])
    files = Adapter.open(tmp_path / "adapter", ours.spellings)
    for change, named in (
        ({"dora": False}, "use_dora = True, but lora.dora = False"),
        ({"rslora": False}, "scale .* but .* by the"),
        ({"ranks": {}}, "scale .* for model.layers.*, but"),
    ):
        lora = VARIANTS["dora ranks rslora"].model_copy(update=change)
        other, checkpoint = adapted(tiny, lora)
        with pytest.raises(UserError, match=named):
            check_adapter(files, other, checkpoint)
    again, checkpoint = adapted(tiny, VARIANTS["dora ranks rslora"], seed=4)
    check_adapter(files, again, checkpoint)
    files.load_into(again)
    attached, _ = load_prepared(tiny.path, lambda it: attach(it, files))
    files.load_into(attached)
    for model in (again.eval(), attached.eval()):
        assert difference(logits_of(model, batch), logits_of(ours, batch)) <= 1e-5


# ------------------------------------------------------------------------------------------------ patterns, rates


def test_ranks_by_pattern(tiny: Tiny, tmp_path: Path) -> None:
    """The first that fits counts, here and in PEFT's file; layer numbers are left open where all agree."""
    model = exported(tiny, tmp_path / "adapter", VARIANTS["ranks"])
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, layer in layers.items():
        rank = 6 if name.endswith("q_proj") else 3 if ".layers.1." in name else 2
        assert (layer.lora_A.out_features, layer.scale) == (rank, 7.5 / rank), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 5 and set(config["alpha_pattern"].values()) == {7.5}
    assert config["rank_pattern"].pop(r"model\.language_model\.layers\.\d+\.self_attn\.q_proj") == 6
    assert len(config["rank_pattern"]) == 6 and set(config["rank_pattern"].values()) == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": {"language_model.qkv": 3}}, r"lora\.ranks = 'language_model.qkv': matches no linear layer"),
        ({"ranks": {"projector.*": 3}}, r"lora\.ranks = 'projector\.\*': none of its layers is among lora\.targets"),
        (
            {"alphas": {"language_model.*": 3.0, "language_model.q_proj": 4.0}},
            r"lora\.alphas = 'language_model.q_proj': patterns before it match all of its layers",
        ),
        (
            {"init": "pissa", "ranks": {"language_model.k_proj": 33}},
            r"lora\.rank = 33 with lora\.init = \"pissa\": model\.layers\.0\.self_attn\.k_proj is 32 x 64",
        ),
    ],
)
def test_patterns_that_decide_nothing(tiny: Tiny, settings: dict[str, Any], message: str) -> None:
    made = build(Pretrained.open(str(tiny.path)), torch.float32)
    with pytest.raises(UserError, match=message):
        choose_trainable(made, LoraConfig(**settings), ())


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("dora", [False, True])
def test_loraplus_groups_are_pefts(tiny: Tiny, dora: bool) -> None:
    lora = LoraConfig(rank=4, targets=("language_model.q_proj",), loraplus_ratio=16, dora=dora)
    model, _ = adapted(tiny, lora)
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-3), model.components, lora)
    set_learning_rate(optimizer, 1e-3)
    settings = PeftConfig(r=4, target_modules=r".*language_model.*q_proj", use_dora=dora)
    theirs = get_peft_model(tiny.load(tiny.path), settings)
    wanted = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    def short(rates: dict[str, float]) -> dict[str, float]:
        """By layer number and leaf: the names differ."""
        renamed = {n.replace("magnitude_vector.default.weight", "magnitude_change"): r for n, r in rates.items()}
        return {n.replace(".default", "").split("layers.")[1]: r for n, r in renamed.items()}

    assert short(rates_of(optimizer, model)) == pytest.approx(short(rates_of(wanted, theirs)))
    assert len(rates_of(optimizer, model)) == 3 * (3 if dora else 2)
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in [g["params"][0].dim()]}
    assert decay[2] == TrainConfig().weight_decay and decay.get(1, 0.0) == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"path": "m", "train": ["language_model", "vision_encoder", "projector"]}},
        {"model": {"path": "m"}, "lora": {"targets": ["language_model.*", "vision_encoder.*"], "loraplus_ratio": 4}},
    ],
    ids=["full", "lora"],
)
def test_learning_rates_of_towers(tiny: Tiny, settings: dict[str, Any]) -> None:
    """AdamW's first step moves every weight by its learning rate, whatever the gradient: so they can be read off."""
    rates = {"learning_rate": 1e-2, "component_learning_rates": {"vision_encoder": 1e-3}, "eps": 1e-30}
    config = Config.model_validate({"output_dir": "x", "train": rates, **settings})
    model, _ = load_prepared(tiny.path, lambda it: choose_trainable(it, config.lora, config.model.train))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.ones_like(parameter))
    optimizer = build_optimizer(model, config.train, model.components, config.lora)
    set_learning_rate(optimizer, 0.5 * 1e-2)  # as in the middle of a decay
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {n: 1 - float(p.detach().flatten()[0]) for n, p in model.named_parameters() if p.requires_grad}
    for name, distance in moved.items():
        wanted = 0.5 * (1e-3 if name.startswith(("visual.blocks.", "visual.patch_embed.")) else 1e-2)
        wanted *= 4 if name.endswith("lora_B.weight") else 1
        assert distance == pytest.approx(wanted, rel=1e-3), name
    assert len({round(distance, 5) for distance in moved.values()}) == (4 if config.lora else 2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"lora": {"dora": True, "init": "pissa"}}, 'dora = true and init = "pissa" contradict'),
        ({"lora": {"init": "svd"}}, '"pissa_niter_N"'),
        ({"lora": {"loraplus_ratio": 0.5}}, "greater than or equal to 1"),
        ({"lora": {"ranks": {"q_proj": 3}}}, "must begin with a component"),
        (
            {"lora": {"init": "pissa"}, "model": {"path": "m", "adapter": "a"}},
            'model.adapter = "a" and lora.init = "pissa" contradict',
        ),
        (
            {"lora": {}, "train": {"component_learning_rates": {"projector": 1e-5}}},
            "train.component_learning_rates.projector = 1e-05: nothing of it is trained by lora.targets",
        ),
        (
            {
                "model": {"path": "m", "train": ["projector"]},
                "train": {"component_learning_rates": {"vision_encoder": 1e-5}},
            },
            'nothing of it is trained by model.train = ["projector"]',
        ),
    ],
)
def test_settings_that_can_not_be(table: dict[str, Any], message: str) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"output_dir": "x", "model": {"path": "m"}, **table})
    assert message in str(caught.value)
