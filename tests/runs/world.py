"""A little world to train in: a random Qwen2.5-VL of 2 layers, clips of coloured bars, records about them.

Everything is made here with other programs than those under test: transformers writes the checkpoint, `tokenizers`
learns the vocabulary, torchcodec encodes the clips.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchcodec.encoders import VideoEncoder
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's own, without the numbers of pictures."""

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 230), "yellow": (230, 220, 20)}
PROMPT = "What is moving?"
ANSWERS = {
    "red": "A red bar walks to the right.",
    "green": "Something green is on its way.",
    "blue": "The blue one, slowly.",
    "yellow": "A yellow bar; it looks warm.",
}
TEXTS = {
    "What is two and two?": "Four, as ever.",
    "Name a colour.": "Grey.",
    "Who sees nothing here?": "Whoever has no picture.",
}
EMBEDDING_STD = 0.25
"""Large enough for a frozen, tied head of width 64 to say anything with certainty."""


@dataclass(frozen=True)
class World:
    """What the tests train with."""

    root: Path
    """Data: `videos.json`, `mixed.jsonl` and their media."""
    base: Path
    """A checkpoint."""
    other_base: Path
    """One of the same shape with other weights."""

    def config(self, path: Path, *settings: dict[str, Any]) -> Path:
        """Write a configuration to `path`, with tables of `settings` laid over these."""
        table: dict[str, Any] = {
            "output_dir": str(path.with_suffix("")),
            "model": {"path": str(self.base)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {
                "root": str(self.root),
                "sources": [{"format": "messages", "path": "videos.json"}],
                "pack_tokens": 256,
                "workers": 0,
                "video": {"frames": 4, "max_pixels": 56 * 56},
                "image": {"max_pixels": 56 * 56},
            },
            "train": {"max_steps": 4, "packs_per_step": 2, "learning_rate": 2e-3, "precision": "fp32"},
            "checkpoint": {"every_steps": 0},
        }
        for setting in settings:
            _lay_over(table, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(table))
        return path


FULL_TUNING = {"lora": None, "model": {"train": ["language_model", "vision_tower", "merger"]}}
"""Settings that train every weight instead of adapters."""
MIXED = {
    "data": {"sources": [{"format": "messages", "path": "mixed.jsonl"}], "max_samples_per_pack": 1},
}
"""Settings under which each pack is one sample: of text alone, with pictures, or with a video."""
TOWER_LORA = {"lora": {"targets": ["language_model.*", "vision_tower.*", "merger.*"]}}


def make_world(folder: Path) -> World:
    """Write everything into `folder`."""
    root = folder / "data"
    root.mkdir(parents=True)
    for colour in COLOURS:
        write_clip(root / f"{colour}.mp4", colour)
        Image.new("RGB", (56, 56), COLOURS[colour]).save(root / f"{colour}.png")
    (root / "videos.json").write_text(json.dumps([video_record(colour) for colour in COLOURS]))
    lines = [video_record(colour) for colour in list(COLOURS)[:3]]
    lines += [record(question, answer) for question, answer in TEXTS.items()]
    lines += [
        record("<image>Which colour?", f"It is {colour}.", images=[f"{colour}.png"]) for colour in ("red", "blue")
    ]
    two = record("<image><image>Compare them.", "One is green, the other yellow.", images=["green.png", "yellow.png"])
    (root / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, two]))
    write_base(folder / "base", seed=0)
    write_base(folder / "other_base", seed=1)
    return World(root, folder / "base", folder / "other_base")


def record(question: str, answer: str | None, **media: list[str]) -> dict[str, Any]:
    """A conversation of one question; without an answer where that is None."""
    turns = [{"role": "user", "content": question}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": turns, **media}


def video_record(colour: str) -> dict[str, Any]:
    """The record of one clip; the question is the same for all, so that the answer hangs on the picture alone."""
    return {"id": colour, **record(f"<video>{PROMPT}", ANSWERS[colour], videos=[f"{colour}.mp4"])}


def write_clip(path: Path, colour: str) -> None:
    """12 frames in 3 seconds: a white bar crosses a coloured ground."""
    frames_TCHW = torch.tensor(COLOURS[colour], dtype=torch.uint8)[None, :, None, None].repeat(12, 1, 56, 56)
    for number in range(12):
        frames_TCHW[number, :, :, number * 4 : number * 4 + 8] = 250
    VideoEncoder(frames_TCHW, frame_rate=4).to_file(str(path))


def damage(path: Path) -> None:
    """Overwrite the second half of the frames of an MP4 file: its index stays right, decoding fails."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    half = length // 2
    content[start + half : start + length] = b"\xff" * (length - half)
    path.write_bytes(content)


def write_base(folder: Path, seed: int) -> None:
    """A checkpoint as transformers saves it, in float32 so that small differences survive an export."""
    texts = [PROMPT, *ANSWERS.values(), *TEXTS, *TEXTS.values(), "You are a helpful assistant. system user assistant"]
    tokenizer = _tokenizer(texts)
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                embeds = "embed_tokens" in name
                std = EMBEDDING_STD if embeds else 1 / math.sqrt(math.prod(parameter.shape[1:]))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def _lay_over(table: dict[str, Any], setting: dict[str, Any]) -> None:
    for key, value in setting.items():
        if value is None:
            table.pop(key, None)
        elif isinstance(value, dict) and isinstance(table.get(key), dict):
            _lay_over(table[key], value)
        else:
            table[key] = value
