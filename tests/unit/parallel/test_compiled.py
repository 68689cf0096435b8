"""What a GPU runs, run here: the kernel's path through attention, compiled layers, and no value read back in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.helpers.kernels import use_varlen
from tests.helpers.tiny import Media, Tiny, assert_same_gradients, batch_of, loss_and_gradients, medium, talk
from vft.common.types import AttentionPlan, Batch, VisionLayout
from vft.config.run import ParallelConfig
from vft.parallel.parallelize import parallelize
from vft.training.losses import cross_entropy

CPU = torch.device("cpu")
MODES = ("none", "mlp", "selective", "full")

ROWS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((4, 1), (6, 1)),
    ((4, 3),),
    ((2, 1), (4, 2), (6, 3)),
    ((8, 1), (4, 1), (4, 1)),
    ((2, 5),),
    ((10, 1),),
)
"""Rows of documents: frames, and questions about them. The first two have what others have not seen: a row without and
one with a shared trunk."""


def row(tiny: Tiny, documents: Sequence[tuple[int, int]], seed: int = 0) -> Batch:
    made = []
    for number, (frames, questions) in enumerate(documents):
        ref, info = medium("video", frames, 56, 84)
        media = Media.make(tiny.encoder.processor, [(ref, info)], seed=seed + number)
        talks = [
            talk(("user", [ref, "What " + "very " * i + "?"]), ("assistant", "yes " * (i + 1)), id=str(i))
            for i in range(questions)
        ]
        made.append((talks, media))
    return batch_of(tiny.encoder, *made)


@pytest.mark.parametrize("documents", ROWS, ids=str)
def test_the_kernel_path_gives_the_loss_and_gradients_of_the_other(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, documents: Sequence[tuple[int, int]]
) -> None:
    """Two implementations of one plan: of the decoder with and without branches, and of the encoder's windows."""
    model, batch = tiny.ours(), row(tiny, documents)
    loss, gradients = loss_and_gradients(model, batch)
    use_varlen(monkeypatch)
    again, found = loss_and_gradients(model, batch)
    assert abs(float(again / loss) - 1) <= 1e-5
    assert_same_gradients(found, gradients)


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[] if m == "none" else [pytest.mark.slow]) for m in MODES])
def test_compiled_once_for_all_layers_and_rows(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, mode: Any
) -> None:
    """Graphs for rows without and with shared trunks, each for the last layer and for all others, and one for the
    encoder's blocks; no breaks, nothing compiled after the first two rows, and the same gradients."""
    use_varlen(monkeypatch)
    model = tiny.ours()
    batches = [row(tiny, documents, seed) for seed, documents in enumerate(ROWS)]
    wanted = [loss_and_gradients(model, batch) for batch in batches]
    compile_with_aot_eager(monkeypatch)
    parallelize(model, None, ParallelConfig(activation_checkpointing=mode, compile=True), torch.float32, CPU)
    counters.clear()  # of the kernel's trial
    for number, (batch, (loss, gradients)) in enumerate(zip(batches, wanted, strict=True)):
        again, found = loss_and_gradients(model, batch)
        assert abs(float(again / loss) - 1) <= 1e-5
        assert_same_gradients(found, gradients)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 2 * min(number + 1, 2) + 1, f"row {number}: {graphs} graphs"
    assert not counters["graph_break"]


def test_without_the_kernel_the_mlps_are_compiled(tiny: Tiny, fresh_compiler: None, monkeypatch: Any) -> None:
    """Attention would be compiled for every row; the graph must not be given up silently either."""
    model = tiny.ours()
    batches = [row(tiny, documents, seed) for seed, documents in enumerate(ROWS)]
    wanted = [loss_and_gradients(model, batch) for batch in batches]
    compile_with_aot_eager(monkeypatch)
    parallelize(model, None, ParallelConfig(activation_checkpointing="full", compile=True), torch.float32, CPU)
    for batch, (loss, gradients) in zip(batches, wanted, strict=True):
        again, found = loss_and_gradients(model, batch)
        assert abs(float(again / loss) - 1) <= 1e-5
        assert_same_gradients(found, gradients)
        assert counters["stats"]["unique_graphs"] == 2  # of the decoder's MLPs and of the encoder's
    assert not counters["graph_break"]


def test_where_the_compiled_kernel_is_wrong_the_mlps_are_compiled(
    tiny: Tiny, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried by itself, because it is other code than the kernel that is called directly."""
    use_varlen(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *given: function(*given) * torch.nan)
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    model = tiny.ours()
    with pytest.warns(UserWarning, match=r"varlen, compiled, \(width 80, 4 and 4 heads\) gives other results"):
        parallelize(model, None, ParallelConfig(activation_checkpointing="none", compile=True), torch.float32, CPU)
    assert torch._dynamo.config.recompile_limit >= 32  # more variants of a layer than there are; else one runs eager
    assert compiled == [layer.mlp for layer in (*model.decoder.layers, *model.vision.blocks)]


def compile_with_aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that compiling does but the code generation, which takes a minute."""
    compile_function = torch.compile  # which a module's `compile` calls, too
    monkeypatch.setattr(torch, "compile", lambda run, **how: compile_function(run, backend="aot_eager", **how))


@pytest.mark.parametrize("documents", ROWS[:3], ids=str)
def test_a_step_reads_nothing_back(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, documents: Sequence[tuple[int, int]]
) -> None:
    """Forward and backward on tensors without values: a shape or a branch that depends on a value would be an error.

    On a GPU such a value would be waited for.
    """
    use_varlen(monkeypatch)
    model, batch = tiny.ours(), row(tiny, documents)
    with FakeTensorMode() as mode:
        for name, parameter in list(model.named_parameters()):
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(mode.from_tensor(parameter)))
        loss = cross_entropy(model, fake(batch, mode))
        loss.backward()
        assert loss.shape == () and all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        with pytest.raises(DataDependentOutputException):
            float(loss.detach())  # the check is one


def fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: fake(item, mode) for key, item in value.items()}
    if isinstance(value, Batch | VisionLayout | AttentionPlan):
        return replace(value, **{f.name: fake(getattr(value, f.name), mode) for f in fields(value)})
    return value
