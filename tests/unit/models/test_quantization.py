"""NF4 beside the paper's definition, a brute-force search in float64, and transformers on weights rounded by that."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.special import ndtri
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.adapters import VIDEO, VIDEO_INFO, video_batch
from tests.helpers.allocations import allocated_peak
from tests.helpers.kernels import use_varlen
from tests.helpers.tiny import (
    CPU,
    Media,
    Tiny,
    assert_same_gradients,
    batch_of,
    every_logit,
    load_model,
    load_prepared,
    loss_and_gradients,
    talk,
)
from tests.unit.parallel.test_compiled import compile_with_aot_eager
from tests.unit.parallel.test_compiled import row as row_of
from vft.adapters.lora import fill, initialise, is_adapter
from vft.adapters.targets import choose_trainable
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.data import DataConfig
from vft.config.run import LoraConfig, ParallelConfig
from vft.models import build, weights
from vft.models import quantization as nf4
from vft.models.flops import FlopCounter
from vft.models.pretrained import Pretrained
from vft.models.weights import load_weights
from vft.parallel.parallelize import checkpoint_activations, parallelize
from vft.preparation.memory import MODES, resident_bytes, run_step
from vft.training.losses import cross_entropy

LORA = LoraConfig(rank=4, targets=("language_model.*", "projector.*"))


def papers_codes() -> Tensor:
    """Appendix E and section 3: quantiles of the normal distribution, 8 below and 9 above with zero in both, scaled."""
    outermost = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    below = -ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))[:-1]
    above = ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64))[:-1]
    codes = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return codes / codes.abs().max()


def rounded(weight: Tensor) -> Tensor:
    """A weight [out, in] as NF4 holds it, in float64: of all 16 values of each element the nearest."""
    found = torch.empty(weight.shape, dtype=torch.float64)
    for start in range(0, weight.shape[1], 64):
        block = weight[:, start : start + 64].double()
        absmax = block.abs().amax(1, keepdim=True)
        offered = papers_codes() * absmax[..., None]
        nearest = (offered - block[..., None]).abs().argmin(-1, keepdim=True)
        found[:, start : start + 64] = offered.expand(*block.shape, 16).gather(-1, nearest)[..., 0]
    return found


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --------------------------------------------------------------------------------------------------------- numbers


def test_the_codes_are_the_papers() -> None:
    assert (torch.tensor(nf4.CODES, dtype=torch.float64) - papers_codes()).abs().max() < 1e-6


@pytest.mark.parametrize("columns", [64, 192, 96, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_gets_the_nearest_code(columns: int, dtype: torch.dtype) -> None:
    """Whatever a block's size: one of large and one of tiny weights, a constant, zeros, one outlier."""
    weight = random(50, columns, dtype=dtype)
    weight[1] *= 1000
    weight[2] *= 1e-4
    weight[3], weight[4] = -0.3, 0
    weight[5, 3] = 100
    packed = nf4.pack(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (50, -(-columns // 64) * 36)
    found, wanted = nf4.unpack(packed, columns, torch.float32), rounded(weight)
    for start in range(0, columns, 64):
        block = slice(start, start + 64)
        absmax = weight[:, block].abs().amax(1, keepdim=True).double()
        # Of two codes at the same distance, but for rounding, either will do.
        mistake = (found[:, block] - weight[:, block]).abs() - (wanted[:, block] - weight[:, block]).abs()
        assert (mistake.abs() <= 1e-6 * absmax).all()
        assert torch.equal(found[:, block].abs().amax(1, keepdim=True).double(), absmax)
    assert (nf4.unpack(packed, columns, torch.bfloat16) == found.bfloat16()).all()
    assert ((found - weight)[10:].abs().mean() < 0.1 * weight[10:].abs().mean()).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    """So that each process can pack its own."""
    weight = random(7, 150)
    packed = nf4.pack(weight)
    for rows in (slice(0, 3), slice(3, 7), slice(6, 7), slice(4, 4)):
        assert torch.equal(nf4.pack(weight[rows]), packed[rows])


def test_weights_that_are_no_numbers_stay_so() -> None:
    """A broken checkpoint shall not look sound."""
    for value in (float("nan"), float("inf")):
        weight = random(2, 64)
        weight[0, 5] = value
        found = nf4.unpack(nf4.pack(weight), 64, torch.float32)
        assert not found[0].isfinite().all() and found[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [128, 96])
def test_the_layer_and_its_gradient(columns: int, dtype: torch.dtype) -> None:
    weight, bias, x = random(40, columns), random(40, seed=1), random(2, 5, columns, seed=2)
    packed, exact = nf4.pack(weight), nf4.unpack(nf4.pack(weight), columns, torch.float32).double()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    ours, theirs = (x.to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = nf4.linear(ours, packed, bias)
    wanted = nn.functional.linear(theirs, exact, bias.double())
    outward = random(2, 5, 40, seed=3)
    found.backward(outward.to(dtype))
    wanted.backward(outward.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype and ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=10 * tolerance)
    assert len(kept) == 1 and kept[0] is packed, "nothing but the bytes is kept for the backward pass"


# ----------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def batch(tiny: Tiny) -> Batch:
    return video_batch(tiny)


@pytest.mark.parametrize("which", ["tiny", "tiny_untied"])
def test_logits_are_those_of_transformers_on_rounded_weights(
    request: pytest.FixtureRequest, batch: Batch, which: str
) -> None:
    """The linears of the decoder's layers and no others: head, embedding and encoder are as they were."""
    tiny: Tiny = request.getfixturevalue(which)
    theirs, count = tiny.load(tiny.path), 0
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if isinstance(module, nn.Linear) and "language_model.layers." in name:
                module.weight.copy_(rounded(module.weight))
                count += 1
        assert count == 3 * 7
        wanted = theirs(**tiny.inputs(batch)).logits[0]
        ours = load_model(str(tiny.path), None, torch.float32, CPU, quantize="nf4").model
        found, plain = every_logit(ours, batch), every_logit(tiny.ours(), batch)
    assert sum(map(nf4.is_packed, ours.parameters())) == count
    assert (found - wanted).abs().max() <= 1e-4
    assert (plain - wanted).abs().max() > 0.05


def test_error_of_the_logits_of_a_trained_model() -> None:
    """Of the demo's base, 128 wide; larger models lose less."""
    path = str(Path(__file__).parents[3] / "tools" / "demo_world" / "base")
    loaded = [load_model(path, None, torch.float32, CPU, quantize=quantize) for quantize in ("none", "nf4")]
    conversation = talk(("user", [VIDEO, "Describe the video."]), ("assistant", "A red ring moves to the left."))
    encoder = loaded[0].encoder(DataConfig())
    row = batch_of(encoder, ([conversation], Media.make(encoder.processor, [(VIDEO, VIDEO_INFO)])))
    with torch.no_grad():
        exact, found = (every_logit(one.model, row) for one in loaded)
    error = float((found - exact).norm() / exact.norm())
    print(f"relative error of the logits: {error:.1%}")  # pytest -rP shows it
    assert 1e-3 < error < 0.2


def adapted(tiny: Tiny, quantize: str) -> Any:
    """With adapters as after some training; those without `quantize` have the weights that NF4 stands for."""
    model, _ = load_prepared(tiny.path, lambda it: choose_trainable(it, LORA, ()), torch.float32, quantize)
    initialise(model, 0)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if is_adapter(name):
            fill(parameter, 0.1 * random(*parameter.shape, seed=number))
        elif ".layers." in name and name.endswith("_proj.weight") and not nf4.is_packed(parameter):
            parameter.data.copy_(nf4.unpack(nf4.pack(parameter), parameter.shape[1], torch.float32))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_adapters_learn_as_on_the_weights_that_it_stands_for(tiny: Tiny, mode: str) -> None:
    row, model = row_of(tiny, ((6, 1), (6, 2))), adapted(tiny, "nf4")
    loss, wanted = loss_and_gradients(adapted(tiny, "none"), row)
    checkpoint_activations(model, mode)
    again, found = loss_and_gradients(model, row)
    assert abs(float(again / loss) - 1) <= 1e-6
    assert found and all(is_adapter(name) for name in found)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("mode", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("none", "selective")), "full"])
def test_compiled(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, mode: Any) -> None:
    """Without a break, one graph for all layers but the last, one for that; the same losses and gradients."""
    use_varlen(monkeypatch)
    compile_with_aot_eager(monkeypatch)
    model, plain = (adapted(tiny, "nf4") for _ in range(2))
    parallelize(model, None, ParallelConfig(activation_checkpointing=mode, compile=True), torch.float32, CPU)
    counters.clear()  # of the kernel's trial
    for number, frames in enumerate((4, 6, 8)):
        row = row_of(tiny, ((frames, 1), (frames, 1)))
        wanted_loss, wanted = loss_and_gradients(plain, row)
        loss, found = loss_and_gradients(model, row)
        assert abs(float(loss / wanted_loss) - 1) <= 1e-5
        assert_same_gradients(found, wanted)
        assert counters["stats"]["unique_graphs"] == 3, number  # one of the encoder
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_that_of_a_real_step(tiny: Tiny, mode: str) -> None:
    row, planned = row_of(tiny, ((16, 1), (16, 3))), build(Pretrained.open(str(tiny.path)), torch.float32, "nf4")
    choose_trainable(planned, LORA, ())
    resident = resident_bytes(planned, 1)
    checkpoint_activations(planned, mode)
    model = adapted(tiny, "nf4")
    checkpoint_activations(model, mode)
    assert run_step(planned, cross_entropy, row, CPU).peak == pytest.approx(
        allocated_peak(lambda: cross_entropy(model, row).backward()), rel=0.02
    )
    dense = adapted(tiny, "none")
    linears = [m for m in dense.model.layers.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    saved = sum(4 * m.weight.numel() - m.out_features * -(-m.in_features // 64) * 36 for m in linears)
    assert resident_bytes(dense, 1) - resident == saved > 0


def test_flops_are_those_of_the_weights_that_it_stands_for(tiny: Tiny) -> None:
    row, models = row_of(tiny, ((6, 1), (6, 2))), [adapted(tiny, kind) for kind in ("nf4", "none")]
    counted = []
    for model in models:
        with FlopCounterMode(display=False) as counter:
            cross_entropy(model, row).backward()
        counted.append((FlopCounter(model, "full").count(row), counter.get_total_flops()))
    assert counted[0] == counted[1]


# ---------------------------------------------------------------------------------------------------------- loading


class OneLayer(nn.Module):
    spellings = MappingProxyType({"": ("",)})
    turned = unused = ()

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.wide = nn.Linear(columns, rows, bias=False)


def one_layer(folder: Path, weight: Tensor, rows: int, columns: int) -> tuple[OneLayer, Pretrained]:
    """A packed model of this shape and a checkpoint with `weight`."""
    save_file({"wide.weight": weight}, folder / "model.safetensors")
    model = OneLayer(rows, columns)
    nf4.quantize(model)
    config = SimpleNamespace(model_type="one_layer")
    return model, Pretrained(str(folder), config, {"wide.weight": folder / "model.safetensors"})


def test_loading_takes_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is of so many weights, not of the tensor, and the result is the same."""
    weight = random(2500, 800, dtype=torch.bfloat16)
    model, checkpoint = one_layer(tmp_path, weight, 2500, 800)
    peaks = []
    for at_once in (100_000, weight.numel()):
        monkeypatch.setattr(weights, "PACKED_AT_ONCE", at_once)
        nn.init.zeros_(model.wide.weight)
        peak = allocated_peak(lambda: load_weights(model, checkpoint, frozenset()))
        peaks.append(peak - weight.nbytes)  # the mapped file counts as handed out
        assert torch.equal(model.wide.weight, nf4.pack(weight))
    assert peaks[0] < 20 * 100_000 and peaks[1] > 10 * peaks[0]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Also one of the packed shape: what counts is the weight's own."""
    for shape in ((8, 127), (7, 128), (8, 72)):
        model, checkpoint = one_layer(tmp_path, random(*shape), 8, 128)
        with pytest.raises(UserError, match=r"wide\.weight: shape \[\d, \d+\] in the file, \[8, 128\] by config"):
            load_weights(model, checkpoint, frozenset())
