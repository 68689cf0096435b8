"""A mixture of experts beside a loop over tokens in float64; its weights in both orientations of the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from tests.helpers.tiny import CPU, Tiny, assert_same_gradients, load_model
from vft.adapters.targets import match_targets
from vft.common.errors import UserError
from vft.models import build, experts
from vft.models import quantization as nf4
from vft.models.experts import Experts, ExpertWeights
from vft.models.pretrained import SINGLE_FILE, Pretrained
from vft.models.qwen3_vl_moe import model as qwen3_vl_moe
from vft.models.weights import export_model, turned_names

WIDTH, HIDDEN, COUNT, CHOSEN = 32, 24, 5, 2


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32, normalise: bool = True, hidden: int = HIDDEN) -> Experts:
    """Random experts, of which the last is never chosen for rows whose first number is positive."""
    made = Experts(WIDTH, hidden, COUNT, CHOSEN, normalise)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-2] ** -0.5)
        made.gate.weight[-1] = 0
        made.gate.weight[-1, 0] = -1e3
    return made.to(dtype)


def rows(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = x[:, 0].abs() + 0.1
    return x.to(dtype)


def loop(weights: dict[str, Tensor], x_TE: Tensor, normalise: bool = True) -> Tensor:
    """Token by token, expert by expert."""
    out = []
    for x in x_TE:
        probabilities = (weights["gate.weight"] @ x).softmax(0)
        chosen = probabilities.topk(CHOSEN).indices.tolist()
        total = sum(probabilities[one] for one in chosen) if normalise else 1.0
        y = torch.zeros_like(x)
        for one in chosen:
            gate, up = (x @ weights["experts.gate_up_proj"][one]).chunk(2)
            y = y + probabilities[one] / total * (F.silu(gate) * up) @ weights["experts.down_proj"][one]
        out.append(y)
    return torch.stack(out)


def in_float64(made: Experts) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in made.named_parameters()}


def outcome(run: Callable[[Tensor], Any], weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of x and of the weights, of a loss that weighs every number differently."""
    x = x.detach().requires_grad_()
    out = run(x)
    out = out[0] if isinstance(out, tuple) else out  # without how rows were routed
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    found = torch.autograd.grad((out * factors).sum(), [x, *weights.values()])
    return out.detach(), dict(zip(["x", *weights], found, strict=True))


