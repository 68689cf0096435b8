"""Checkpoints and adapters under every spelling of their tensors' names, and quantised ones, which are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.adapters import exported
from tests.helpers.tiny import CPU, Tiny, load_model
from vft.adapters.peft_format import start_from
from vft.adapters.targets import choose_trainable
from vft.cli.merge_lora import merge
from vft.common.errors import UserError
from vft.config.run import Config, LoraConfig
from vft.models import build
from vft.models.pretrained import SINGLE_FILE, Pretrained

IN_MEMORY_4_52 = {
    "qwen2_5_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "llava_next_video": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
}
"""Released prefixes to those of the models of transformers 4.52 and later, which `state_dict()` has."""
QWEN3_IN_VLLM = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
}
IN_VLLM = {
    "qwen2_5_vl": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "qwen3_vl": QWEN3_IN_VLLM,
    "qwen3_vl_moe": QWEN3_IN_VLLM,
    "qwen3_5": QWEN3_IN_VLLM,
    "qwen3_5_moe": QWEN3_IN_VLLM,
    "llava_next_video": {"vision_tower.vision_model.": "vision_tower."},
}
"""To those of vLLM's modules (`hf_to_vllm_mapper` of each model's file), and of LLaVA's encoder in transformers 5."""
LLAVA_ORIGINAL = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
}
"""Of haotian-liu/LLaVA's own code."""
SPELLINGS = {
    "transformers 4.52": IN_MEMORY_4_52,
    "vLLM": IN_VLLM,
    "compiled": {name: {"": "_orig_mod."} for name in IN_VLLM},
    "LLaVA": {"llava_next_video": LLAVA_ORIGINAL},
}


ATTENTION = LoraConfig(rank=4, alpha=8, targets=("language_model.q_proj", "language_model.o_proj"))


def respelled(name: str, prefixes: dict[str, str]) -> str:
    """The first prefix that fits is replaced."""
    old = next((one for one in prefixes if name.startswith(one)), None)
    return name if old is None else prefixes[old] + name.removeprefix(old)


