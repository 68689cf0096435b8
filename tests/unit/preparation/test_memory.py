"""Memory and FLOPs that are counted beforehand, beside those that torch's profiler and counter see in a real step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.allocations import allocated_peak
from tests.helpers.tiny import Media, Tiny, batch_of, load_prepared, medium, talk
from vft.adapters.lora import initialise
from vft.adapters.targets import choose_trainable
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.data import DataConfig, VideoConfig
from vft.config.run import LoraConfig, ParallelConfig
from vft.data.dataset import make_dataset
from vft.distributed.process_group import World, make_mesh
from vft.models import build, experts
from vft.models.base import VideoLanguageModel
from vft.models.delta_rule import Recurrence
from vft.models.flops import FlopCounter
from vft.models.pretrained import Pretrained
from vft.models.released import RELEASED, build_from_config
from vft.parallel.parallelize import checkpoint_activations
from vft.preparation import memory
from vft.preparation.kernels import KernelCounter, Kernels
from vft.preparation.memory import (
    GIB,
    MODES,
    candidates,
    largest_rows,
    memory_preflight,
    resident_bytes,
    resolve,
    run_step,
)
from vft.preparation.synthetic import Video, row_of, text_document, video_document
from vft.training.losses import cross_entropy

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


def long_row(tiny: Tiny, questions: Sequence[int] = (1, 3)) -> Batch:
    """A few hundred tokens: videos, some with several questions."""
    rows = []
    for number, count in enumerate(questions):
        ref, info = medium("video", 16, 112, 112, name=str(number))
        media = Media.make(tiny.encoder.processor, [(ref, info)], seed=number)
        asked = [talk(("user", [ref, f"What {i}?"]), ("assistant", "It moves. " * 8), id=str(i)) for i in range(count)]
        rows.append((asked, media))
    return batch_of(tiny.encoder, *rows)


def built(tiny: Tiny, train: Sequence[str] = ()) -> VideoLanguageModel:
    """On the meta device, with adapters, or in full where parts are named."""
    made = build(Pretrained.open(str(tiny.path)), torch.float32)
    choose_trainable(made, None if train else LoraConfig(rank=4), train)
    return made


def real_model(tiny: Tiny, mode: str, train: Sequence[str] = ()) -> Any:
    lora = None if train else LoraConfig(rank=4)
    prepared, _ = load_prepared(tiny.path, lambda made: choose_trainable(made, lora, train))
    initialise(prepared, 0)
    checkpoint_activations(prepared, mode)
    return prepared


@pytest.mark.parametrize("train", [(), ("language_model", "vision_encoder", "projector")], ids=["lora", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_peak_is_that_of_a_real_step(each_tiny: Tiny, mode: str, train: Sequence[str]) -> None:
    row, planned = long_row(each_tiny), built(each_tiny, train)
    checkpoint_activations(planned, mode)
    model = real_model(each_tiny, mode, train)
    # Solving a triangular system takes a copy in the plan that it does not take on a CPU.
    within = 0.07 if any(planned.decoder.recurrence_flops) else 0.02
    assert run_step(planned, cross_entropy, row, CPU).peak == pytest.approx(
        allocated_peak(lambda: cross_entropy(model, row).backward()), rel=within
    )


def step_of_layers(name: str, layers: int, config: ParallelConfig, processes: int, whole: bool) -> Any:
    """Peak, gathered weights at it, and kernels of a step of a released model with so many layers, on several processes
    that are not there. Two questions share a video of 8 frames beside a text."""
    released, count = RELEASED[name], {"num_hidden_layers": layers}
    text = {"text_config": {**released["text_config"], **count}} if "text_config" in released else count
    model, counter = build_from_config({**released, **text}, torch.bfloat16), KernelCounter()
    choose_trainable(model, LoraConfig(rank=4, dropout=0.1), ())
    checkpoint_activations(model, config.activation_checkpointing)
    video = video_document(model.processor, Video(8, 112, 112), 2, 150, 20)
    row = row_of(model.processor, [video, text_document(300, 50)])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        mesh = None if processes == 1 else make_mesh(World(0, processes, 0, CPU), 0)
        watcher = None if mesh else counter
        live = run_step(model, cross_entropy, row, torch.device("cuda"), mesh, config, watcher, whole)
    finally:
        dist.destroy_process_group()
    return live.peak, live.gathered_at_peak, counter.kernels


HOW = [("full", 2, False), ("selective", 1, False), ("none", 2, True)]
"""Recomputation, processes, and whether gathered layers are kept."""
BASES = [("Qwen2.5-VL-3B-", 7), ("LLaVA-NeXT-Video-7B", 7), ("Qwen3-VL-30B-A3B-", 9)]
RECURRENT = [pytest.param("Qwen3.5-2B", 16, *how, marks=[pytest.mark.slow] if how != HOW[0] else []) for how in HOW]


@pytest.mark.parametrize(
    ("name", "layers", "mode", "processes", "kept"), [*((*base, *how) for base in BASES for how in HOW), *RECURRENT]
)
def test_few_layers_stand_for_all(name: str, layers: int, mode: str, processes: int, kept: bool) -> None:
    """To the byte, as if each layer had been run."""
    config = ParallelConfig(activation_checkpointing=mode, reshard_after_forward=not kept)
    few, every = (step_of_layers(name, layers, config, processes, whole) for whole in (False, True))
    assert few == every
    assert (every[1] > 0) == (processes > 1) and (every[2] == Kernels()) == (processes > 1)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_recurrences_of_few_steps_stand_for_those_of_many(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many kernels are launched as in steps one after another; a few more bytes are held, and moved, at once."""
    config = ParallelConfig(activation_checkpointing=mode)
    peak, _, planned = step_of_layers("Qwen3.5-2B", 4, config, 1, whole=True)
    monkeypatch.setattr(Recurrence, "flattened", lambda recurrence: recurrence)
    true_peak, _, true = step_of_layers("Qwen3.5-2B", 4, config, 1, whole=True)
    assert (planned.launches, planned.fused_launches) == pytest.approx((true.launches, true.fused_launches), rel=0.05)
    assert planned.product_flops == true.product_flops
    assert true_peak <= peak <= 1.05 * true_peak and true.bytes <= planned.bytes <= 1.1 * true.bytes


