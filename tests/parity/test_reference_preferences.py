"""Objectives of pairs beside transformers and PEFT, which computed one sequence at a time."""

from __future__ import annotations

import json
from dataclasses import replace
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
from vft.data.dataset import load_dataset, make_dataset
from vft.data.media.patches import load_patches
from vft.data.packing import collate
from vft.preparation.documents import learnt_conversations
from vft.preparation.run import PreparedModel
from vft.recipes.caption import Caption
from vft.training.preferences import FIGURES, KTO, Preference, by_suffix, without_adapters

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


def batches(
    prepared: PreparedModel,
    facts: dict[str, Any],
    videos: Path,
    folder: Path,
    kind: str = "simpo",
    others: dict[str, str] | None = None,
    **settings: Any,
) -> list[Batch]:
    """The pairs, read from records in TRL's form, a batch for each document. For KTO the answers `others` stand beside
    those to which they belong."""
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
    config = Config(output_dir=folder, model={"path": "x"}, objective={"kind": kind}, lora={}, data=data)
    source, encoder = SourceConfig(format="messages", path=str(file)), prepared.encoder(data)
    dataset = load_dataset(data, [source], learnt_conversations(Caption(), config), encoder, seed=0)
    if others is not None:
        texts = [replace(one, rejected=others[one.turns[-1].text]) for one in dataset.conversations]
        dataset = make_dataset(texts, encoder, data, dataset.info)
    assert sum(dataset.samples) == (2 if others is None else 4)
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
    # The paper's IPO squares a difference of sums of hundreds: 8e-6 to 3e-5, by what the CPU can do.
    assert loss == pytest.approx(wanted["loss_f64"], rel=1e-4 if name == "ipo_sum" else RTOL)
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


@pytest.mark.parametrize("share", [True, False])
def test_kto(prepared: PreparedModel, facts: dict[str, Any], videos: Path, tmp_path: Path, share: bool) -> None:
    """A step of the four answers, each beside that of the row before it: first all chosen, then all rejected ones."""
    model, wanted = prepared.model, facts["losses"]["kto"]
    rows = [pair[answer] for answer in ("chosen", "rejected") for pair in facts["pairs"]]
    others = {answer: rows[number - 1] for number, answer in enumerate(rows)}
    made = batches(prepared, facts, videos, tmp_path, "kto", others, share_videos=share)
    objective = KTO(ObjectiveConfig(kind="kto"))
    assert sum(map(objective.weight, made)) == 4
    total = torch.stack([objective.look(model, batch) for batch in made]).sum(0)
    assert float(total[1]) == 4
    assert float(total[0]) / 4 == pytest.approx(wanted["kl_mean_before_clamp"], rel=1e-4)
    objective.set_ahead(total)
    model.zero_grad()
    sums = torch.zeros(1 + len(objective.figures))
    for batch in made:
        found = objective(model, batch)
        (found[0] / 4).backward()
        sums += found.detach()
    loss, *figures = (sums / 4).tolist()
    assert loss == pytest.approx(wanted["loss_f64"], rel=RTOL)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(wanted["grad_norm_total"], rel=RTOL)
    named, rewards = objective.named(figures), facts["rewards"]
    assert (named["desirable"], named["kl"]) == (0.5, 0.0)
    assert named["reward_chosen"] == pytest.approx(sum(rewards["chosen"]) / 2, rel=1e-3)
    assert named["log_p_rejected"] == pytest.approx(sum(p["rejected_facts"]["policy"] for p in facts["pairs"]) / 2)


@pytest.mark.parametrize("kl", [0.0, 1.0, 3.0])
def test_kto_at_other_divergences(
    prepared: PreparedModel, facts: dict[str, Any], videos: Path, tmp_path: Path, kl: float
) -> None:
    answers = [pair[answer] for answer in ("chosen", "rejected") for pair in facts["pairs"]]
    made = batches(prepared, facts, videos, tmp_path, "kto", dict(zip(answers, answers[1:] + answers[:1], strict=True)))
    objective = KTO(ObjectiveConfig(kind="kto"))
    objective.set_ahead(torch.tensor([7 * kl, 7.0]))
    with torch.no_grad():
        loss = sum(float(objective(prepared.model, batch)[0]) for batch in made) / 4
    assert loss == pytest.approx(facts["losses"]["kto"]["loss_at_kl"][str(kl)], rel=RTOL)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_frozen_encoder_sees_each_video_once(
    prepared: PreparedModel,
    facts: dict[str, Any],
    videos: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference's pass and the trained ones share its embeddings; a trained encoder makes them anew."""
    answers = [pair[answer] for answer in ("chosen", "rejected") for pair in facts["pairs"]]
    others = dict(zip(answers, answers[1:] + answers[:1], strict=True)) if kind == "kto" else None
    (batch,) = batches(prepared, facts, videos, tmp_path, kind, others)
    objective, model, seen = (KTO if kind == "kto" else Preference)(ObjectiveConfig(kind=kind)), prepared.model, []
    encode = model.encode_media
    monkeypatch.setattr(model, "encode_media", lambda *given: seen.append(1) or encode(*given))

    def step() -> Tensor:
        if objective.looks_ahead:
            objective.set_ahead(objective.look(model, batch))
        return objective(model, batch)

    with torch.no_grad():
        shared = step()
        assert len(seen) == 1
        weight = model.vision_parameters()[0]
        weight.requires_grad_(True)
        torch.testing.assert_close(step(), shared, rtol=0, atol=0)
        weight.requires_grad_(False)
    assert len(seen) == 1 + (4 if kind == "kto" else 2) - (kind == "kto")
