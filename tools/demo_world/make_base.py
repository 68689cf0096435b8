"""Write the demo's base model before its training: a small tokenizer, configuration and random weights.

    python tools/demo_world/make_base.py OUTPUT_DIR

The folder has the layout of the released Qwen2.5-VL checkpoints (flat configuration, tensor names, chat template,
special tokens), so that every program that reads those reads this one; only the sizes are small. Training it in full
on tags (`recipes/demo/pretrain.toml`) makes it the base that the demo adapts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from words import tokenizer_texts

from vft.models.released import build_from_config

SEED = 0
BPE_TOKENS = 618
"""Size of the byte-level vocabulary: with the special tokens at most 640 rows of the embedding."""
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
PLAIN_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Added tokens that stay when text is decoded without its special tokens, as in the released tokenizer."""
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 128, 4, 4, 4, 384
MROPE_SECTION = [4, 6, 6]
"""Rotary frequencies of time, height and width: half a head's width together."""
VISION_HIDDEN, VISION_DEPTH, VISION_HEADS, VISION_MLP = 64, 4, 2, 192
PATCH, TEMPORAL_PATCH, MERGE, WINDOW_PX = 14, 2, 2, 112
MATRIX_GAIN = 1.0
EMBEDDING_STD = 0.02


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with the released one's rules and special tokens, its merges learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Contents of tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
        for token in SPECIAL_TOKENS + PLAIN_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Contents of config.json: the released keys, text fields at top level."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 128000,
        "max_window_layers": LAYERS,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": VISION_DEPTH,
            "hidden_act": "silu",
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_heads": VISION_HEADS,
            "in_chans": 3,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "window_size": WINDOW_PX,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": TEMPORAL_PATCH,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION},
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,
    }


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """Contents of generation_config.json: the released values."""
    return {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "repetition_penalty": 1.05,
        "temperature": 1e-06,
        "transformers_version": "4.49.0",
    }


PREPROCESSOR_CONFIG = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL_PATCH,
    "merge_size": MERGE,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its released name, the language model's first: the order decides what is drawn for each.
    The head is tied to the embedding and has no tensor."""
    model = build_from_config(config, torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return dict(sorted(shapes.items(), key=lambda item: item[0].startswith("visual.")))


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """bf16 tensors to start training from: ones for norms, zeros for biases, scaled matrices.

    A matrix has the standard deviation MATRIX_GAIN / sqrt(inputs), those that write to the residual stream less by
    sqrt(2 * layers), as in GPT-2. The released 0.02 suits widths of thousands; in a narrow model it gives activations
    near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape) if "norm" in name or "ln_q" in name else torch.zeros(shape)
            continue
        std = EMBEDDING_STD if "embed_tokens" in name else MATRIX_GAIN / math.sqrt(math.prod(shape[1:]))
        if name.endswith(("o_proj.weight", "attn.proj.weight", "down_proj.weight")):
            depth = config["vision_config"]["depth"] if name.startswith("visual.") else config["num_hidden_layers"]
            std /= math.sqrt(2 * depth)
        weights[name] = torch.randn(shape, generator=generator) * std
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def write_base(folder: Path) -> None:
    """Write the whole checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(tokenizer_texts())
    config = model_config(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    contents = {
        "tokenizer_config.json": tokenizer_config(tokenizer),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "config.json": config,
        "generation_config.json": generation_config(config),
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = random_weights(config, SEED)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens, {parameters / 1e6:.2f} M parameters")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the new checkpoint")
    write_base(parser.parse_args().output)


if __name__ == "__main__":
    main()