# ------------------------------------------------------------------------------------------------- the computation


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("count", [1, 2, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_a_loop(dtype: torch.dtype, count: int, normalise: bool) -> None:
    """By torch's grouped product, and in float64, which that does not serve, by single ones. One expert has no rows."""
    made, exact = mlp(dtype=dtype, normalise=normalise), in_float64(mlp())
    out, found = outcome(made, dict(made.named_parameters()), rows(count, dtype))
    wanted_out, wanted = outcome(lambda x: loop(exact, x, normalise), exact, rows(count).double())
    tolerance = 1e-5 if dtype is torch.float32 else 1e-6  # shares are computed in float32
    assert experts._has_grouped(CPU, dtype) == (dtype is torch.float32)
    assert float((out - wanted_out).norm()) <= tolerance * float(wanted_out.norm())
    assert_same_gradients({name: g.double() for name, g in found.items()}, wanted, tolerance)
    assert not found["experts.down_proj"][-1].any() and not found["experts.gate_up_proj"][-1].any()


def test_widths_that_torch_does_not_serve() -> None:
    """Rows of 21 numbers do not begin at multiples of 16 bytes."""
    made = mlp(hidden=21)
    exact = in_float64(made)
    out, found = outcome(made, dict(made.named_parameters()), rows(9))
    wanted_out, wanted = outcome(lambda x: loop(exact, x), exact, rows(9).double())
    assert float((out - wanted_out).norm()) <= 1e-5 * float(wanted_out.norm())
    assert_same_gradients({name: g.double() for name, g in found.items()}, wanted)


def test_no_rows() -> None:
    """A pack without a supervised token has none in the last layer; every weight still has its gradient, zero."""
    made = mlp()
    made(rows(0))[0].sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and not p.grad.any() for p in made.parameters())


def test_bfloat16() -> None:
    """As near to the loop as a loop in bfloat16; the shares are computed in float32, and then rounded."""
    made = mlp(dtype=torch.bfloat16)
    x, exact = rows(64, torch.bfloat16), in_float64(made)
    out, found = outcome(made, dict(made.named_parameters()), x)
    wanted_out, wanted = outcome(lambda x: loop(exact, x), exact, x.double())
    assert out.dtype == torch.bfloat16
    assert float((out - wanted_out).norm()) <= 0.01 * float(wanted_out.norm())
    assert_same_gradients({name: g.double() for name, g in found.items()}, wanted, 0.02)
    numbers, shares, _ = made.gate(x)
    logits = F.linear(x, made.gate.weight).float()
    kept = logits.gather(1, numbers).softmax(-1)
    assert torch.equal(shares, kept.bfloat16())


def test_float32_weights_in_bfloat16() -> None:
    """Trained weights are float32 beside rows in bfloat16, and get float32 gradients."""
    out, found = outcome(made := mlp(), dict(made.named_parameters()), rows(16, torch.bfloat16))
    rounded = mlp(dtype=torch.bfloat16)
    same, others = outcome(rounded, dict(rounded.named_parameters()), rows(16, torch.bfloat16))
    assert torch.equal(out, same)
    for name, gradient in found.items():
        assert gradient.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert torch.equal(gradient.to(torch.bfloat16), others[name])


def test_frozen_experts_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x and the router alone: the same, without a product for the weights."""
    made = mlp()
    _, wanted = outcome(made, dict(made.named_parameters()), rows(20))
    made.experts.requires_grad_(False)
    monkeypatch.setattr(experts, "grouped_outer", None)
    _, found = outcome(made, {"gate.weight": made.gate.weight}, rows(20))
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name])


def test_single_products_are_the_grouped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mlp()
    wanted_out, wanted = outcome(made, dict(made.named_parameters()), rows(33))
    monkeypatch.setattr(experts, "_has_grouped", lambda *_: False)
    monkeypatch.setattr(torch, "_grouped_mm", None)
    out, found = outcome(made, dict(made.named_parameters()), rows(33))
    torch.testing.assert_close(out, wanted_out)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_grouped_product_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def broken(*inputs: Tensor) -> Tensor:
        if fault == "raises":
            raise NotImplementedError("no kernel")
        return grouped(*inputs) * 2

    grouped = torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", broken)
    assert not experts._has_grouped.__wrapped__(CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_tensors_without_values(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        made = Experts(WIDTH, HIDDEN, COUNT, CHOSEN, True).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made.to_empty(device=CPU)
        x = torch.empty(7, WIDTH, dtype=dtype, requires_grad=True)
        made(x)[0].sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert all(p.grad is not None and p.grad.shape == p.shape for p in made.parameters())


def test_the_operators_keep_torchs_rules() -> None:
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    x, weight, y = torch.randn(7, 8), torch.randn(3, 8, 12), torch.randn(7, 12)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(experts.grouped_product, (x, weight, ends), test_utils=tests)
    torch.library.opcheck(experts.grouped_outer, (x, y, ends), test_utils=tests)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    """One graph for all lengths, without a break."""
    made = mlp()
    compiled = torch.compile(made, backend="aot_eager", dynamic=True, fullgraph=True)
    for count in (5, 9, 30):
        wanted_out, wanted = outcome(made, dict(made.named_parameters()), rows(count))
        out, found = outcome(compiled, dict(made.named_parameters()), rows(count))
        torch.testing.assert_close(out, wanted_out)
        assert_same_gradients(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------- packed weights


def packed(made: Experts) -> Experts:
    """The same with its matrices in 4 bits."""
    values = {name: nf4.pack(getattr(made.experts, name).detach()) for name in made.experts.matrices}
    nf4.quantize(made)
    for name, bytes_ in values.items():
        setattr(made.experts, name, torch.nn.Parameter(bytes_, requires_grad=False))
    return made


def test_packed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As whole ones with the same rounding, unpacked a few at a time or all together, forward and backward."""
    whole, small = mlp(), packed(mlp())
    with torch.no_grad():
        for name, shape in whole.experts.matrices.items():
            parameter = getattr(whole.experts, name)
            parameter.copy_(nf4.unpack(nf4.pack(parameter), shape[-1], torch.float32))
            flat = nf4.pack(parameter.flatten(0, 1)).unflatten(0, shape[:2])
            assert torch.equal(nf4.pack(parameter), flat)
    assert nf4.true_shapes(small) == nf4.true_shapes(whole)
    wanted_out, wanted = outcome(whole, {"gate.weight": whole.gate.weight}, rows(19))
    for at_once in (1, 2 * WIDTH * 2 * HIDDEN, 1 << 20):
        monkeypatch.setattr(experts, "UNPACKED_AT_ONCE", at_once)
        out, found = outcome(small, {"gate.weight": small.gate.weight}, rows(19))
        assert torch.equal(out, wanted_out)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def tiny_moe(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    return make_tiny("qwen3_vl_moe", "tied")


def turn(folder: Path, *endings: str) -> None:
    """Exchange the last two axes of these tensors, as transformers 5 saves them."""
    tensors = load_file(folder / SINGLE_FILE)
    tensors |= {name: x.mT.contiguous() for name, x in tensors.items() if name.endswith(endings)}
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


BOTH = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize("endings", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_both_orientations(tiny_moe: Tiny, tmp_path: Path, endings: tuple[str, ...], quantize: str) -> None:
    base = Path(shutil.copytree(tiny_moe.path, tmp_path / "base"))
    turn(base, *(f".mlp.experts.{ending}" for ending in endings))
    wanted, found = (load_model(str(one), None, torch.float32, CPU, quantize=quantize) for one in (tiny_moe.path, base))
    for (name, one), (_, other) in zip(wanted.model.named_parameters(), found.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_transformers_saves_is_read(tiny_moe: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_moe.path, folder)
    tiny_moe.load(tiny_moe.path).save_pretrained(folder)
    before, after = load_file(tiny_moe.path / SINGLE_FILE), load_file(folder / SINGLE_FILE)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert after[name].shape == before[name].mT.shape
    found = load_model(str(folder), None, torch.float32, CPU).model
    assert all(map(torch.equal, found.parameters(), tiny_moe.ours().parameters()))


@pytest.mark.parametrize("is_turned", [False, True])
def test_an_export_has_the_orientation_of_its_base(tiny_moe: Tiny, tmp_path: Path, is_turned: bool) -> None:
    base = Path(shutil.copytree(tiny_moe.path, tmp_path / "base"))
    if is_turned:
        turn(base, *(f".mlp.experts.{ending}" for ending in BOTH))
    pretrained = Pretrained.open(str(base))
    export_model(load_model(str(base), None, torch.float32, CPU).model, pretrained, tmp_path / "out", {}, write=True)
    before, after = load_file(base / SINGLE_FILE), load_file(tmp_path / "out" / SINGLE_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_neither_orientation(tiny_moe: Tiny, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_moe.path, tmp_path / "base"))
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    save_file({**load_file(base / SINGLE_FILE), name: torch.zeros(4, 25, 64)}, base / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.experts\.down_proj: shape \[4, 25, 64\]") as caught:
        load_model(str(base), None, torch.float32, CPU)
    assert "[4, 24, 64]" in str(caught.value) and "[4, 64, 24]" in str(caught.value)


@pytest.fixture
def apart(make_tiny: Callable[[str, str], Tiny], tmp_path: Path) -> tuple[Tiny, Path]:
    """A Qwen3.5-MoE, and the same expert by expert, as transformers saves it."""
    tiny = make_tiny("qwen3_5_moe", "tied")
    return tiny, experts_apart_of(tiny, tmp_path / "apart")


def experts_apart_of(tiny: Tiny, to: Path) -> Path:
    """A copy of a Qwen3.5-MoE, expert by expert."""
    tensors = load_file(tiny.path / SINGLE_FILE)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        module, _, leaf = name.rpartition(".")
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for number, expert in enumerate(tensors.pop(name)):
            parts = expert.chunk(len(leaves))
            tensors |= {f"{module}.{number}.{leaf}.weight": x.clone() for leaf, x in zip(leaves, parts, strict=True)}
    folder = Path(shutil.copytree(tiny.path, to))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_experts_apart(apart: tuple[Tiny, Path], quantize: str) -> None:
    wanted, found = (
        load_model(str(one), None, torch.float32, CPU, quantize=quantize) for one in (apart[0].path, apart[1])
    )
    for (name, one), (_, other) in zip(wanted.model.named_parameters(), found.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_export_has_experts_apart_as_its_base(apart: tuple[Tiny, Path], tmp_path: Path) -> None:
    pretrained = Pretrained.open(str(apart[1]))
    export_model(
        load_model(str(apart[1]), None, torch.float32, CPU).model, pretrained, tmp_path / "out", {}, write=True
    )
    before, after = load_file(apart[1] / SINGLE_FILE), load_file(tmp_path / "out" / SINGLE_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def expert(number: int, part: str) -> str:
    return f"model.language_model.layers.1.mlp.experts.{number}.{part}_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({expert(2, "up"): None}, r"layers\.1\.mlp\.experts\.2\.up_proj\.weight is missing .* 4 experts"),
        ({expert(0, "up"): None}, r"layers\.1\.mlp\.experts\.0\.up_proj\.weight is missing"),
        ({expert(4, "up"): (24, 64)}, r"experts\.4\.up_proj"),
        ({expert(3, "down"): (63, 24)}, r"experts\.3\.down_proj\.weight: shape \[63, 24\].*\[64, 24\]"),
        ({expert(n, "up"): (23, 64) for n in range(4)}, r"experts\.0\.gate_proj.*\[4, 47, 64\].*\[4, 48, 64\]"),
    ],
)
def test_experts_apart_that_do_not_fit(
    apart: tuple[Tiny, Path], change: dict[str, tuple[int, ...] | None], named: str
) -> None:
    tensors = load_file(apart[1] / SINGLE_FILE)
    for name, shape in change.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: torch.zeros(shape)}
    save_file(tensors, apart[1] / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=named):
        load_model(str(apart[1]), None, torch.float32, CPU)


@pytest.mark.parametrize(
    ("stored", "turned"),
    [
        ({"a": (4, 32, 32), "b": (4, 16, 32)}, set()),
        ({"a": (4, 32, 32), "b": (4, 32, 16)}, {"m.a", "m.b"}),
        ({"a": (4, 32, 32)}, set()),
    ],
)
def test_a_square_tensor_is_as_its_sibling(
    tmp_path: Path, stored: dict[str, tuple[int, ...]], turned: set[str]
) -> None:
    """In a file of its own, too. Alone it counts as released."""
    shapes = {"m.a": (4, 32, 32), "m.b": (4, 16, 32), "other.a": (4, 32, 32), "other.c": (3, 5)}
    files = {}
    for name, shape in {"other.a": (4, 32, 32), **{f"m.{leaf}": shape for leaf, shape in stored.items()}}.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({name: torch.zeros(shape)}, files[name])
    pretrained: Any = Pretrained("base", None, files)
    known = {name: shape for name, shape in shapes.items() if name in files or name == "other.c"}
    assert turned_names(known, (".a", ".b"), {name: name for name in files}, pretrained) == turned


# --------------------------------------------------------------------------------------------------- the family


def test_adapters_leave_router_and_experts_alone(tiny_moe: Tiny) -> None:
    model = tiny_moe.ours()
    ((_, names),) = match_targets(model, ["language_model.*"]).items()
    assert len(names) == 3 * 4 + 3
    assert {name.rsplit(".", 1)[1] for name in names if ".layers.1." not in name} == {f"{one}_proj" for one in "qkvo"}
    with pytest.raises(UserError, match="matches no linear layer"):
        match_targets(model, ["language_model.gate"])


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
    ],
)
def test_which_layers_have_experts(tiny_moe: Tiny, changes: dict[str, Any], sparse: list[int]) -> None:
    config = AutoConfig.from_pretrained(tiny_moe.path)
    text: Any = config.text_config
    text.num_hidden_layers, text.mlp_only_layers = 4, []
    for name, value in changes.items():
        setattr(text, name, value)
    with torch.device("meta"):
        model = qwen3_vl_moe.build(config, {}, torch.float32)
        theirs = tiny_moe.family.model_class(config).model.language_model.layers
    found = [any(isinstance(module, ExpertWeights) for module in layer.modules()) for layer in model.decoder.layers]
    assert [number for number, has in enumerate(found) if has] == sparse
    assert [hasattr(layer.mlp, "experts") for layer in theirs] == found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("norm_topk_prob", 2),
        ("num_experts_per_tok", 5),
        ("num_experts_per_tok", 0),
        ("decoder_sparse_step", 0),
    ],
)
def test_settings_that_are_not_implemented_are_refused(tiny_moe: Tiny, name: str, value: Any) -> None:
    pretrained = Pretrained.open(str(tiny_moe.path))
    setattr(pretrained.config.text_config, name, value)
    with pytest.raises(UserError, match=rf"text_config\.{name} = {value!r}"):
        build(pretrained, torch.float32)