def rewrite(folder: Path, change: Callable[[str], str]) -> None:
    """Other names in all files of a checkpoint."""
    for file in folder.glob("*.safetensors"):
        save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {change(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def adapter_of(tiny: Tiny, folder: Path) -> Path:
    """An adapter on attention, as another program leaves it: without a record of its base."""
    exported(tiny, folder, ATTENTION)
    (folder / "vft.json").unlink()
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_checkpoint(each_untied: Tiny, family: str, tmp_path: Path, spelling: str) -> None:
    """Weights arrive unchanged; a merge changes the same values and keeps the names that it found."""
    prefixes = SPELLINGS[spelling].get(family.removesuffix("_mistral"))
    if prefixes is None:
        pytest.skip("another family's")
    base = shutil.copytree(each_untied.path, tmp_path / "base")
    rewrite(base, lambda name: respelled(name, prefixes))
    wanted, found = each_untied.ours(), load_model(str(base), None, torch.float32, CPU).model
    for (name, one), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    adapter = adapter_of(each_untied, tmp_path / "adapter")
    merge(str(each_untied.path), adapter, tmp_path / "plain")
    merge(str(base), adapter, tmp_path / "merged")
    plain, merged, before = (all_tensors(folder) for folder in (tmp_path / "plain", tmp_path / "merged", base))
    assert {respelled(name, prefixes) for name in plain} == set(merged) == set(before)
    for name, tensor in plain.items():
        assert torch.equal(tensor, merged[respelled(name, prefixes)]), name
    assert any(not torch.equal(merged[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"])
def test_tables_of_angles_are_passed_over(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Of older transformers; they follow from the configuration."""
    base = shutil.copytree(tiny.path, tmp_path / "base")
    save_file({**load_file(base / SINGLE_FILE), name: torch.ones(4)}, base / SINGLE_FILE, metadata={"format": "pt"})
    model = load_model(str(base), None, torch.float32, CPU).model
    assert all(map(torch.equal, model.parameters(), tiny.ours().parameters()))


def test_a_tied_head_of_its_own_weights_is_refused(each_tiny: Tiny, family: str, tmp_path: Path) -> None:
    """transformers takes the head that was saved; a copy of the embedding is none, and what the line says helps."""
    base = shutil.copytree(each_tiny.path, tmp_path / "base")
    tensors = load_file(base / SINGLE_FILE)
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    head = "language_model.lm_head.weight" if family.startswith("llava") else "lm_head.weight"
    save_file({**tensors, head: embedding.clone()}, base / SINGLE_FILE, metadata={"format": "pt"})
    load_model(str(base), None, torch.float32, CPU)
    other = embedding.clone()
    other[-1, -1] += 1
    save_file({**tensors, head: other}, base / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight and .*embed_tokens\.weight differ.*tie_word_embeddings"):
        load_model(str(base), None, torch.float32, CPU)
    assert torch.equal(Tiny(base, each_tiny.family).theirs.get_output_embeddings().weight, other)
    config = json.loads((base / "config.json").read_text())
    for table in (config, config["text_config"]):
        table["tie_word_embeddings"] = False
    (base / "config.json").write_text(json.dumps(config))
    found = dict(load_model(str(base), None, torch.float32, CPU).model.named_parameters())
    assert torch.equal(next(tensor for name, tensor in found.items() if name.endswith("lm_head.weight")), other)


def test_two_spellings_of_one_part_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    base = shutil.copytree(tiny.path, tmp_path / "mixed")
    rewrite(base, lambda name: name.replace("model.layers.1.", "model.language_model.layers.1."))
    with pytest.raises(UserError, match=r"model\.embed_tokens.*model\.language_model\.layers\.1.*two spellings"):
        load_model(str(base), None, torch.float32, CPU)
    twice = shutil.copytree(tiny.path, tmp_path / "twice")
    (file,) = twice.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"_orig_mod.model.norm.weight": tensors["model.norm.weight"] + 1}, file)
    with pytest.raises(UserError, match=r"are the same tensor"):
        load_model(str(twice), None, torch.float32, CPU)


ADAPTER_NAMES: dict[str, Callable[[str], str]] = {
    "trained on the text model": lambda name: name.replace("model.language_model.layers", "model.layers"),
    "its body alone": lambda name: name.replace("model.model.language_model.layers", "model.layers"),
    "vLLM's": lambda name: name.replace("model.language_model.layers", "language_model.model.layers"),
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "a plain state_dict": lambda name: name.replace("_A.weight", "_A.default.weight").replace("_B.w", "_B.default.w"),
}


@pytest.mark.parametrize("kind", ADAPTER_NAMES)
def test_every_spelling_of_an_adapter(each_tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Merged, each gives what the plain one gives; a name that fits no layer is refused."""
    adapter = adapter_of(each_tiny, tmp_path / "adapter")
    merge(str(each_tiny.path), adapter, tmp_path / "plain")
    file = adapter / "adapter_model.safetensors"
    save_file({ADAPTER_NAMES[kind](name): tensor for name, tensor in load_file(file).items()}, file)
    merge(str(each_tiny.path), adapter, tmp_path / "merged")
    plain, merged = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "merged")
    assert plain.keys() == merged.keys() and all(torch.equal(plain[name], merged[name]) for name in plain)
    save_file({name.replace("layers", "blocks"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match="no such layer"):
        merge(str(each_tiny.path), adapter, tmp_path / "other")


QUANTISED = {
    "GPTQ, 4 bits": {"quant_method": "gptq", "bits": 4},
    "AWQ, 4 bits": {"quant_method": "awq", "bits": 4},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "FP8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "HQQ": {"quant_method": "hqq"},
}


QUANTISED_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".weight.quant_state.bitsandbytes__nf4": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
}


@pytest.mark.parametrize("told_by", [*QUANTISED, *QUANTISED_TENSORS])
def test_quantised_checkpoints(tiny: Tiny, tmp_path: Path, told_by: str) -> None:
    """By config.json, or by the name of a tensor."""
    base = shutil.copytree(tiny.path, tmp_path / "base")
    if told_by in QUANTISED:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED[told_by]}))
        wanted = f"{told_by}.*name the model.*nf4"
    else:
        name = f"model.layers.0.self_attn.q_proj{told_by}"
        save_file(load_file(base / SINGLE_FILE) | {name: torch.ones(1)}, base / SINGLE_FILE)
        wanted = f"{QUANTISED_TENSORS[told_by]}; tensor {name}\\)"
    with pytest.raises(UserError, match=f"quantised checkpoint \\({wanted}"):
        Pretrained.open(str(base))


def test_quantised_checkpoints_by_their_own_files_and_types(tiny: Tiny, tmp_path: Path) -> None:
    """Where neither config.json nor a name says it: loading and merging look at the types."""
    base = shutil.copytree(tiny.path, tmp_path / "base")
    (base / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(UserError, match=r"quantised checkpoint \(NVFP4"):
        Pretrained.open(str(base))
    (base / "hf_quant_config.json").unlink()
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    adapter = adapter_of(tiny, tmp_path / "adapter")
    for use in (
        lambda: load_model(str(base), None, torch.float32, CPU),
        lambda: merge(str(base), adapter, tmp_path / "merged"),
    ):
        with pytest.raises(UserError, match=rf"quantised checkpoint \(FP8; tensor {name}"):
            use()
    assert not (tmp_path / "merged").exists()


def test_the_chat_template_is_the_processors(tiny: Tiny, tmp_path: Path) -> None:
    """In the order of transformers' `ProcessorMixin.get_processor_dict`, the tokenizer's own last."""
    base = shutil.copytree(tiny.path, tmp_path / "base")
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        (base / name).unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "of the tokenizer"}))
    for file, text, content in (
        ("tokenizer_config.json", "of the tokenizer", None),
        ("chat_template.jinja", "of its own file", "of its own file"),
        ("chat_template.json", "of the legacy file", json.dumps({"chat_template": "of the legacy file"})),
        ("processor_config.json", "of the processor", json.dumps({"chat_template": "of the processor"})),
    ):
        if content is not None:
            (base / file).write_text(content)
        assert Pretrained.open(str(base)).tokenizer.chat_template == text


# --------------------------------------------------------------------------------------------------- merged twice


@pytest.mark.parametrize("told_by", ["its record", "its weights"])
def test_an_adapter_is_not_merged_twice(each_bf16: Tiny, tmp_path: Path, told_by: str) -> None:
    """Into what it was merged into, nor put on it to answer; into another model it is."""
    adapter = adapter_of(each_bf16, tmp_path / "adapter")
    merge(str(each_bf16.path), adapter, tmp_path / "merged")
    if told_by == "its weights":
        (tmp_path / "merged" / "vft.json").unlink()
    for use in (
        lambda: merge(str(tmp_path / "merged"), adapter, tmp_path / "twice"),
        lambda: load_model(str(tmp_path / "merged"), adapter, torch.float32, CPU),
    ):
        with pytest.raises(UserError, match=r"is merged into .*merged' already"):
            use()
    assert not (tmp_path / "twice").exists()
    there = Pretrained.open(str(tmp_path / "merged"))
    model = build(there, torch.bfloat16)
    choose_trainable(model, ATTENTION, ())
    table = {"output_dir": "runs", "model": {"path": there.path, "adapter": str(adapter)}, "lora": {}}
    config = Config.model_validate(table)
    with pytest.raises(UserError, match=r"is merged into .*merged' already"):  # training that goes on from it
        start_from(model, config, there)
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    merge(str(tmp_path / "merged"), other, tmp_path / "both")
    if told_by == "its record":
        known = json.loads((tmp_path / "both" / "vft.json").read_text())["merged"]
        assert [one["adapter"] for one in known] == [str(adapter), str(other)]
        with pytest.raises(UserError, match=r"is merged into .*both' already"):
            merge(str(tmp_path / "both"), adapter, tmp_path / "twice")
