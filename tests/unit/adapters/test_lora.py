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

from tests.helpers.adapters import adapted, difference, logits_of, their_logits, video_batch
from tests.helpers.tiny import CPU, Media, Tiny, batch_of, load_model, load_prepared, loss_and_gradients, talk
from vft.adapters.lora import LoRALinear, fill, initialise, is_adapter
from vft.adapters.peft_format import Adapter, attach, export_adapter
from vft.adapters.targets import choose_trainable, match_targets
from vft.cli.merge_lora import merge
from vft.common.errors import UserError
from vft.common.types import Batch
from vft.config.run import LoraConfig
from vft.models.base import VideoLanguageModel


@pytest.fixture(scope="module")
def batch(each_tiny: Tiny) -> Batch:
    return video_batch(each_tiny)


def train_a_little(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values in place of training, for B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            fill(parameter, 0.1 * torch.randn(parameter.shape, generator=generator))


def export(tiny: Tiny, folder: Path, lora: LoraConfig) -> VideoLanguageModel:
    """An adapter in `folder`, as training leaves it, and the model that it came from."""
    model, checkpoint = adapted(tiny, lora)
    train_a_little(model)
    about = {"base_fingerprint": checkpoint.fingerprint, "task": "caption"}
    export_adapter(model, folder, lora, str(tiny.path), about, write=True)
    model.eval()
    return model


# ------------------------------------------------------------------------------------------------- written here

EXPORTS = {
    "attention": LoraConfig(rank=4, alpha=8, targets=("language_model.q_proj", "language_model.v_proj")),
    "all linears": LoraConfig(rank=3, alpha=5.5, targets=("language_model.*",)),
    "rslora": LoraConfig(rank=8, alpha=8, rslora=True, targets=("language_model.o_proj", "language_model.down_proj")),
    "components": LoraConfig(rank=2, alpha=6, targets=("vision_encoder.*", "projector.*", "language_model.up_proj")),
    "one layer": LoraConfig(rank=2, alpha=4, targets=("vision_encoder.q*",)),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_loads_what_is_exported(each_tiny: Tiny, batch: Batch, tmp_path: Path, name: str) -> None:
    """Equal logits, every tensor taken, none missing, and not a word about them."""
    ours = export(each_tiny, tmp_path / "adapter", EXPORTS[name])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(each_tiny.load(each_tiny.path), str(tmp_path / "adapter"))
    assert not [str(w.message) for w in said if "adapter" in str(w.message) or "keys" in str(w.message)]
    result = model.load_adapter(str(tmp_path / "adapter"), "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key and "again" in key]
    taken = [n for n, _ in model.named_parameters() if "lora_" in n and ".default." in n]
    assert sorted(n.replace(".default.", ".") for n in taken) == sorted(stored)
    found = their_logits(model, batch, each_tiny)
    assert difference(found, logits_of(ours, batch)) <= 1e-4
    assert difference(found, their_logits(each_tiny.theirs, batch, each_tiny)) > 0.05


def test_head_of_its_own(each_untied: Tiny, batch: Batch, tmp_path: Path) -> None:
    """lm_head is adapted where it is named."""
    lora = LoraConfig(rank=2, alpha=4, targets=("language_model.lm_head", "language_model.q_proj"))
    ours = export(each_untied, tmp_path / "adapter", lora)
    model = PeftModel.from_pretrained(each_untied.load(each_untied.path), str(tmp_path / "adapter"))
    found = their_logits(model, batch, each_untied)
    assert difference(found, logits_of(ours, batch)) <= 1e-4
    _, gradients = loss_and_gradients(ours, batch)
    assert len(gradients) == 2 * 4 and all(bool(g.abs().max() > 0) for g in gradients.values())
    merge(str(each_untied.path), tmp_path / "adapter", tmp_path / "merged")
    assert difference(their_logits(each_untied.load(tmp_path / "merged"), batch, each_untied), found) <= 1e-4


def test_initial_adapter_is_the_base(each_tiny: Tiny, batch: Batch) -> None:
    """Equal to the last bit; A is uniform in +-1/sqrt(in) and the same whatever the order of the targets."""
    targets = ("language_model.*", "vision_encoder.q*")
    first, _ = adapted(each_tiny, LoraConfig(rank=4, targets=targets))
    assert torch.equal(logits_of(first, batch), logits_of(each_tiny.ours(), batch))
    second, _ = adapted(each_tiny, LoraConfig(rank=4, targets=targets[::-1]))
    other, _ = adapted(each_tiny, LoraConfig(rank=4, targets=targets), seed=1)
    matrices = {name: p for name, p in first.named_parameters() if name.endswith("lora_A.weight")}
    assert len(matrices) == 3 * 7 + len(list(first.vision.blocks))
    for name, a in matrices.items():
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < float(a.detach().abs().max()) <= bound
        assert torch.equal(a, second.get_parameter(name))
        assert not torch.equal(a, other.get_parameter(name))
    assert len({tuple(a.flatten()[:4].tolist()) for a in matrices.values()}) == len(matrices)


def test_dropout_is_off_when_the_model_answers(each_tiny: Tiny, batch: Batch) -> None:
    model, _ = adapted(each_tiny, LoraConfig(rank=4, dropout=0.5))
    train_a_little(model)
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
    "expression": {"r": 2, "lora_alpha": 3, "target_modules": r".*language_model\.layers\.\d+\.mlp\.(up|gate)_proj"},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj", "o_proj"]},
    "components": {"r": 4, "lora_alpha": 4, "target_modules": PARTS_OF_TOWERS},
    "all linears": {"r": 2, "lora_alpha": 1, "target_modules": "all-linear"},
    "one layer": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}


def peft_adapter(tiny: Tiny, folder: Path, config: dict[str, Any]) -> PeftModel:
    torch.manual_seed(0)
    model = tiny.load(tiny.path)
    exclude = r".*patch_embed.*"  # a convolution, which PEFT adapts otherwise
    settings = PeftConfig(**config, init_lora_weights=False, exclude_modules=exclude, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, settings).eval()
    peft_model.save_pretrained(folder)
    return peft_model


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_adapters_of_peft(each_tiny: Tiny, batch: Batch, tmp_path: Path, name: str) -> None:
    """Loaded here, and merged by tools/merge_lora.py, they give PEFT's logits."""
    theirs = peft_adapter(each_tiny, tmp_path / "adapter", PEFT_CONFIGS[name])
    wanted = their_logits(theirs, batch, each_tiny)
    assert difference(wanted, their_logits(each_tiny.theirs, batch, each_tiny)) > 0.05
    loaded = load_model(str(each_tiny.path), tmp_path / "adapter", torch.float32, CPU)
    assert difference(logits_of(loaded.model, batch), wanted) <= 1e-4
    adapters = [m for m in loaded.model.modules() if isinstance(m, LoRALinear)]
    pairs = [n for n, _ in theirs.named_parameters() if n.endswith("lora_A.default.weight")]
    assert len(adapters) == len(pairs) > 0
    assert merge(str(each_tiny.path), tmp_path / "adapter", tmp_path / "merged") == len(pairs)
    assert difference(their_logits(each_tiny.load(tmp_path / "merged"), batch, each_tiny), wanted) <= 1e-4


@pytest.mark.parametrize(
    "change, named",
    [
        ({"use_dora": True}, "lora_magnitude_change"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tiny: Tiny, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """What would be left out in silence otherwise."""
    export(tiny, tmp_path / "adapter", EXPORTS["attention"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=named):
        load_model(str(tiny.path), tmp_path / "adapter", torch.float32, CPU)


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", ["all linears", "components", "rslora"])
def test_merged_folder(each_bf16: Tiny, batch: Batch, tmp_path: Path, name: str) -> None:
    """A base in bfloat16 and several files: PEFT's merge in float32, rounded once; the rest of the folder as it was."""
    export(each_bf16, tmp_path / "adapter", EXPORTS[name])
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
    assert set(after) - set(before) <= {"vft.json", "generation_config.json"} and set(before) <= set(after)
    for file in each_bf16.path.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "merged" / file.name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            for key in old.keys():  # noqa: SIM118
                assert old.get_slice(key).get_shape() == new.get_slice(key).get_shape()
                assert old.get_slice(key).get_dtype() == new.get_slice(key).get_dtype()


def test_merging_never_overwrites(tiny: Tiny, tmp_path: Path) -> None:
    export(tiny, tmp_path / "adapter", EXPORTS["attention"])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="isn't empty"):
        merge(str(tiny.path), tmp_path / "adapter", tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------ another base


def test_adapter_of_another_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """A base of the same shape: only its weights differ."""
    export(tiny, tmp_path / "adapter", EXPORTS["attention"])
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
    export(tiny, tmp_path / "adapter", EXPORTS["attention"])
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


def test_adapter_of_a_training_run_can_be_gone_on_from(each_tiny: Tiny, batch: Batch, tmp_path: Path) -> None:
    """`attach` and `load_into` give back what `export_adapter` wrote, to the last bit."""
    ours = export(each_tiny, tmp_path / "adapter", EXPORTS["all linears"])
    files = Adapter.open(tmp_path / "adapter", ours.spellings)
    again, _ = load_prepared(each_tiny.path, lambda it: attach(it, files))
    files.load_into(again)
    again.eval()
    assert torch.equal(logits_of(again, batch), logits_of(ours, batch))