def test_what_stays_is_counted(each_tiny: Tiny) -> None:
    model = real_model(each_tiny, "none")
    from vft.config.run import TrainConfig
    from vft.training.optimizer import build_optimizer

    optimizer = build_optimizer(model, TrainConfig())
    state = sum(x.numel() * x.element_size() for one in optimizer.state.values() for x in one.values() if x.dim())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert resident_bytes(built(each_tiny), 1) == weights + state


def test_auto_takes_what_fits(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """The mode that recomputes least. A message says what was tried; if nothing fits, the error has both numbers."""
    caplog.set_level(logging.INFO, "vft")
    text = [talk(("user", "What?"), ("assistant", "It moves. " * 100), id="text")]
    row, sizes = batch_of(tiny.encoder, (text, Media((), ()))), {}
    for mode in MODES:
        model = built(tiny)
        checkpoint_activations(model, mode)
        sizes[mode] = resident_bytes(model, 1) + run_step(model, cross_entropy, row, CPU).peak
    assert sizes["none"] > sizes["mlp"] > sizes["full"] and sizes["none"] > sizes["selective"] > sizes["full"]
    for wanted, budget in (("none", sizes["none"]), ("selective", sizes["none"] - 1), ("full", sizes["full"])):
        caplog.clear()
        config = ParallelConfig(activation_checkpointing="auto", memory_budget_gib=budget / GIB * (1 + 1e-12))
        settled = resolve(config, built(tiny), cross_entropy, [row], ALONE)
        assert settled.activation_checkpointing == wanted
        assert caplog.messages[0].startswith(f"activation_checkpointing = {wanted}, shard = 0, compile = false: ")
    config = ParallelConfig(activation_checkpointing="auto", memory_budget_gib=(sizes["full"] - 1) / GIB)
    with pytest.raises(
        UserError, match=rf"^parallel\.memory_budget_gib = .*: the longest row, {row.num_tokens} tokens"
    ):
        resolve(config, built(tiny), cross_entropy, [row], ALONE)


def test_rows_that_can_take_the_most_memory(tiny: Tiny) -> None:
    """The longest is a text, another attends the most keys of its shared video, a third has the most patches."""
    clips = [medium("video", 8, side, side, fps=2.0, name=str(side)) for side in (56, 140)]
    (small, _), (large, _) = clips
    talks = [talk(("user", "What?"), ("assistant", "It moves. " * 33), id="text")]
    talks += [talk(("user", [small, f"What {n}?"]), ("assistant", "It moves. " * 6), id=f"shared{n}") for n in range(8)]
    talks += [talk(("user", [large, "What?"]), ("assistant", "It moves."), id="large")]
    config = DataConfig(pack_tokens=400, video=VideoConfig(frames=8, max_pixels=140 * 140))
    dataset = make_dataset(talks, tiny.encoder, config, dict(clips).__getitem__)
    rows = largest_rows(dataset, dataset.pack_plan(0))
    tokens, keys, patches = rows
    assert tokens.sample_ids == ("text",) and patches.sample_ids == ("large",)
    assert keys.sample_ids in [tuple(f"shared{n}" for n in four) for four in (range(4), range(4, 8))]
    assert tokens.num_tokens == max(row.num_tokens for row in rows)
    assert keys.plan.cu_seqlens_k_S[-1] == max(int(row.plan.cu_seqlens_k_S[-1]) for row in rows)
    assert patches.pixels_PD.shape[0] == max(row.pixels_PD.shape[0] for row in rows)


def test_what_auto_may_stand_for_the_fastest_first() -> None:
    """Copies before shards within a host before shards over all, and all of them before anything is computed again."""

    def tried(processes: int, per_host: int, **settings: Any) -> list[tuple[str, Any]]:
        options = candidates(ParallelConfig(**settings), processes, per_host)
        return [(one.activation_checkpointing, one.shard) for one in options]

    assert tried(1, 1) == [(mode, 0) for mode in MODES]
    assert tried(16, 8)[:4] == [("none", 1), ("none", 8), ("none", 0), ("selective", 1)]
    assert tried(8, 8, activation_checkpointing="full") == [("full", 1), ("full", 0)]
    assert tried(8, 8, shard=4)[:2] == [("none", 4), ("selective", 4)]
    assert tried(8, 8, activation_checkpointing="none", offload="frozen") == [("none", 0)]  # one copy a host, not 8


@pytest.mark.parametrize(("total_gib", "left_gib"), [(24, 2.5), (48, 2.5), (80, 4.0), (192, 9.6)])
def test_what_is_left_free_does_not_shrink_with_the_card(total_gib: float, left_gib: float) -> None:
    """Drivers, the allocator's holes and workspaces take as much of a small one."""
    assert total_gib - memory.usable_bytes(total_gib * GIB) / GIB == pytest.approx(left_gib)


@pytest.mark.parametrize(("dtype", "compiled"), [(torch.bfloat16, True), (torch.float32, False)])
def test_auto_compiles_where_the_kernel_is(
    tiny: Tiny, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU in half precision; the kernel is tried before."""
    tried: list[Any] = []
    monkeypatch.setattr(memory, "check_kernel", lambda *what: tried.append(what))
    model, gpu = load_prepared(tiny.path, lambda it: None, dtype)[0], torch.device("cuda", 0)
    given = ParallelConfig(activation_checkpointing="none", shard=0)
    assert resolve(given, model, cross_entropy, [], World(0, 1, 0, gpu)).compile is compiled
    assert tried == [(gpu, dtype)]


def test_on_a_cpu_auto_changes_nothing(tiny: Tiny) -> None:
    """Sharded over all processes, nothing computed again, not compiled; and nothing is planned for that."""
    found = resolve(ParallelConfig(), built(tiny), cross_entropy, [], World(0, 4, 0, CPU))
    assert (found.shard, found.activation_checkpointing, found.compile) == (0, "none", False)


@pytest.mark.parametrize("mode", ["none", "mlp", "full"])
def test_flops_are_those_of_a_real_step(each_tiny: Tiny, mode: str) -> None:
    """What torch counts in the linear layers of a step, recomputation among it.

    Attention aside, whose CPU kernel counts whole squares, and recurrences. The first layer's input needs no gradient:
    those products are counted, and not done.
    """
    row, model = long_row(each_tiny, (1, 1)), real_model(each_tiny, mode)
    aten = torch.ops.aten
    # What torch does not count: a product in place, and ours.
    uncounted = {aten.addmm_: lambda _, x, y, **__: 2 * x[0] * x[1] * y[1]}
    uncounted |= {op: lambda x, y, *_, **__: 2 * x[0] * x[1] * y[-1] for op in experts.PRODUCTS}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        cross_entropy(model, row).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if op in (aten.mm, aten.addmm, aten.addmm_, *experts.PRODUCTS))
    flops, again = FlopCounter(model, mode), FlopCounter(model, "none")
    pairs = sum(s.q_length * (s.q_length + 1) // 2 for s in row.plan.segments)
    assert row.layout is not None
    encoder = flops.count(row).model - flops.row(row.num_tokens, pairs, row.pixels_PD.shape[0])
    encoder += flops.last * (row.num_tokens - row.num_targets) - flops.target * row.num_targets
    linear = flops.count(row).hardware - flops.pair * pairs - flops.pair_again * pairs - encoder
    linear -= (flops.recurrence + flops.recurrence_again) * row.num_tokens
    fed_by_input = ("q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    layers = [(name, one) for name, one in model.decoder.layers[0].named_modules() if name.endswith(fed_by_input)]
    fed = [p for _, x in layers for p in (x.weight, x.lora_A.weight)]
    linear -= 2 * row.num_tokens * sum(p.numel() for p in fed)
    assert linear == pytest.approx(products, rel=0.02)
    assert (flops.count(row).hardware > again.count(row).hardware) == (mode != "none")
    assert flops.count(row).model == again.count(row).model
    assert again.count(row).hardware - again.count(row).model == again.recurrence_again * row.num_tokens


def test_a_row_that_does_not_fit_is_named(tiny: Tiny) -> None:
    """What torch raises on a full device becomes one line: how long the row is, and what helps."""

    def full(model: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    row, model = long_row(tiny), built(tiny)
    with pytest.raises(UserError, match=rf"the longest row, {row.num_tokens:,} tokens, .*20.00 GiB. Lower data.pack"):
        memory_preflight(model, full, row, torch.device("cpu"))
