"""The delta rule by fla's kernels beside the plain form, and the trial that decides between them.

`tests/helpers/fla.py` stands in for the kernels."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import fla
from tests.helpers.tiny import Tiny, assert_same_gradients, batch_of, loss_and_gradients
from tests.unit.models.test_delta_rule import DOCUMENTS, segments_of
from tests.unit.models.test_shared_prefixes import VIDEO, about, media_of
from vft.common.types import Batch, Segment
from vft.models import delta_rule as module
from vft.models.delta_rule import delta_rule, fla_trouble, has_fla, recurrence_of, results_of, trial_inputs
from vft.models.qwen3_5 import model as qwen3_5
from vft.models.qwen3_5.model import rule_shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (2, 4, 6, 5)
RESULTS = ("outputs", "states", "q", "k", "v", "decays", "strengths", "initial")
"""What `results_of` gives: two results and six gradients."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing is left of what a test installs or finds out."""
    before = {name: sys.modules.get(name) for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule")}
    has_fla.cache_clear()
    fla.calls.clear()
    fla.install()
    yield
    has_fla.cache_clear()
    for name, one in before.items():
        sys.modules.pop(name, None)
        if one is not None:
            sys.modules[name] = one


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for name, one, other in zip(RESULTS, found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_rows_are_as_by_the_plain_form(name: str) -> None:
    """Outputs, states and all gradients; those of a suffix reach back into its prefix. At most two calls."""
    segments = segments_of(DOCUMENTS[name])
    inputs = trial_inputs(segments, SHAPE, torch.float32, CPU)
    wanted = results_of(inputs, recurrence_of(segments, 4, CPU))
    recurrence = recurrence_of(segments, 4, CPU, by_fla=True)
    assert_same(results_of(inputs, recurrence), wanted)
    first = sorted(s.q_length for s in segments if not s.prefix_length)
    second = sorted(s.q_length for s in segments if s.prefix_length)
    calls = [tuple(sorted(lengths)) for lengths in fla.calls]
    once = [tuple(lengths) for lengths in (first, second) if lengths]
    assert calls == ([] if first == [1] else 2 * once)  # forward, and again before backward


def test_a_later_pass_continues_an_earlier_one() -> None:
    """From given states, which no prefix of the row left."""
    segments = [Segment(0, 9), Segment(9, 64, 0, 5), Segment(73, 3, 0, 70)]
    inputs = trial_inputs(segments, SHAPE, torch.float32, CPU)
    forms = [recurrence_of(segments, 4, CPU, sources=(1, 0, 2), by_fla=by_fla) for by_fla in (True, False)]
    assert_same(*(results_of(inputs, form) for form in forms))
    assert fla.calls == 2 * [(64, 9, 3)]


def test_a_step_of_generation_takes_the_plain_form() -> None:
    assert not recurrence_of([Segment(0, 1), Segment(1, 1)], 4, CPU, by_fla=True).ends


@torch.fx.experimental._config.patch(use_duck_shape=False)  # as in `parallelize`
def test_compiled_layers_have_the_same_gradients(fresh_compiler: None) -> None:
    """One graph for rows of any lengths, with and without suffixes."""
    graphs = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    def loss(inputs: Sequence[Tensor], recurrence: module.Recurrence) -> Tensor:
        q, k, v, decay, strength, initial = inputs
        out, states = delta_rule(2 * q, k, v, decay, strength, recurrence, initial)
        return out.square().sum() + states.square().sum()

    compiled = torch.compile(loss, backend=backend, dynamic=True, fullgraph=True)
    for name in ("several", "shared", "everything"):
        segments = segments_of(DOCUMENTS[name])
        inputs = trial_inputs(segments, SHAPE, torch.float32, CPU)
        leaves = [x.requires_grad_() for x in inputs]
        found, wanted = (
            torch.autograd.grad(run(leaves, recurrence_of(segments, 4, CPU, by_fla=by_fla)), leaves)
            for run, by_fla in ((compiled, True), (loss, False))
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_a_model_trains_as_by_the_plain_form(
    make_tiny: Callable[[str, str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and all gradients of a row with questions that share a video, and of one without."""
    tiny = make_tiny("qwen3_5", "tied")
    model: Any = tiny.ours()

    def rows() -> list[Batch]:
        talks = [about([VIDEO], count) for count in (1, 3)]
        return [batch_of(tiny.encoder, (one, media_of(tiny, one))) for one in talks]

    wanted_loss, wanted = loss_and_gradients(model, *rows())
    assert not fla.calls
    known = (CPU, torch.float32, rule_shape(model.decoder.config))
    monkeypatch.setattr(qwen3_5, "has_fla", lambda *what: what == known)
    loss, found = loss_and_gradients(model, *rows())
    assert {len(lengths) for lengths in fla.calls} == {1, 3}
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert_same_gradients(found, wanted, 1e-4)


# ---------------------------------------------------------------------------------------------------------- the trial


class _Scaled(torch.autograd.Function):
    """Scales the gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grads[0], None


def wrong(
    before: Callable[[dict[str, Any]], object] = lambda given: None,
    after: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda out, state: (out, state),
) -> Callable[..., Any]:
    """The rule with its arguments or results changed."""

    def rule(*inputs: Tensor, **given: Any) -> Any:
        given |= dict(zip("qkvgb", inputs, strict=True))
        given["beta"] = given.pop("b")
        before(given)
        out, state = fla.chunk_gated_delta_rule(**given)
        assert state is not None
        return after(out, state)

    return rule


def begun_from(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], object]:
    return lambda given: given.update(initial_state=change(given["initial_state"]))


def refuse(given: dict[str, Any]) -> None:
    raise RuntimeError("no such instruction\nand more")


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "nan": (fla.give_nan, "gives other results"),
    "nan in the states": (wrong(after=lambda out, state: (out, state * torch.nan)), "gives other results"),
    "another scale": (wrong(lambda given: given.update(scale=1.0)), "gives other results"),
    "no norm": (wrong(lambda given: given.update(use_qk_l2norm_in_kernel=False)), "gives other results"),
    "states of another order": (wrong(after=lambda out, state: (out, state.flip(0))), "gives other results"),
    "no initial states": (wrong(begun_from(lambda x: 0 * x)), "gives other results"),
    "no gradient of them": (wrong(begun_from(lambda x: _Scaled.apply(x, 0.0))), "gives other results"),
    "a wrong gradient of them": (wrong(begun_from(lambda x: _Scaled.apply(x, 1.1))), "gives other results"),
    "no gradient at all": (wrong(after=lambda out, state: (out.detach(), state.detach())), "can't run"),
    "it raises": (wrong(refuse), "can't run (no such instruction)"),
    "an older one": (lambda q, k, v, g, beta: None, "can't run"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_trial_refuses(name: str) -> None:
    function, trouble = FAULTS[name]
    fla.install(function)
    assert trouble in (fla_trouble(CPU, torch.float32, SHAPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_accepts_rounding(dtype: torch.dtype) -> None:
    assert fla_trouble(CPU, dtype, (2, 4, 16, 16)) == ""


def test_where_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA in half precision, once for each kind; and a package that does not work is said once."""
    tried: list[Any] = []
    troubles = {SHAPE: "", (1, 1, 6, 5): "can't run"}
    monkeypatch.setattr(module, "fla_trouble", lambda *what: tried.append(what) or troubles[what[2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_fla(CPU, torch.bfloat16, SHAPE) and not has_fla(CUDA, torch.float32, SHAPE)
        assert not tried
        assert all(has_fla(CUDA, torch.bfloat16, SHAPE) for _ in range(2))
        monkeypatch.delitem(sys.modules, "fla")
        assert not has_fla(CUDA, torch.float16, SHAPE)  # it is not installed
        fla.install()
    with pytest.warns(UserWarning, match="fla's gated delta rule can't run: recurrent layers take the slower") as said:
        assert not any(has_fla(CUDA, torch.bfloat16, (1, 1, 6, 5)) for _ in range(2))
    assert len(said) == 1 and len(tried) == 2
