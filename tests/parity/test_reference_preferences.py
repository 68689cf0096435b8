"""Objectives of pairs beside transformers and PEFT, which computed one sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.tiny import CPU, load_model
from vft.adapters.lora import is_adapter
from vft.common.types import Batch
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import Config, ObjectiveConfig
from vft.data.dataset import load_dataset
from vft.data.media.patches import load_patches
from vft.data.packing import collate
from vft.preparation.documents import learnt_conversations
from vft.preparation.run import PreparedModel
from vft.recipes.caption import Caption
from vft.training.preferences import FIGURES, Preference, by_suffix, without_adapters

RTOL = 1e-5


@pytest.fixture(scope="module")
def folder(reference_today: Path) -> Path:
    return reference_today / "cases_preference"


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "preference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "preference.safetensors")


@pytest.fixture(scope="module")
def prepared(folder: Path, reference: Path) -> PreparedModel:
    """The base with the case's adapter, which is trained."""
    made = load_model(str(reference / "qwen2_5_vl_tiny"), folder / "adapter", torch.float32, CPU)
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    return made


def batches(prepared: PreparedModel, facts: dict[str, Any], videos: Path, folder: Path, **settings: Any) -> list[Batch]:
    """The pairs, read from records in TRL's form, a batch for each document."""
    records = []
    for pair in facts["pairs"]:
        medium, (asked,) = pair["media"][0], pair["prompt"]
        options = {"nframes": len(medium["frame_indices"])} | {key: medium[key] for key in ("min_pixels", "max_pixels")}
        (video, text) = asked["content"]
        prompt = [{**asked, "content": [{**video, **options}, text]}]
        answers = {key: [{"role": "assistant", "content": pair[key]}] for key in ("chosen", "rejected")}
        records.append({"prompt": prompt, **answers})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    data = DataConfig(root=videos, workers=0, cache_dir=str(folder / "cache"), max_bad_fraction=0.0, **settings)
    config = Config(output_dir=folder, model={"path": "x"}, objective={"kind": "simpo"}, data=data)
    source, encoder = SourceConfig(format="messages", path=str(file)), prepared.encoder(data)
    dataset = load_dataset(data, [source], learnt_conversations(Caption(), config), encoder, seed=0)
    assert sum(dataset.samples) == 2
    made = [dataset.build(number) for number in range(len(dataset.documents))]
    assert dataset.lengths == tuple(document.num_tokens for document in made)
    patches = {plan: load_patches(plan, encoder.processor) for document in made for plan in document.media}
    return [collate([(one, [patches[plan] for plan in one.media])], encoder.processor) for one in made]


@pytest.fixture(scope="module", params=["one document", "a document for each"])
def pairs(
    request: pytest.FixtureRequest,
    prepared: PreparedModel,
    facts: dict[str, Any],
    videos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Batch]:
    share = request.param == "one document"
    made = batches(prepared, facts, videos, tmp_path_factory.mktemp("pairs"), share_videos=share)
    assert len(made) == (1 if share else 2)
    assert all(document.prefix_length > 40 for batch in made for document in batch.documents)
    return made


def test_log_probabilities(prepared: PreparedModel, pairs: list[Batch], facts: dict[str, Any]) -> None:
    found, reference = [], []
    with torch.no_grad():
        for batch in pairs:
            found += by_suffix(prepared.model, batch).tolist()
            with without_adapters(prepared.model):
                reference += by_suffix(prepared.model, batch).tolist()
    each = [pair[f"{answer}_facts"] for pair in facts["pairs"] for answer in ("chosen", "rejected")]
    assert found == pytest.approx([one["policy"] for one in each], rel=RTOL)
    assert reference == pytest.approx([one["reference"] for one in each], rel=RTOL)


KINDS = {
    "dpo_sigmoid": {"kind": "dpo"},
    "hinge": {"kind": "hinge"},
    "ipo": {"kind": "ipo"},
    "ipo_sum": {"kind": "ipo_sum"},
    "simpo": {"kind": "simpo"},
    "simpo_trl_defaults": {"kind": "simpo", "beta": 0.1, "gamma": 0.5},
    "orpo": {"kind": "orpo"},
}


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients(
    name: str, prepared: PreparedModel, pairs: list[Batch], facts: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """As the mean over the pairs, as a step has it."""
    model, objective, wanted = prepared.model, Preference(ObjectiveConfig(**KINDS[name])), facts["losses"][name]
    model.zero_grad()
    sums = torch.zeros(1 + len(FIGURES))
    for batch in pairs:
        found = objective(model, batch)
        (found[0] / 2).backward()
        sums += found.detach()
    loss, *figures = (sums / 2).tolist()
    assert loss == pytest.approx(wanted["loss_f64"], rel=RTOL)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    assert norm == pytest.approx(wanted["grad_norm_total"], rel=RTOL)
    if name == "dpo_sigmoid":
        named = dict(zip(FIGURES, figures, strict=True))
        rewards = facts["rewards"]
        assert named["reward_chosen"] == pytest.approx(sum(rewards["chosen"]) / 2, rel=1e-3)
        assert named["reward_rejected"] == pytest.approx(sum(rewards["rejected"]) / 2, rel=1e-3)
        assert named["reward_accuracy"] == rewards["accuracy"]
        norms = facts["dpo_sigmoid_grad_norms"]
        assert len(norms) == len(gradients)
        for full, value in norms.items():
            own = full.removeprefix("base_model.model.")
            (found_norm,) = (float(g.norm()) for n, g in gradients.items() if model.peft_name(n) == own)
            assert found_norm == pytest.approx(value, rel=1e-4), own
