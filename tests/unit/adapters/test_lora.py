"""LoRA beside PEFT: adapters written here and there, merged folders, what is trained and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.adapters import adapted, difference, disturb, exported, logits_of, their_logits, video_batch
from tests.helpers.tiny import CPU, Media, Tiny, batch_of, load_model, load_prepared, loss_and_gradients, talk
from vft.adapters.lora import LoRALinear, initialise, is_adapter
from vft.adapters.targets import choose_trainable, match_targets
from vft.cli.merge_lora import merge
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.run import LoraConfig
from vft.models.base import VideoLanguageModel


@pytest.fixture(scope="module")
def batch(each_tiny: Tiny) -> Batch:
    return video_batch(each_tiny)


# ------------------------------------------------------------------------------------------------- written here

EXPORTS = {
    "attention": LoraConfig(rank=4, alpha=8, targets=("language_model.q_proj", "language_model.v_proj")),
    "all linears": LoraConfig(rank=3, alpha=5.5, targets=("language_model.*",)),
    "rslora": LoraConfig(rank=8, alpha=8, rslora=True, targets=("language_model.o_proj", "language_model.down_proj")),
    "components": LoraConfig(rank=2, alpha=6, targets=("vision_encoder.*", "projector.*", "language_model.up_proj")),
    "one layer": LoraConfig(rank=2, alpha=4, targets=("vision_encoder.q*",)),
}


RANKS = {"language_model.q_proj": 6, "language_model.model.layers.1.*": 3}
VARIANTS = {
    "dora": LoraConfig(rank=4, alpha=8, dora=True),
    "dora rslora components": LoraConfig(
        rank=4, alpha=8, dora=True, rslora=True, targets=("vision_encoder.*", "projector.*", "language_model.q_proj")
    ),
    "pissa": LoraConfig(rank=4, alpha=8, init="pissa"),
    "pissa rslora": LoraConfig(
        rank=3, alpha=8, init="pissa", rslora=True, targets=("vision_encoder.qkv", "projector.*")
    ),
    "pissa fast": LoraConfig(rank=4, alpha=8, init="pissa_niter_4", targets=("language_model.up_proj",)),
    "ranks": LoraConfig(rank=2, alpha=5, ranks=RANKS, alphas={"language_model.*_proj": 7.5}),
    "ranks of some": LoraConfig(
        rank=2, alpha=5, ranks=RANKS, alphas={"language_model.model.layers.2.mlp.*": 9, "language_model.q_proj": 1}
    ),
    "dora ranks rslora": LoraConfig(rank=2, alpha=5, ranks=RANKS, dora=True, rslora=True),
    "pissa ranks rslora": LoraConfig(
        rank=2, alpha=5, ranks=RANKS, alphas={"language_model.o_proj": 4}, init="pissa", rslora=True
    ),
}


def assert_all_agree(tiny: Tiny, batch: Batch, folder: Path, lora: LoraConfig) -> VideoLanguageModel:
    """What is exported gives, on the base as it was, the logits of the model that was trained: in PEFT, in PEFT's
    merged model, loaded here, and merged here. PEFT takes every tensor, misses none, and says nothing about them."""
    adapter = folder / "adapter"
    ours = exported(tiny, adapter, lora)
    wanted = logits_of(ours, batch)
    assert difference(wanted, logits_of(tiny.ours(), batch)) > 0.05
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(tiny.load(tiny.path), str(adapter))
    assert not [str(w.message) for w in said if "adapter" in str(w.message) or "keys" in str(w.message)]
    result = model.load_adapter(str(adapter), "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key and "again" in key]
    taken = {n.replace(".default", "") for n, _ in model.named_parameters() if "lora_" in n and ".default" in n}
    assert {n.removesuffix(".weight") for n in taken} == {
        n.removesuffix(".weight") for n in load_file(adapter / "adapter_model.safetensors")
    }
    assert difference(their_logits(model, batch, tiny), wanted) <= 2 * tiny.family.tolerance
    loaded = load_model(str(tiny.path), adapter, torch.float32, CPU).model
    assert difference(logits_of(loaded, batch), wanted) <= (
        2 * tiny.family.tolerance if lora.dora or lora.init != "kaiming" else 0
    )
    merge(str(tiny.path), adapter, folder / "merged")
    merged = tiny.load(folder / "merged")
    assert difference(their_logits(merged, batch, tiny), wanted) <= 2 * tiny.family.tolerance
    model.delete_adapter("again")
    found, wanted_of = (dict(one.named_parameters()) for one in (merged, model.merge_and_unload()))
    assert found.keys() == wanted_of.keys()
    for key, one in found.items():
        torch.testing.assert_close(one, wanted_of[key], rtol=1e-5, atol=2e-6, msg=key)
    return ours


@pytest.mark.parametrize("name", EXPORTS)
def test_all_agree_for_every_family(each_tiny: Tiny, batch: Batch, tmp_path: Path, name: str) -> None:
    assert_all_agree(each_tiny, batch, tmp_path, EXPORTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_all_agree_for_every_kind(tiny: Tiny, tmp_path: Path, name: str) -> None:
    assert_all_agree(tiny, video_batch(tiny), tmp_path, VARIANTS[name])


def test_head_of_its_own(each_untied: Tiny, batch: Batch, tmp_path: Path) -> None:
    """lm_head is adapted where it is named."""
    lora = LoraConfig(rank=2, alpha=4, targets=("language_model.lm_head", "language_model.q_proj"))
    model = assert_all_agree(each_untied, batch, tmp_path, lora)
    _, gradients = loss_and_gradients(model, batch)
    assert len(gradients) == 2 * (1 + model.decoder.attention_layers) and all(
        bool(g.abs().max() > 0) for g in gradients.values()
    )


def test_initial_adapter_is_the_base(each_tiny: Tiny, batch: Batch) -> None:
    """Equal to the last bit; A is uniform in +-1/sqrt(in) and the same whatever the order of the targets."""
    targets = ("language_model.*", "vision_encoder.q*")
    first, _ = adapted(each_tiny, LoraConfig(rank=4, targets=targets))
    assert torch.equal(logits_of(first, batch), logits_of(each_tiny.ours(), batch))
    second, _ = adapted(each_tiny, LoraConfig(rank=4, targets=targets[::-1]))
    other, _ = adapted(each_tiny, LoraConfig(rank=4, targets=targets), seed=1)
    matrices = {name: p for name, p in first.named_parameters() if name.endswith("lora_A.weight")}
    assert len(matrices) == each_tiny.family.linears + len(list(first.vision.blocks))
    for name, a in matrices.items():
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < float(a.detach().abs().max()) <= bound
        assert torch.equal(a, second.get_parameter(name))
        assert not torch.equal(a, other.get_parameter(name))
    assert len({tuple(a.flatten()[:4].tolist()) for a in matrices.values()}) == len(matrices)


def test_dropout_is_off_when_the_model_answers(each_tiny: Tiny, batch: Batch) -> None:
    model, _ = adapted(each_tiny, LoraConfig(rank=4, dropout=0.5))
    disturb(model)
    model.train()
    torch.manual_seed(0)
    dropped = logits_of(model, batch)
    model.eval()
    whole = logits_of(model, batch)
    assert torch.equal(whole, logits_of(model, batch)) and difference(whole, dropped) > 0.01


# -------------------------------------------------------------------------------------------------- written by PEFT

PARTS_OF_TOWERS = r".*(visual|vision_tower|projector).*(qkv|proj|fc1|mlp\.0|mlp\.2|down_proj|linear_1)"
PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "names": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"]},
    "expression": {"r": 2, "lora_alpha": 3, "target_modules": r".*language_model\..*mlp\.(.*\.)?(up|gate)_proj"},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj", "o_proj"]},
    "components": {"r": 4, "lora_alpha": 4, "target_modules": PARTS_OF_TOWERS},
    "all linears": {"r": 2, "lora_alpha": 1, "target_modules": "all-linear"},
    "one layer": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}
PEFT_VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora rslora": {"r": 9, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "target_modules": ["o_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        # A name that ends in another, the first of two that fit, an anchor, a part of a path.
        "rank_pattern": {"proj": 5, r"^model\.language_model.*1\.self_attn\.q_proj": 3, "q_proj": 2, "layers.1.*": 7},
        "alpha_pattern": {r".*\.(0|2)\..*up_proj": 3, "self_attn.k_proj": 8},
    },
}


def peft_adapter(tiny: Tiny, folder: Path, config: dict[str, Any], **kept: Any) -> PeftModel:
    """Trained a little. PEFT takes a convolution such as the patch embedding for another kind of layer."""
    torch.manual_seed(0)
    settings = {"init_lora_weights": False, "exclude_modules": ".*patch_embed.*", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(tiny.load(tiny.path), PeftConfig(**settings)).eval()
    if "path_initial_model_for_weight_conversion" in kept:
        model.save_pretrained(kept["path_initial_model_for_weight_conversion"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, **kept)
    return model


def assert_peft_is_read(tiny: Tiny, batch: Batch, folder: Path, config: dict[str, Any]) -> None:
    """Loaded here, and merged by tools/merge_lora.py, PEFT's adapter gives PEFT's logits."""
    theirs = peft_adapter(tiny, folder / "adapter", config)
    wanted = their_logits(theirs, batch, tiny)
    assert difference(wanted, their_logits(tiny.theirs, batch, tiny)) > 0.05
    loaded = load_model(str(tiny.path), folder / "adapter", torch.float32, CPU).model
    assert difference(logits_of(loaded, batch), wanted) <= 2 * tiny.family.tolerance
    adapters = [m for m in loaded.modules() if isinstance(m, LoRALinear)]
    ranks = [p.shape[0] for n, p in theirs.named_parameters() if n.endswith("lora_A.default.weight")]
    assert sorted(m.rank for m in adapters) == sorted(ranks)
    assert len(set(ranks)) == (4 if "rank_pattern" in config else 1)
    assert merge(str(tiny.path), folder / "adapter", folder / "merged") == len(ranks)
    assert difference(their_logits(tiny.load(folder / "merged"), batch, tiny), wanted) <= 2 * tiny.family.tolerance


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_adapters_of_peft_for_every_family(each_tiny: Tiny, batch: Batch, tmp_path: Path, name: str) -> None:
    assert_peft_is_read(each_tiny, batch, tmp_path, PEFT_CONFIGS[name])


@pytest.mark.parametrize("name", PEFT_VARIANTS)
def test_adapters_of_peft_of_every_kind(tiny: Tiny, tmp_path: Path, name: str) -> None:
    assert_peft_is_read(tiny, video_batch(tiny), tmp_path, PEFT_VARIANTS[name])


def test_pissa_of_peft(tiny: Tiny, tmp_path: Path) -> None:
    """Converted by PEFT it is read; as it is, it would be added to a base that it doesn't fit, and is refused."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}
    converted = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    row = video_batch(tiny)
    wanted = their_logits(peft_adapter(tiny, tmp_path / "adapter", config, **converted), row, tiny)
    loaded = load_model(str(tiny.path), tmp_path / "adapter", torch.float32, CPU)
    assert difference(logits_of(loaded.model, row), wanted) <= 2 * tiny.family.tolerance
    peft_adapter(tiny, tmp_path / "as it is", config)
    with pytest.raises(UserError, match=r"init_lora_weights = 'pissa': .*path_initial_model_for_weight_conversion"):
        load_model(str(tiny.path), tmp_path / "as it is", torch.float32, CPU)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("attention", {"use_dora": True}, "lora_magnitude_change: found in the model alone"),
        ("attention", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("attention", {"peft_type": "IA3"}, "IA3"),
        ("dora", {"rank_pattern": {"q_proj": 3}}, r"q_proj\.lora_A\.weight: shape \[4, 64\] in the adapter, \[3, 64\]"),
        ("dora", {"rank_pattern": {"q_(": 3}}, r"rank_pattern\.'q_\(': not a regular expression"),
        ("dora", {"rank_pattern": {"q_proj": "3"}}, r"rank_pattern\.'q_proj' = '3': must be a number above 0"),
        ("dora", {"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\.'q_proj' = -1: must be a number above 0"),
        ("dora", {"alpha_pattern": ["q_proj"]}, r"alpha_pattern = \['q_proj'\]: must be an object"),
        ("dora", {"use_dora": False}, r"lora_magnitude_change: found in the file alone"),
        ("dora", {"use_dora": "yes"}, r"'use_dora': 'yes'.*not the settings"),
        ("dora", {"use_qalora": True}, r"use_qalora = True: not supported"),
    ],
)
def test_files_that_do_not_agree(tiny: Tiny, tmp_path: Path, kind: str, change: dict[str, Any], named: str) -> None:
    """What would be left out in silence otherwise."""
    exported(tiny, tmp_path / "adapter", (EXPORTS | VARIANTS)[kind])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=named):
        load_model(str(tiny.path), tmp_path / "adapter", torch.float32, CPU)


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", ["all linears", "components", "rslora"])
def test_merged_folder(each_bf16: Tiny, batch: Batch, tmp_path: Path, name: str) -> None:
    """A base in bfloat16 and several files: PEFT's merge in float32, rounded once; the rest of the folder as it was."""
    exported(each_bf16, tmp_path / "adapter", EXPORTS[name])
    changed = merge(str(each_bf16.path), tmp_path / "adapter", tmp_path / "merged")
    peft_model = PeftModel.from_pretrained(each_bf16.load(each_bf16.path), str(tmp_path / "adapter"))
    wanted = peft_model.merge_and_unload().to(torch.bfloat16)
    found = each_bf16.load(tmp_path / "merged", torch.bfloat16)
    base = dict(each_bf16.load(each_bf16.path, torch.bfloat16).named_parameters())
    moved = 0
    for (key, one), (other_key, other) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert key == other_key
        # Sums in another order: at most one step of bfloat16 apart, in a few places.
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)
        assert float((one != other).float().mean()) < 0.01
        moved += not torch.equal(one, base[key])
    assert moved == changed
    merged, exact, plain = (their_logits(m.float(), batch, each_bf16) for m in (found, wanted, each_bf16.theirs))
    assert difference(merged, exact) < 0.05 * difference(exact, plain)
    before, after = (sorted(p.name for p in folder.iterdir()) for folder in (each_bf16.path, tmp_path / "merged"))
    assert set(after) - set(before) <= {"README.md", "vft.json", "generation_config.json"} and set(before) <= set(after)
    for file in each_bf16.path.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "merged" / file.name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            for key in old.keys():  # noqa: SIM118
                assert old.get_slice(key).get_shape() == new.get_slice(key).get_shape()
                assert old.get_slice(key).get_dtype() == new.get_slice(key).get_dtype()


