"""A tiny random checkpoint of each model family, in the released layout, and transformers' model to compare with.

transformers makes the weights, not this project. A family that stands in FAMILIES has all the tests that take
`each_tiny`, `each_untied` or `each_bf16`: logits, gradients, packing, trunks, generation, adapters, merging.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from vft.common.types import Batch


@dataclass(frozen=True)
class Family:
    """How a family's tiny checkpoint is made, and how transformers' model is asked."""

    save: Callable[..., Path]
    """(folder, tied=True, dtype=float32, max_shard_size="1GB", seed=0): a checkpoint in `folder`."""
    model_class: Any
    """transformers' class."""
    inputs: Callable[[Batch, Any], dict[str, Tensor]]
    """Its arguments for a batch of one document, given the family's VisionProcessor; positions given explicitly."""
    components: dict[str, tuple[str, ...]]
    """Prefixes of what each part of it trains, said apart from the code."""
    closes_answers: bool = True
    """Whether the released template writes the token that ends an answer."""
    linears: int = 3 * 7
    """Linear layers of the decoder."""
    released: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
    """A parameter of transformers' model, given with its name, as the project's model has it."""
    tolerance: float = 1e-4
    """Largest difference of a logit from transformers', in float32."""

    def transformers_model(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' own model of a checkpoint, ready to compare with; it has taken every tensor."""
        model, about = self.model_class.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"], about
        return model.eval()


def randomise(model: nn.Module, placeholders: Sequence[int], seed: int) -> None:
    """Weights far wider than an initialiser's, so that every part moves the logits far more than rounding does."""
    generator = torch.Generator().manual_seed(seed)
    # Most norms of these decoders multiply with one plus their weight.
    adds_one = isinstance(model, (Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_q" in name:
                is_plain = not adds_one or "visual" in name or "linear_attn" in name
                parameter.copy_(is_plain + 0.3 * noise)
            elif name.endswith("A_log"):  # states that last; the norm of small ones would enlarge rounding
                parameter.copy_(0.5 * noise - 2.5)
            elif "embed_tokens" in name or "pos_embed" in name or parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
                parameter.copy_(noise * 1.3 * inputs**-0.5)
            if "embed_tokens" in name or "lm_head" in name:
                # A generated placeholder would make transformers ask for more media.
                parameter[list(placeholders)] = 0


# ------------------------------------------------------------------------------------------------------ Qwen2.5-VL

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The released template without its picture numbers."""


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the released tokenizer's rules and special tokens, and few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["user assistant system You are a helpful assistant.", "What happens in the video?\n\n  A dog runs."] * 2
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48}


def save_qwen(
    model_class: Any,
    text: dict[str, Any],
    vision: dict[str, Any],
    template: str,
    folder: Path,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """A random Qwen with its tokenizer in `folder`, made and written by transformers. `text` and `vision` are what its
    decoder and its encoder have of their own."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = template
    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"]}
    sizes = {"vocab_size": len(tokenizer) + 5, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    config = model_class.config_class(
        text_config={**DECODER, **sizes, **ends, **text},
        vision_config={**ENCODER, "num_heads": 2, "out_hidden_size": 64, **vision},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tied,
        **ends,
    )
    model = model_class(config)
    randomise(model, [ids["image_pad"], ids["video_pad"]], seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def save_qwen2_5_vl(folder: Path, **options: Any) -> Path:
    """A random Qwen2.5-VL."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}
    vision = {"depth": 3, "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    text = {"rope_parameters": rope}
    return save_qwen(Qwen2_5_VLForConditionalGeneration, text, vision, CHAT_TEMPLATE, folder, **options)


def qwen_inputs(batch: Batch, processor: Any) -> dict[str, Tensor]:
    """The model's own names for pixels and grids."""
    inputs = {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.positions_3T[:, None],
        "attention_mask": torch.ones_like(batch.input_ids_T)[None],
    }
    mean, std = (torch.tensor(x).view(1, 3, 1) for x in (processor.mean, processor.std))
    counts = [t * h * w for t, h, w in batch.grids]
    for kind, pixels, grid in (
        ("video", "pixel_values_videos", "video_grid_thw"),
        ("image", "pixel_values", "image_grid_thw"),
    ):
        chosen = [i for i, plan in enumerate(batch.documents[0].media) if plan.ref.kind == kind]
        if chosen:
            raw = torch.cat([batch.pixels_PD.split(counts)[i] for i in chosen]).float().unflatten(1, (3, -1))
            inputs[pixels] = ((raw / 255 - mean) / std).flatten(1)
            inputs[grid] = torch.tensor([batch.grids[i] for i in chosen])
    return inputs


# -------------------------------------------------------------------------------------------------------- Qwen3-VL

QWEN3_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}",
    "",
)
"""The released template says nothing of its own before the first message."""
assert len(QWEN3_TEMPLATE) < len(CHAT_TEMPLATE)


def save_qwen3_vl(
    folder: Path, seed: int = 0, model_class: Any = Qwen3VLForConditionalGeneration, **options: Any
) -> Path:
    """A random Qwen3-VL. `text` among the options: what its decoder has besides."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"head_dim": 16, "rope_parameters": rope, **options.pop("text", {})}
    vision = {"depth": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
    options["seed"] = seed + 1  # 1 would say the same token for ever
    save_qwen(model_class, text, vision, QWEN3_TEMPLATE, folder, **options)
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def save_qwen3_vl_moe(folder: Path, **options: Any) -> Path:
    """A random Qwen3-VL-MoE whose second layer has no experts."""
    text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    text |= options.pop("text", {})
    save_qwen3_vl(folder, model_class=Qwen3VLMoeForConditionalGeneration, text=text, **options)
    for file in folder.glob("*.safetensors"):
        tensors = {name: turned_experts(name, tensor).contiguous() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def turned_experts(name: str, tensor: Tensor) -> Tensor:
    """transformers 5 has the matrices of experts as [out, in], released files as [in, out]."""
    return tensor.mT if ".mlp.experts." in name else tensor


# --------------------------------------------------------------------------------------------------------- Qwen3.5


def save_qwen3_5(
    folder: Path, seed: int = 0, model_class: Any = Qwen3_5ForConditionalGeneration, **options: Any
) -> Path:
    """A random Qwen3.5: two recurrent layers, in which a key head serves two value heads, and one of attention. `text`
    among the options: what its decoder has besides."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    linear = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    }
    text = {"head_dim": 32, "rope_parameters": {**rope, "mrope_interleaved": True}, **linear, **options.pop("text", {})}
    vision = {"depth": 3, "num_position_embeddings": 36}
    save_qwen(model_class, text, vision, QWEN3_TEMPLATE, folder, seed=seed + 1, **options)
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def save_qwen3_5_moe(folder: Path, **options: Any) -> Path:
    """A random Qwen3.5-MoE. transformers saves it expert by expert, but the release is not so."""
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    text = {"num_experts": 4, "num_experts_per_tok": 2, **sizes, **options.pop("text", {})}
    save_qwen3_5(folder, model_class=Qwen3_5MoeForConditionalGeneration, text=text, **options)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for layer in range(text.get("num_hidden_layers", DECODER["num_hidden_layers"])):
        path = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{path}.{n}.{part}_proj.weight") for n in range(text["num_experts"])])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{path}.gate_up_proj": torch.cat([gate, up], dim=1), f"{path}.down_proj": down}
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_torch_state_dict(tensors, folder, max_shard_size=options.get("max_shard_size", "1GB"))
    return folder


# ------------------------------------------------------------------------------------------------- LLaVA-NeXT-Video

VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As released: pictures first, then videos, then text; nothing closes an answer."""
MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}"
    "{% endfor %}"
)
RELEASED_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}
"""transformers' names in memory to those of llava-hf's checkpoints, which it no longer writes itself."""
SIDE, PINPOINTS = 56, [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def llama_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Llama's kind of tokenizer: spaces as characters of words, bytes for what is unknown, <s> before every text."""
    texts = ["USER: What happens in the video? ASSISTANT: A dog runs.", "[INST] Who is there? [/INST] Nobody."] * 2
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")  # no token goes over a space
    trained.train_from_iterator(texts, trainer)
    content = json.loads(trained.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    content["pre_tokenizer"] = None
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    media = ["<video>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in media])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=media,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def save_llava_next_video(
    folder: Path,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    text: dict[str, Any] | None = None,
    template: str = VICUNA_TEMPLATE,
) -> Path:
    """A random LLaVA-NeXT-Video with its tokenizer in `folder`, under the released names."""
    tokenizer = llama_tokenizer(template)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaNextVideoConfig(
        text_config={
            **DECODER,
            "model_type": "llama",
            "vocab_size": len(tokenizer) + 5,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": tied,
            **(text or {}),
        },
        vision_config={
            **ENCODER,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 14,
        },
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
    )
    model = LlavaNextVideoForConditionalGeneration(config)
    randomise(model, [image, video], seed)
    tensors = {}
    for name, parameter in model.to(dtype).named_parameters():  # a tied head is not among them
        prefix = next(prefix for prefix in RELEASED_NAMES if name.startswith(prefix))
        tensors[RELEASED_NAMES[prefix] + name.removeprefix(prefix)] = parameter.detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    config.architectures = ["LlavaNextVideoForConditionalGeneration"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
    preprocessor |= {"image_grid_pinpoints": PINPOINTS}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def save_llava_mistral(folder: Path, **options: Any) -> Path:
    """The same around a Mistral, with grouped queries and linear rotary scaling."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    text = {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "rope_parameters": rope}
    return save_llava_next_video(folder, **options, text=text, template=MISTRAL_TEMPLATE)


def llava_inputs(batch: Batch, processor: Any) -> dict[str, Tensor]:
    """Squares of pixels; all frames of a row as one video, for transformers takes videos of one length only."""
    inputs = {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.positions_3T[:1],
        "attention_mask": torch.ones_like(batch.input_ids_T)[None],
    }
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.mean, processor.std))
    media = [] if not batch.documents else list(batch.documents[0].media)
    counts = [t * h * w for t, h, w in batch.grids]
    squares: dict[str, list[Tensor]] = {"video": [], "image": []}
    sizes = []
    for plan, patches_PD in zip(media, batch.pixels_PD.split(counts) if counts else [], strict=True):
        side = SIDE // 14
        raw = patches_PD.float().view(-1, side, side, 3, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)
        squares[plan.ref.kind].append((raw / 255 - mean) / std)
        if plan.ref.kind == "image":
            sizes.append([plan.info.height, plan.info.width])
    if squares["video"]:
        inputs["pixel_values_videos"] = torch.cat(squares["video"])[None]
    if squares["image"]:
        most = max(map(len, squares["image"]))
        padded = [torch.cat([one, one.new_zeros(most - len(one), 3, SIDE, SIDE)]) for one in squares["image"]]
        inputs["pixel_values"] = torch.stack(padded)
        inputs["image_sizes"] = torch.tensor(sizes)
    return inputs


QWEN2_5_VL = Family(
    save_qwen2_5_vl,
    Qwen2_5_VLForConditionalGeneration,
    qwen_inputs,
    {
        "language_model": ("model.",),
        "projector": ("visual.merger.",),
        "vision_encoder": ("visual.patch_embed.", "visual.blocks."),
    },
)
LLAVA = {
    "model_class": LlavaNextVideoForConditionalGeneration,
    "inputs": llava_inputs,
    "components": {
        "language_model": ("language_model.",),
        "projector": ("multi_modal_projector.", "image_newline"),
        # Features are read before the last of three layers.
        "vision_encoder": tuple(
            f"vision_tower.vision_model.{part}."
            for part in ("embeddings", "pre_layrnorm", "encoder.layers.0", "encoder.layers.1")
        ),
    },
}
QWEN3_VL = Family(
    save_qwen3_vl,
    Qwen3VLForConditionalGeneration,
    qwen_inputs,
    {
        "language_model": ("model.language_model.",),
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "vision_encoder": ("model.visual.patch_embed.", "model.visual.pos_embed.", "model.visual.blocks."),
    },
)
QWEN3_VL_MOE = replace(
    QWEN3_VL,
    save=save_qwen3_vl_moe,
    model_class=Qwen3VLMoeForConditionalGeneration,
    linears=3 * 4 + 3,  # attention, and the MLP of the layer without experts
    released=turned_experts,
)
QWEN3_5 = Family(
    save_qwen3_5,
    Qwen3_5ForConditionalGeneration,
    qwen_inputs,
    {
        "language_model": ("model.language_model.",),
        "projector": ("model.visual.merger.",),
        "vision_encoder": ("model.visual.patch_embed.", "model.visual.pos_embed.", "model.visual.blocks."),
    },
    tolerance=5e-4,  # a state carries rounding along the whole row: 3e-5 to 2.3e-4, by what the CPU can do
    linears=2 * 8 + 7,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    save=save_qwen3_5_moe,
    model_class=Qwen3_5MoeForConditionalGeneration,
    linears=2 * 8 + 7,  # the gates of the shared experts are taken by their name alone
    released=turned_experts,
)
QWEN3S = (QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE)
FAMILIES = {
    "qwen2_5_vl": QWEN2_5_VL,
    "llava_next_video": Family(save_llava_next_video, **LLAVA, closes_answers=False),
    "llava_next_video_mistral": Family(save_llava_mistral, **LLAVA),
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
}
