"""How rows are spread over experts: the routing loss and its gradients beside transformers', and the loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from tests.helpers.adapters import disturb, video_batch
from tests.helpers.kernels import use_varlen
from tests.helpers.tiny import Tiny, assert_same_gradients, load_prepared
from tests.unit.parallel.test_compiled import compile_with_aot_eager
from vft.adapters.lora import initialise
from vft.adapters.targets import choose_trainable
from vft.common.errors import UserError
from vft.config.run import Config, LoraConfig, ParallelConfig, load
from vft.models.base import VideoLanguageModel
from vft.models.experts import Experts, expert_loads, routing_loss
from vft.models.flops import FlopCounter
from vft.models.pretrained import Pretrained
from vft.parallel.parallelize import checkpoint_activations, parallelize
from vft.preparation.run import open_for_training
from vft.training.losses import cross_entropy

WEIGHT = 0.3
FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe")


@pytest.fixture(params=FAMILIES)
def moe(request: pytest.FixtureRequest, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    return make_tiny(request.param, "tied")


def trained(tiny: Tiny, weight: float) -> VideoLanguageModel:
    """Everything, with this weight of the routing loss."""
    components = ("language_model", "projector", "vision_encoder")
    model, _ = load_prepared(tiny.path, lambda it: choose_trainable(it, None, components))
    model.decoder.routing_weight = weight
    return model.train()


def test_the_loss_is_transformers() -> None:
    """Of several layers together, which is not the mean over the layers."""
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(20, 6, generator=generator, requires_grad=True) for _ in range(3))
    wanted: Any = load_balancing_loss_func(logits, 6, 2)
    routed = []
    for one in logits:
        probabilities = one.softmax(-1)
        rows = probabilities.topk(2).indices.flatten().bincount(minlength=6).float()
        routed.append(torch.stack([rows, probabilities.sum(0)]))
    found = routing_loss(torch.stack(routed))
    torch.testing.assert_close(found, wanted)
    one, other = (torch.autograd.grad(loss, logits) for loss in (found, wanted))
    torch.testing.assert_close(one, other)
    assert abs(float(sum(routing_loss(each[None]) for each in routed) / 3 - wanted)) > 1e-3


def test_even_is_the_number_of_chosen_experts() -> None:
    even = torch.stack([torch.full((4,), 10.0), torch.full((4,), 5.0)])[None]
    assert float(routing_loss(even)) == pytest.approx(2.0)
    assert float(routing_loss(torch.zeros(1, 2, 4))) == 0.0  # no rows


def test_loads() -> None:
    found = expert_loads(torch.tensor([[4.0, 2.0, 0.0, 2.0], [6.0, 6.0, 6.0, 6.0], [0.0, 0.0, 0.0, 0.0]]))
    assert found.tolist() == [2.0, 0.0, 5.0]
    assert expert_loads(torch.tensor([[1.0, 3.0]])).tolist() == [1.5, 0.5, 0.0]


@pytest.mark.parametrize("mode", ["none", "mlp", "selective", "full"])
def test_loss_and_gradients_are_those_of_transformers(moe: Tiny, mode: str) -> None:
    """Of the whole model, through the shares and the probabilities, and computed again."""
    batch, model = video_batch(moe), trained(moe, WEIGHT)
    checkpoint_activations(model, mode)
    loss = cross_entropy(model, batch)
    balance = routing_loss(torch.stack(model.decoder.routed))
    counts = [rows_G.tolist() for rows_G, _ in model.decoder.routed]
    (loss + WEIGHT * batch.num_targets * balance).backward()
    assert [rows_G.tolist() for rows_G, _ in model.decoder.routed] == counts  # not those of another forward pass

    theirs = moe.load(moe.path)
    out = theirs(**moe.inputs(batch), output_router_logits=True)
    assert float(balance) == pytest.approx(float(out.aux_loss), rel=1e-5)
    wanted = nn.functional.cross_entropy(out.logits[0][batch.target_index_N], batch.target_ids_N)
    batch_loss = (wanted + WEIGHT * out.aux_loss) * batch.num_targets
    batch_loss.backward()
    names = gradients(model)
    ours: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            ours[name] = moe.family.released(name, parameter.grad)
    assert_same_gradients({name: names[name] for name in ours}, ours, 1e-4)
    routers = [name for name in ours if name.endswith("mlp.gate.weight")]
    plain = trained(moe, 0.0)
    cross_entropy(plain, batch).backward()
    for name in routers:  # the loss is felt, far beyond that tolerance
        assert float((gradients(plain)[name] - names[name]).norm()) > 1e-3 * float(names[name].norm())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_without_it_nothing_changes(moe: Tiny) -> None:
    """The last layer, which is computed for supervised tokens alone, is not among the figures then."""
    batch, sparse = video_batch(moe), []
    for weight in (0.0, WEIGHT):
        model = trained(moe, weight)
        with torch.no_grad():
            loss = cross_entropy(model, batch)
        sparse.append((float(loss), len(model.decoder.routed)))
        assert all(rows_G.sum() == 2 * batch.num_tokens for rows_G, _ in model.decoder.routed)
        model.eval()
        with torch.no_grad():
            cross_entropy(model, batch)
        assert model.decoder.routed == []
    assert sparse[0][0] == pytest.approx(sparse[1][0], rel=1e-6)
    assert sparse[1][1] == sparse[0][1] + 1 == sum(isinstance(module, Experts) for module in model.modules())


def test_flops_of_the_last_layer(moe: Tiny) -> None:
    """It is computed for every token then."""
    row = video_batch(moe)
    plain, whole = (FlopCounter(trained(moe, weight)) for weight in (0.0, WEIGHT))
    assert whole.count(row).model - plain.count(row).model == plain.last * (row.num_tokens - row.num_targets) > 0


# ------------------------------------------------------------------------------------------------------ the setting


def config_of(tiny: Tiny, *overrides: str) -> Config:
    table = {"output_dir": "runs/x", "model": {"path": str(tiny.path), "train": ["language_model"]}}
    return load(table, overrides)


def weight_of(tiny: Tiny, overrides: Sequence[str] = (), **text: Any) -> float:
    pretrained = Pretrained.open(str(tiny.path))
    for name, value in text.items():
        setattr(pretrained.config.text_config, name, value)
    return open_for_training(config_of(tiny, *overrides), pretrained).model.decoder.routing_weight


def test_what_the_setting_means(moe: Tiny) -> None:
    coefficient = {"router_aux_loss_coef": 0.02}
    on = {**coefficient, "output_router_logits": True}
    assert weight_of(moe) == 0.0
    assert weight_of(moe, **on) == 0.02  # as transformers takes it
    assert weight_of(moe, ["train.routing_loss=false"], **on) == 0.0
    assert weight_of(moe, ["train.routing_loss=true"], **coefficient) == 0.02
    assert weight_of(moe, ["train.routing_loss=0.5"], **on) == 0.5


@pytest.mark.parametrize("value", ["true", "0.01"])
def test_without_experts_it_is_refused(tiny: Tiny, value: str) -> None:
    assert weight_of(tiny, ["train.routing_loss=false"]) == 0.0
    with pytest.raises(UserError, match=rf"train\.routing_loss = {value}: .* has no experts"):
        weight_of(tiny, [f"train.routing_loss={value}"])


@pytest.mark.parametrize("value", ["-0.1", "0", '"on"'])
def test_values_that_are_none(tiny: Tiny, value: str) -> None:
    with pytest.raises(UserError, match="routing_loss"):
        config_of(tiny, f"train.routing_loss={value}")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("moe", [pytest.param(FAMILIES[0], marks=pytest.mark.slow), FAMILIES[1]], indirect=True)
def test_compiled_layers_give_back_how_rows_were_routed(moe: Tiny, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """With adapters on the experts, without a break."""
    use_varlen(monkeypatch)
    compile_with_aot_eager(monkeypatch)

    def outcome(compile: bool) -> tuple[float, dict[str, Tensor], Any]:
        lora = LoraConfig(rank=4, targets=("language_model.*", "language_model.experts.*"))
        model, _ = load_prepared(moe.path, lambda it: choose_trainable(it, lora, ()))
        initialise(model, 0)
        disturb(model)
        model.train().decoder.routing_weight = WEIGHT
        config = ParallelConfig(activation_checkpointing=mode, compile=compile)
        parallelize(model, None, config, torch.float32, torch.device("cpu"))
        counters.clear()
        loss = cross_entropy(model, batch)
        routed = torch.stack(model.decoder.routed)
        (loss + WEIGHT * batch.num_targets * routing_loss(routed)).backward()
        return float(loss.detach()), gradients(model), routed.detach()

    batch = video_batch(moe)
    loss, wanted, routed = outcome(False)
    again, found, as_before = outcome(True)
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(as_before, routed)
    assert_same_gradients(found, wanted, 1e-4)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
