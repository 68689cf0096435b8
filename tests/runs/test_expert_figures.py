"""What metrics.jsonl says of experts, beside transformers' routers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands, metrics
from tests.runs.world import FULL_TUNING, TEXTS, World, make_world, record

FIGURES = ("routing_loss", "expert_load_max", "expert_load_min", "experts_unused")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("moe"), "qwen3_vl_moe")
    (made.root / "texts.jsonl").write_text("".join(json.dumps(record(*text)) + "\n" for text in TEXTS.items()))
    return made


def settings(**train: Any) -> tuple[dict[str, Any], ...]:
    """One step of all the texts, each a pack."""
    data = {"sources": [{"format": "messages", "path": "texts.jsonl"}], "max_samples_per_pack": 1}
    return FULL_TUNING, {"data": data, "train": {"max_steps": 1, "packs_per_step": len(TEXTS), **train}}


@pytest.mark.parametrize(
    ("weight", "layers"), [({}, 1), ({"routing_loss": 0.1}, 2), ({"routing_loss": True}, 2)], ids=str
)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_steps_figures(
    moe: World, commands: Commands, tmp_path: Path, weight: dict[str, Any], layers: int, mode: str
) -> None:
    """Packs weighted by their supervised tokens; experts by all packs together. Recomputed rows count once."""
    import torch
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    from tests.helpers.families import QWEN3_VL_MOE
    from tests.helpers.tiny import NO_MEDIA, Tiny, batch_of, talk

    recomputed: dict[str, Any] = {"parallel": {"activation_checkpointing": mode}}
    (line,) = metrics(commands.train(moe.config(tmp_path / "run.toml", *settings(**weight), recomputed)))
    tiny = Tiny(moe.base, QWEN3_VL_MOE)
    targets, losses, balances, rows = 0, 0.0, 0.0, torch.zeros(layers, 4)
    for question, answer in TEXTS.items():
        batch = batch_of(tiny.encoder, ([talk(("user", question), ("assistant", answer))], NO_MEDIA))
        with torch.no_grad():
            out = tiny.theirs(**tiny.inputs(batch), output_router_logits=True)
        logits = out.router_logits[:layers]
        balances += batch.num_targets * float(load_balancing_loss_func(logits, 4, 2))
        predicted = out.logits[0][batch.target_index_N]
        losses += float(torch.nn.functional.cross_entropy(predicted, batch.target_ids_N, reduction="sum"))
        targets += batch.num_targets
        for layer, one in enumerate(logits):
            rows[layer] += one.topk(2).indices.flatten().bincount(minlength=4)
    loads = rows / rows.mean(1, keepdim=True)
    assert line["loss"] == pytest.approx(losses / targets, rel=1e-5)  # of the tokens alone
    wanted = [balances / targets, float(loads.max()), float(loads.min()), int((rows == 0).sum())]
    assert [line[name] for name in FIGURES] == pytest.approx(wanted, rel=1e-5)
    assert line["expert_load_max"] > 1.1 > 0.9 > line["expert_load_min"]


def test_a_dense_model_has_no_such_figures(world: World, commands: Commands, tmp_path: Path) -> None:
    (line,) = metrics(commands.train(world.config(tmp_path / "run.toml", {"train": {"max_steps": 1}})))
    assert not set(FIGURES) & set(line)


def test_routers_learn_to_spread(moe: World, commands: Commands, tmp_path: Path) -> None:
    steps = {"max_steps": 12, "learning_rate": 3e-3}
    with_it, without = (
        metrics(commands.train(moe.config(tmp_path / f"{number}.toml", *settings(**steps, **weight))))
        for number, weight in enumerate(({"routing_loss": 5.0}, {"routing_loss": False}))
    )
    assert with_it[-1]["routing_loss"] < 2.1 < without[-1]["routing_loss"]
    assert min(line["routing_loss"] for line in with_it) >= 2.0


def test_figures_that_are_no_numbers() -> None:
    """JSON has no NaN."""
    import torch

    from vft.distributed.process_group import World as Processes
    from vft.reporting.monitor import Tally, describe_step

    cpu, counts = torch.device("cpu"), Counter({"num_targets": 1, "weight": 1})
    figures = dict(zip(FIGURES, [float("nan"), 2.0, 0.0, 3.0], strict=True))
    line = describe_step(1.0, 1.0, 1e-4, counts, Tally(cpu), Processes(0, 1, 0, cpu), torch.float32, figures)
    assert [line[name] for name in FIGURES] == [None, 2.0, 0.0, 3.0]
    json.dumps(line, allow_nan=False)
