"""Qwen3.5's own rules: which parameters stay in float32, what is refused, compiled layers, states in option scores.

What all families have in common is tested with them all (`tests/helpers/families.py`), the delta rule in
`test_delta_rule.py`, the reference cases in `tests/parity/test_reference_qwen3_5.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3_5Config

from tests.helpers.kernels import use_varlen
from tests.helpers.rows import row
from tests.helpers.tiny import CPU, Tiny, assert_same_gradients, every_logit, loss_and_gradients
from tests.unit.parallel import test_compiled as compiled
from vft.adapters.targets import choose_trainable
from vft.common.errors import UserError
from vft.config.run import LoraConfig, ParallelConfig
from vft.distributed.process_group import World, make_mesh
from vft.models.qwen3_5 import model as qwen3_5
from vft.parallel.parallelize import parallelize, shard


@pytest.fixture(scope="module")
def tiny(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    """A small random Qwen3.5 with a tied head."""
    return make_tiny("qwen3_5", "tied")


def test_what_each_part_adds(tiny: Tiny) -> None:
    """The parts of a recurrent layer and the gate of attention move the logits far more than the tests forgive."""
    batch, ours = row(tiny, "mixed"), tiny.ours()
    with torch.no_grad():
        whole = every_logit(ours, batch)
        for name in (
            *("linear_attn.conv1d.weight", "linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"),
            *("linear_attn.in_proj_z.weight", "linear_attn.in_proj_b.weight", "input_layernorm.weight"),
        ):
            parameter = ours.get_parameter(f"model.language_model.layers.0.{name}")
            kept = parameter.clone()
            parameter.zero_()
            assert float((every_logit(ours, batch) - whole).abs().max()) > 0.05, name
            parameter.copy_(kept)


def test_small_errors_that_add_up_are_kept_small(make_tiny: Callable[[str, str], Tiny]) -> None:
    """Decays and the state's norm are float32 in a model that is loaded in bf16, as in the released files."""
    config = Qwen3_5Config.from_pretrained(make_tiny("qwen3_5", "bf16").path)
    with torch.device("meta"):
        model = qwen3_5.build(config, {}, torch.bfloat16)
    found = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    layers = [f"model.language_model.layers.{number}.linear_attn" for number in (0, 2)]
    assert found == {f"{layer}.{name}" for layer in layers for name in ("A_log", "norm.weight")}


def test_sharding_does_not_round_them(make_tiny: Callable[[str, str], Tiny]) -> None:
    """FSDP2's policy gathers what it shards in bf16. A few frozen numbers are not sharded; trained ones are."""
    lora, made = LoraConfig(rank=2), []
    for train, config in (((), lora), (("language_model",), None)):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            loaded = Qwen3_5Config.from_pretrained(make_tiny("qwen3_5", "bf16").path)
            with torch.device("meta"):
                model = qwen3_5.build(loaded, {}, torch.bfloat16)
            choose_trainable(model, config, train)
            shard(model, make_mesh(World(0, 2, 0, CPU), 2), torch.bfloat16, ParallelConfig(shard=0))
            layer: Any = model.decoder.layers[0].linear_attn
            made.append((isinstance(layer.A_log, DTensor), isinstance(layer.norm.weight, DTensor)))
            assert layer.A_log.dtype == layer.norm.weight.dtype == torch.float32
            assert isinstance(layer.in_proj_qkv.weight, DTensor)
        finally:
            dist.destroy_process_group()
    assert made == [(False, False), (True, True)]


@pytest.mark.slow  # in CI test_routing.py compiles the layers of Qwen3.5-MoE, which are these with experts
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, mode: Any) -> None:
    """No break, nothing compiled after the first two rows, and the same gradients: the delta rule is one operator in
    the graph, whatever the lengths of a row."""
    use_varlen(monkeypatch)
    model = tiny.ours()
    batches = [compiled.row(tiny, documents, seed) for seed, documents in enumerate(compiled.ROWS)]
    wanted = [loss_and_gradients(model, batch) for batch in batches]
    compiled.compile_with_aot_eager(monkeypatch)
    parallelize(model, None, ParallelConfig(activation_checkpointing=mode, compile=True), torch.float32, CPU)
    graphs = []
    for batch, (loss, gradients) in zip(batches, wanted, strict=True):
        again, found = loss_and_gradients(model, batch)
        assert abs(float(again / loss) - 1) <= 1e-5
        assert_same_gradients(found, gradients, tolerance=5e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs[1:])) == 1 and not counters["graph_break"], graphs


def test_a_step_reads_nothing_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.test_a_step_reads_nothing_back(tiny, monkeypatch, compiled.ROWS[2])


@pytest.mark.parametrize(
    ("where", "change", "trouble"),
    [
        ("text_config", {"layer_types": ["linear_attention", "sliding_attention"]}, "layer_types"),
        ("text_config", {"attention_bias": True}, "attention_bias = True"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("vision_config", {"deepstack_visual_indexes": [0]}, "deepstack_visual_indexes"),
    ],
)
def test_settings_that_are_not_implemented(where: str, change: dict[str, Any], trouble: str) -> None:
    config = Qwen3_5Config()
    for name, value in change.items():
        setattr(getattr(config, where), name, value)
    with pytest.raises(UserError, match=trouble):
        qwen3_5.build(config, {}, torch.float32)