def test_merging_never_overwrites(tiny: Tiny, tmp_path: Path) -> None:
    exported(tiny, tmp_path / "adapter", EXPORTS["attention"])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="isn't empty"):
        merge(str(tiny.path), tmp_path / "adapter", tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------ another base


def test_adapter_of_another_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """A base of the same shape: only its weights differ."""
    exported(tiny, tmp_path / "adapter", EXPORTS["attention"])
    other = tiny.family.save(tmp_path / "other", seed=9)
    for use in (
        lambda: load_model(str(other), tmp_path / "adapter", torch.float32, CPU),
        lambda: merge(str(other), tmp_path / "adapter", tmp_path / "merged"),
    ):
        with pytest.raises(UserError, match="another base") as caught:
            use()
        assert str(other) in str(caught.value) and str(tiny.path) in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("fault", ["shape", "rank", "layer", "half"])
def test_adapter_that_does_not_fit_is_refused(tiny: Tiny, tmp_path: Path, fault: str) -> None:
    """Without a fingerprint, as another program's adapter comes: its shapes and names tell."""
    exported(tiny, tmp_path / "adapter", EXPORTS["attention"])
    (tmp_path / "adapter" / "vft.json").unlink()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    if fault == "shape":
        tensors[name] = torch.zeros(4, 65)
    elif fault == "rank":
        tensors[name] = torch.zeros(5, 64)
    elif fault == "layer":
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)
    else:
        del tensors[name.replace("lora_A", "lora_B")]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layers\.[17]\.self_attn\.q_proj"):
        load_model(str(tiny.path), tmp_path / "adapter", torch.float32, CPU)


