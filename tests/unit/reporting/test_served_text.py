"""A served model reads the text of its training: transformers' present processor writes the ids that training had."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tests.helpers.adapters import adapted
from tests.helpers.families import CHAT_TEMPLATE, QWEN3_TEMPLATE
from tests.helpers.tiny import CPU, LIMITS, Tiny, load_model, medium, talk
from tests.unit.models.test_qwen3_vl import published_video
from vft.adapters.peft_format import export_adapter, recorded
from vft.cli.merge_lora import merge
from vft.common.types import MediaPlan
from vft.config.run import Config, LoraConfig, dump
from vft.inference.requests import data_config
from vft.models.pretrained import Pretrained
from vft.reporting import serve_command, write_card

FILES = ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]
PAIR = "<|vision_start|><|video_pad|><|vision_end|>"
HIDDEN = QWEN3_TEMPLATE.replace(PAIR, "{{ '<|vision_start|>' }}<|video_pad|><|vision_end|>")
THINKS = QWEN3_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
ASKED = "What happens?"


def base_with(tiny: Tiny, folder: Path, file: str, template: str) -> Tiny:
    """A copy whose template is in `file` alone, in JSON with every character escaped that may be."""
    base = Tiny(shutil.copytree(tiny.path, folder), tiny.family)
    own = json.loads((folder / "tokenizer_config.json").read_text())
    own.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if file.endswith(".jinja"):
        (folder / file).write_text(template)
    else:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        text = json.dumps({**content, "chat_template": template}).replace("<", "\\u003c")
        (folder / file).write_text(text)
    return base


def merged(base: Tiny, folder: Path, about: dict[str, Any]) -> Path:
    lora = LoraConfig(rank=4, alpha=8)
    export_adapter(adapted(base, lora)[0], folder / "adapter", lora, "base", about, True)
    merge(str(base.path), folder / "adapter", folder / "merged")
    return folder / "merged"


def served_ids(folder: Path, template: str | None, video: MediaPlan, options: dict[str, Any]) -> list[int]:
    """What transformers' processor makes of a question about a video; vLLM's makes the same ids. The processor can't be
    constructed without torchvision, so its methods are called on an empty one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = template or Qwen3VLProcessor.get_processor_dict(folder)[0].get("chat_template") or None
    content = [{"type": "video"}, {"type": "text", "text": ASKED}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    (expanded,), _ = processor.get_text_with_replacements([text], videos_replacements=[published_video(video)])
    ids = list(tokenizer(expanded)["input_ids"])
    assert ids == vllm_ids(tokenizer, text, published_video(video))
    return ids


def vllm_ids(tokenizer: Any, text: str, video: str) -> list[int]:
    """The rule of vLLM 0.33 with transformers from 5.10 (`_replace_video_token_placeholders` and `get_video_repl` of
    vllm/model_executor/models/qwen3_vl.py): the pad alone is replaced, and each time is tokenised by itself."""
    parts = re.findall(r"<[0-9.]+ seconds>|<\|[a-z_]+\|>", video)
    expanded = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return [i for token in tokenizer(text)["input_ids"] for i in (expanded if token == pad else [token])]


def trained_ids(folder: Path, about: dict[str, Any], adapter: Path | None = None) -> tuple[list[int], MediaPlan]:
    """The same question in this project, with the settings that the training recorded."""
    encoder = load_model(str(folder), adapter, torch.float32, CPU).encoder(data_config(about, {}))
    ref, info = medium("video", 40, 64, 96, fps=8.0)
    plan = encoder.processor.plan(ref, info, LIMITS)
    return encoder.document([talk(("user", [ref, ASKED]))], [plan], answer_next=True).ids_T.tolist(), plan


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_a_merged_model(make_tiny: Callable[[str, str], Tiny], tmp_path: Path, file: str, keep: bool) -> None:
    """Whichever file has the template. It is that of the release where training kept the pair."""
    base = base_with(make_tiny("qwen3_vl", "tied"), tmp_path / "base", file, QWEN3_TEMPLATE)
    about = {"video": {"frames": 4, "keep_outer_pair": keep}}
    folder = merged(base, tmp_path, about)
    ids, plan = trained_ids(folder, recorded(folder))
    assert trained_ids(base.path, about)[0] == ids
    assert served_ids(folder, None, plan, {}) == ids
    assert (served_ids(base.path, None, plan, {}) == ids) is keep
    assert "#" not in serve_command(folder) and "--chat-template" not in serve_command(folder)
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    kept.pop("chat_template", None)
    assert kept.items() <= json.loads((base.path / "tokenizer_config.json").read_text()).items()


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl_moe", "qwen3_5_moe"])
def test_the_other_families_and_their_options(
    make_tiny: Callable[[str, str], Tiny], tmp_path: Path, family: str
) -> None:
    """Of a template with options the command says which training had."""
    base = base_with(make_tiny(family, "tied"), tmp_path / "base", "chat_template.jinja", THINKS)
    about = {"video": {"frames": 4}, "template_options": {"enable_thinking": True}}
    folder = merged(base, tmp_path, about)
    ids, plan = trained_ids(folder, recorded(folder))
    words = shlex.split(serve_command(folder))
    options = json.loads(words[words.index("--default-chat-template-kwargs") + 1])
    assert options == {"enable_thinking": True}
    assert served_ids(folder, None, plan, options) == ids
    assert AutoTokenizer.from_pretrained(folder).decode(ids).endswith("<think>\n")


def test_a_model_of_unknown_training_stays_as_it_is(make_tiny: Callable[[str, str], Tiny], tmp_path: Path) -> None:
    """An adapter of another program, and a family whose processor adds nothing."""
    base = base_with(make_tiny("qwen3_vl", "tied"), tmp_path / "base", "chat_template.json", QWEN3_TEMPLATE)
    folder = merged(base, tmp_path / "foreign", {})
    assert PAIR in json.loads((folder / "chat_template.json").read_text())["chat_template"]
    base = base_with(make_tiny("qwen2_5_vl", "tied"), tmp_path / "other", "chat_template.json", CHAT_TEMPLATE)
    folder = merged(base, tmp_path / "2_5", {"video": {"frames": 4}})
    assert PAIR in json.loads((folder / "chat_template.json").read_text())["chat_template"]


def card_of(base: Tiny, folder: Path, video: dict[str, Any], lora: bool = True) -> tuple[str, list[str]]:
    """The card of a run in `folder`, and the lines of the command in it."""
    table: dict[str, Any] = {"model": {"path": str(base.path)}, "output_dir": str(folder), "task": "caption"}
    table |= {"lora": {"rank": 4}} if lora else {"model": {**table["model"], "train": ["language_model"]}}
    config = Config.model_validate({**table, "data": {"video": video}})
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(dump(config))
    (folder / "vft.json").write_text(json.dumps({"prompt": "", "system": None, "pack_tokens": 0}))
    write_card(folder, folder, 3, Pretrained.open(str(base.path)))
    card = (folder / "README.md").read_text()
    return card, card.partition("With vLLM:\n\n```\n")[2].partition("\n```")[0].splitlines()


def test_an_adapter_has_the_template_beside_it(make_tiny: Callable[[str, str], Tiny], tmp_path: Path) -> None:
    base = base_with(make_tiny("qwen3_vl", "tied"), tmp_path / "base", "chat_template.json", QWEN3_TEMPLATE)
    card, (command,) = card_of(base, tmp_path / "adapter", {"frames": 4})
    words = shlex.split(command)
    file = Path(words[words.index("--chat-template") + 1])
    assert file.parent == tmp_path / "adapter" and f'processor.chat_template = open("{file}").read()' in card
    ids, plan = trained_ids(base.path, {"video": {"frames": 4}})
    assert served_ids(base.path, file.read_text(), plan, {}) == ids != served_ids(base.path, None, plan, {})
    card, (command,) = card_of(base, tmp_path / "keeping", {"frames": 4, "keep_outer_pair": True})
    assert "--chat-template" not in command and "processor.chat_template" not in card.partition("## Training")[0]
    assert not (tmp_path / "keeping" / "chat_template.jinja").exists()
    card, (command,) = card_of(base, tmp_path / "whole", {"frames": 4}, lora=False)  # its own is corrected
    assert "--chat-template" not in command and "processor.chat_template" not in card


def test_a_pair_that_is_not_found_is_told(make_tiny: Callable[[str, str], Tiny], tmp_path: Path) -> None:
    """One that the template puts together: training is as released, the server's command says what differs."""
    base = base_with(make_tiny("qwen3_vl", "tied"), tmp_path / "base", "chat_template.jinja", HIDDEN)
    assert PAIR not in HIDDEN
    about = {"video": {"frames": 4}}
    folder = merged(base, tmp_path, about)
    ids, plan = trained_ids(folder, about)
    assert len(served_ids(folder, None, plan, {})) == len(ids) + 2
    lines = serve_command(folder).splitlines()
    assert len(lines) == 2 and lines[1].startswith("# ") and "2 tokens a video" in lines[1]
    assert card_of(base, tmp_path / "adapter", {"frames": 4})[1][1] == lines[1]
    assert not (tmp_path / "adapter" / "chat_template.jinja").exists()
