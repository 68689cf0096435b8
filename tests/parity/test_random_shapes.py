"""Families with recurrent layers and experts beside transformers' models of random shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.families import FAMILIES
from tests.helpers.rows import ROWS, kinds_of, prompt, row
from tests.helpers.tiny import CPU, Tiny, assert_same_gradients, every_logit, load_model, loss_and_gradients
from vft.inference.generate import Sampling, generate

SHAPES = range(3)


def shape_of(family: str, seed: int) -> dict[str, Any]:
    """A decoder that differs in everything in which released ones may."""
    pick = random.Random(f"{family} {seed}").choice
    layers = pick([3, 4, 5])
    key_heads = pick([1, 2])
    text: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": key_heads * pick([1, 2, 3]),
        "num_key_value_heads": key_heads,
        "intermediate_size": pick([40, 72]),
    }
    rope = {"rope_type": "default", "rope_theta": pick([1e4, 1e7]), "mrope_interleaved": True}
    if family == "qwen3_vl_moe":
        text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_section": pick([[4, 2, 2], [3, 3, 2], [2, 3, 3]])}}
        text["mlp_only_layers"] = pick([[], [layers - 1]])
    else:
        share, section = pick([(0.25, [2, 1, 1]), (0.5, [3, 3, 2]), (1.0, [6, 5, 5])])
        text |= {"head_dim": 32, "rope_parameters": rope | {"mrope_section": section, "partial_rotary_factor": share}}
        kinds = [pick(["linear_attention", "full_attention"]) for _ in range(layers - 2)]
        heads = pick([1, 2, 3])
        text |= {
            "layer_types": ["linear_attention", *kinds, pick(["linear_attention", "full_attention"])],
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads * pick([1, 2, 3]),
            "linear_key_head_dim": pick([8, 16, 24]),
            "linear_value_head_dim": pick([8, 16, 32]),
            "linear_conv_kernel_dim": [4, 1, 2][seed],
        }
    if family.endswith("moe"):
        experts = pick([3, 6, 8])
        text |= {"num_experts": experts, "num_experts_per_tok": pick([1, 2, 3]), "moe_intermediate_size": pick([8, 24])}
    if family == "qwen3_5_moe":
        text["shared_expert_intermediate_size"] = pick([12, 40])
    return text


@pytest.fixture(scope="module", params=[(f, s) for f in ("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe") for s in SHAPES])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random checkpoint of a random shape."""
    family, seed = request.param
    folder = tmp_path_factory.mktemp("shape") / "base"
    text = shape_of(family, seed)
    return Tiny(FAMILIES[family].save(folder, text=text, tied=bool(seed % 2), seed=seed + 3), FAMILIES[family])


@pytest.mark.parametrize("name", ["text", "mixed"])
def test_logits_and_gradients(checkpoint: Tiny, name: str) -> None:
    """Those of transformers in float64. Random layers amplify rounding; its own in float32 are no nearer."""
    batch, model = row(checkpoint, name), checkpoint.ours()
    inputs = checkpoint.inputs(batch)
    doubled = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    exact = checkpoint.family.model_class.from_pretrained(
        checkpoint.path, dtype=torch.float64, experts_implementation="eager"
    )
    logits = exact(**doubled).logits[0]
    wanted_loss = F.cross_entropy(logits[:-1], batch.labels_T[1:], reduction="sum", ignore_index=-100)
    wanted_loss.backward()
    with torch.no_grad():
        found, theirs = every_logit(model, batch), checkpoint.theirs(**inputs).logits[0]
    assert float(logits.std()) > 0.5
    assert float((found - logits).abs().max()) <= 1e-3
    assert float((found - logits).square().mean()) <= 2 * float((theirs - logits).square().mean())
    loss, gradients = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
    ours = {model.peft_name(name): name for name, _ in model.named_parameters()}
    wanted = {
        ours[name]: checkpoint.family.released(name, parameter.grad.float())
        for name, parameter in exact.named_parameters()
        if parameter.grad is not None
    }
    assert_same_gradients({name: gradients[name] for name in wanted}, wanted, tolerance=1e-3)


def test_greedy_generation(checkpoint: Tiny) -> None:
    for name in ROWS:
        batch = prompt(checkpoint, name)
        inputs = checkpoint.inputs(batch) | {"mm_token_type_ids": kinds_of(batch)}
        del inputs["position_ids"]
        options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            wanted = checkpoint.theirs.generate(**inputs, **options)[0, batch.num_tokens :].tolist()
        assert generate(checkpoint.ours(), batch, (), Sampling(10))[0].ids == wanted, name


def test_bfloat16(checkpoint: Tiny) -> None:
    """As far from float32 as transformers', by at most a half."""
    batch = row(checkpoint, "mixed")
    ours = load_model(str(checkpoint.path), None, torch.bfloat16, CPU).model
    theirs = checkpoint.load(checkpoint.path, torch.bfloat16)
    with torch.no_grad():
        exact = checkpoint.theirs(**checkpoint.inputs(batch)).logits[0]
        found, wanted = every_logit(ours, batch), theirs(**checkpoint.inputs(batch)).logits[0].float()
    assert float((found - exact).square().mean().sqrt()) <= 1.5 * float((wanted - exact).square().mean().sqrt())