# ------------------------------------------------------------------------------------------------- what is trained


def built(tiny: Tiny) -> VideoLanguageModel:
    return load_prepared(tiny.path, lambda it: None)[0]


def test_targets(tiny: Tiny) -> None:
    """Anchored to an encoder: names that two components share match in one alone."""
    model = built(tiny)

    def names(pattern: str) -> list[str]:
        return match_targets(model, [pattern])[pattern]

    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    in_layers = [n for n in linears if n.startswith("model.layers.")]
    assert names("language_model.*") == in_layers and len(in_layers) == 3 * 7
    assert names("language_model.up_proj") == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert names("vision_encoder.up_proj") == [f"visual.blocks.{i}.mlp.up_proj" for i in range(3)]
    assert names("projector.*") == ["visual.merger.mlp.0", "visual.merger.mlp.2"]
    assert names("language_model.model.layers.1.*_proj") == [n for n in in_layers if ".layers.1." in n]
    every = names("language_model.*") + names("vision_encoder.*") + names("projector.*")
    assert sorted(every) == sorted(linears)


def test_head_is_never_matched_by_a_star(tiny_untied: Tiny) -> None:
    model = built(tiny_untied)
    matched = match_targets(model, ["language_model.*", "language_model.lm_head"])
    assert "lm_head" not in matched["language_model.*"] and matched["language_model.lm_head"] == ["lm_head"]


@pytest.mark.parametrize(
    "pattern", ["language_model.qkv", "vision_encoder.q_proj", "projector.mlp", "language_model.lm_head"]
)
def test_pattern_that_matches_nothing(tiny: Tiny, pattern: str) -> None:
    """A head that is tied has no layer to adapt."""
    model = built(tiny)
    with pytest.raises(UserError, match="matches no linear layer") as caught:
        match_targets(model, ["language_model.q_proj", pattern])
    assert pattern in str(caught.value)


def test_table_of_targets(tiny: Tiny) -> None:
    """Rows add up to what is trained, by the shapes: rank x (in + out) for each layer."""
    tables: list[Any] = []
    lora = LoraConfig(rank=5, targets=("language_model.q_proj", "projector.*"))
    model, _ = load_prepared(tiny.path, lambda it: tables.append(choose_trainable(it, lora, ())))
    counts = [(row.modules, row.parameters) for row in tables[0]]
    assert counts == [(3, 3 * 5 * (64 + 64)), (2, 5 * (128 + 128) + 5 * (128 + 64))]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(count for _, count in counts)
    assert all(is_adapter(name) for name in trained)


def test_adapters_are_float32_beside_bfloat16(each_bf16: Tiny, batch: Batch) -> None:
    lora = LoraConfig(rank=4)
    model, _ = load_prepared(each_bf16.path, lambda it: choose_trainable(it, lora, ()), torch.bfloat16)
    initialise(model, 0)
    dtypes = {is_adapter(n): p.dtype for n, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    _, gradients = loss_and_gradients(model, batch)
    assert gradients and all(is_adapter(name) and g.dtype == torch.float32 for name, g in gradients.items())


COMPONENTS = ("language_model", "projector", "vision_encoder")


@pytest.mark.parametrize(
    "train", [("language_model",), ("projector",), ("vision_encoder",), ("projector", "language_model"), COMPONENTS]
)
@pytest.mark.parametrize("media", [True, False])
def test_full_fine_tuning(each_tiny: Tiny, batch: Batch, train: Sequence[str], media: bool) -> None:
    """Exactly the named parts get gradients, those that transformers' model has; a row without media gives the
    encoder's all the same, zero, so that no process waits for another's."""
    model, _ = load_prepared(each_tiny.path, lambda it: choose_trainable(it, None, train))
    if not media:
        plain = talk(("user", "Hello"), ("assistant", "Hi there."))
        batch = batch_of(each_tiny.encoder, ([plain], Media((), ())))
    prefixes = tuple(prefix for encoder in train for prefix in each_tiny.family.components[encoder])
    expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    _, wanted = loss_and_gradients(each_tiny.ours(), batch)
    _, found = loss_and_gradients(model, batch)
    assert found.keys() == expected
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)
        text = name.startswith(each_tiny.family.components["language_model"])
        used = text or (media and name != "image_newline")  # which stands in pictures alone
        assert bool(gradient.abs().max() > 0) == used, name
