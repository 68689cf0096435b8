"""The model, its loading, its generation and its preprocessing beside transformers' own, on the same checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pictures

from tests.helpers import (
    CPU,
    LIMITS,
    Media,
    Tiny,
    assert_same_gradients,
    batch_of,
    every_logit,
    inputs_for_transformers,
    loss_and_gradients,
    medium,
    save_checkpoint,
    talk,
)
from vft.answer import load_model
from vft.data import vision
from vft.data.packing import collate
from vft.models import media as rules
from vft.models.generate import Sampling, generate
from vft.models.qwen2_5_vl import PEFT_PREFIXES
from vft.types import Batch, Clip, Conversation, UserError

VIDEO, VIDEO_INFO = medium("video", 6, 170, 150, fps=1.0)
"""Its time positions (2 seconds a patch) reach past its height and width; 6 x 5 merged tokens are 4 windows."""
SHORT, SHORT_INFO = medium("video", 5, 90, 200, fps=10.0, name="short")
PICTURE, PICTURE_INFO = medium("image", 1, 200, 130, name="picture")

ROWS: dict[str, tuple[Conversation, list[Any]]] = {
    "text": (
        talk(("user", "Hello, what is 12 + 30?"), ("assistant", "42."), ("user", "And?"), ("assistant", "No.")),
        [],
    ),
    "picture": (
        talk(("user", ["Look: ", PICTURE, "What is it?"]), ("assistant", "A cat on a mat.")),
        [(PICTURE, PICTURE_INFO)],
    ),
    "video": (talk(("user", [VIDEO, "What happens?"]), ("assistant", "A dog runs.")), [(VIDEO, VIDEO_INFO)]),
    "mixed": (
        talk(
            ("system", "Answer briefly."),
            ("user", ["First ", PICTURE, " then ", VIDEO]),
            ("assistant", "Seen."),
            ("user", [SHORT, "And now?"]),
            ("assistant", "The dog sleeps."),
        ),
        [(PICTURE, PICTURE_INFO), (VIDEO, VIDEO_INFO), (SHORT, SHORT_INFO)],
    ),
}


def row(tiny: Tiny, name: str) -> Batch:
    conversation, media = ROWS[name]
    return batch_of(tiny.encoder, ([conversation], Media.make(tiny.encoder.spec, media)))


@pytest.fixture(params=["tiny", "tiny_untied"])
def checkpoint(request: pytest.FixtureRequest) -> Tiny:
    """A tied head in one file, and a head of its own in several files."""
    return request.getfixturevalue(request.param)


# -------------------------------------------------------------------------------------------------- logits, gradients


@pytest.mark.parametrize("name", ROWS)
def test_logits(checkpoint: Tiny, name: str) -> None:
    batch = row(checkpoint, name)
    with torch.no_grad():
        wanted = checkpoint.theirs(**inputs_for_transformers(batch, checkpoint.encoder.spec)).logits[0]
        found = every_logit(checkpoint.ours(), batch)
    assert float(wanted.std()) > 0.5  # else the next line would say little
    assert float((found - wanted).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ["text", "mixed"])
def test_gradients(checkpoint: Tiny, name: str) -> None:
    batch = row(checkpoint, name)
    theirs = checkpoint.theirs
    theirs.zero_grad()
    logits = theirs(**inputs_for_transformers(batch, checkpoint.encoder.spec)).logits[0]
    wanted_loss = F.cross_entropy(logits[:-1], batch.labels_T[1:], reduction="sum", ignore_index=-100)
    wanted_loss.backward()
    wanted = {}
    for name, parameter in theirs.named_parameters():
        ours = next(own + name.removeprefix(prefix) for own, prefix in PEFT_PREFIXES.items() if name.startswith(prefix))
        # transformers leaves the tower of a text without gradients; here they are there, and zero.
        wanted[ours] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    loss, found = loss_and_gradients(checkpoint.ours(), batch)
    assert float(loss) == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
    assert_same_gradients(found, wanted, tolerance=1e-4)


def test_weights_in_bfloat16_load_as_they_are(tiny_bf16: Tiny) -> None:
    """bf16 files in a float32 model give the float32 logits of the rounded weights."""
    batch = row(tiny_bf16, "mixed")
    with torch.no_grad():
        wanted = tiny_bf16.theirs(**inputs_for_transformers(batch, tiny_bf16.encoder.spec)).logits[0]
        found = every_logit(tiny_bf16.ours(), batch)
    assert float((found - wanted).abs().max()) <= 1e-4


def test_computing_in_bfloat16(tiny_bf16: Tiny) -> None:
    """bf16 compute is as far from float32 as transformers' own, not further."""
    batch = row(tiny_bf16, "mixed")
    inputs = inputs_for_transformers(batch, tiny_bf16.encoder.spec)
    ours = load_model(str(tiny_bf16.path), None, torch.bfloat16, CPU).skeleton.model
    theirs = type(tiny_bf16.theirs).from_pretrained(tiny_bf16.path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact = tiny_bf16.theirs(**inputs).logits[0]
        found, wanted = every_logit(ours, batch), theirs(**inputs).logits[0].float()
    assert float((found - exact).square().mean().sqrt()) <= 1.5 * float((wanted - exact).square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------- checkpoints


def edited(tiny: Tiny, folder: Path, change: Any) -> str:
    """A copy of a checkpoint with `change` applied to the tensors of its only file."""
    save_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "fault, expected",
    [
        ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("unexpected", "visual.blocks.0.attn.extra.weight"),
        ("shape", "visual.merger.mlp.0.bias"),
    ],
)
def test_checkpoint_that_does_not_fit(tiny: Tiny, tmp_path: Path, fault: str, expected: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if fault == "missing":
            del tensors[expected]
        elif fault == "unexpected":
            tensors[expected] = torch.zeros(3)
        else:
            tensors[expected] = torch.zeros(tensors[expected].numel() + 1)

    path = edited(tiny, tmp_path / "base", change)
    with pytest.raises(UserError, match=expected.replace(".", r"\.")) as caught:
        load_model(path, None, torch.float32, CPU)
    assert "\n" not in str(caught.value)
    if fault == "shape":
        assert "129" in str(caught.value) and "128" in str(caught.value)


def test_tied_head_that_was_saved_all_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Some tools write lm_head.weight beside a tied embedding; as in transformers, the embedding rules."""
    path = edited(tiny, tmp_path / "base", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7)}))
    load_model(path, None, torch.float32, CPU)


def test_untied_head_is_required(tiny_untied: Tiny, tmp_path: Path) -> None:
    """A head that is missing is never replaced by the embedding or by noise."""
    folder = save_checkpoint(tmp_path / "base", tied=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_model(str(folder), None, torch.float32, CPU)


def test_missing_weight_file(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "base", max_shard_size="100KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        load_model(str(folder), None, torch.float32, CPU)


# -------------------------------------------------------------------------------------------------------- generation

STEPS = 12


def prompt(tiny: Tiny, name: str) -> Batch:
    """The row of that name without its last answer."""
    conversation, media = ROWS[name]
    asked = Conversation(conversation.id, conversation.turns[:-1], conversation.origin)
    made = Media.make(tiny.encoder.spec, media)
    document = tiny.encoder.document([tiny.encoder.encode(asked, answer_next=True)], made.plans, [asked.id])
    return collate([(document, made.patches)], tiny.encoder.spec)


def greedy_by_recomputing(tiny: Tiny, batch: Batch) -> list[int]:
    """transformers' likeliest tokens, the whole row computed anew for each: no cache, positions counted on by 1."""
    inputs = inputs_for_transformers(batch, tiny.encoder.spec)
    found: list[int] = []
    for _ in range(STEPS):
        with torch.no_grad():
            token = tiny.theirs(**inputs, use_cache=False).logits[0, -1].argmax().view(1, 1)
        found.append(int(token))
        position = inputs["position_ids"].max() + 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], position.expand(3, 1, 1)], dim=2)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return found


@pytest.fixture(scope="module")
def answers(tiny_untied: Tiny) -> dict[str, list[int]]:
    found = {name: greedy_by_recomputing(tiny_untied, prompt(tiny_untied, name)) for name in ROWS}
    assert all(len(set(tokens)) > 4 for tokens in found.values()), "answers that repeat one token prove little"
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_generation_alone(tiny_untied: Tiny, answers: dict[str, list[int]], name: str) -> None:
    assert generate(tiny_untied.ours(), prompt(tiny_untied, name), (), Sampling(STEPS)) == [answers[name]]


class Recorder:
    """A model that keeps the logits of each pass."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.logits: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.logits.append(self.model(*args, **kwargs))
        return self.logits[-1]


def test_logits_with_a_cache(tiny_untied: Tiny) -> None:
    """Each pass over the newest token of a short and a long prompt: the logits of transformers over the whole row."""
    batches = [prompt(tiny_untied, name) for name in ("text", "video")]
    patches = [Media.make(tiny_untied.encoder.spec, ROWS[name][1]).patches for name in ("text", "video")]
    documents = [batch.documents[0] for batch in batches]
    model = Recorder(tiny_untied.ours())
    packed = collate(list(zip(documents, patches, strict=True)), tiny_untied.encoder.spec)
    answers = generate(model, packed, (), Sampling(STEPS))
    for number, (batch, answer) in enumerate(zip(batches, answers, strict=True)):
        inputs = inputs_for_transformers(batch, tiny_untied.encoder.spec)
        new = torch.arange(1, STEPS) + inputs["position_ids"].max()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], dim=1)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], new.expand(3, 1, -1)], dim=2)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            wanted = tiny_untied.theirs(**inputs).logits[0, -STEPS:]
        assert float((torch.stack([step[number] for step in model.logits]) - wanted).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ["text", "picture"])
def test_generation_is_that_of_transformers(tiny_untied: Tiny, name: str) -> None:
    """Its `generate` numbers text after long videos otherwise; where no video is, both rules agree."""
    batch = prompt(tiny_untied, name)
    inputs = inputs_for_transformers(batch, tiny_untied.encoder.spec)
    del inputs["position_ids"]
    kinds = batch.documents[0].media_mask_T.long()[None]
    options = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        whole = tiny_untied.theirs.generate(**inputs, mm_token_type_ids=kinds, **options)
    wanted = whole[0, batch.num_tokens :].tolist()
    assert generate(tiny_untied.ours(), batch, (), Sampling(STEPS)) == [wanted]


def test_generation_of_several_prompts(tiny_untied: Tiny, answers: dict[str, list[int]]) -> None:
    """Prompts of different length and media in one row: each as alone, one of them ended early by a stop token."""
    batches = [prompt(tiny_untied, name) for name in ROWS]
    members = []
    for name, batch in zip(ROWS, batches, strict=True):
        members.append((batch.documents[0], Media.make(tiny_untied.encoder.spec, ROWS[name][1]).patches))
    stop = answers["video"][6]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in answers.values()]
    assert len(expected[2]) <= 6 and max(map(len, expected)) == STEPS
    found = generate(tiny_untied.ours(), collate(members, tiny_untied.encoder.spec), (stop,), Sampling(STEPS))
    assert found == expected


def test_generation_of_nothing(tiny_untied: Tiny) -> None:
    """A process without a prompt takes part, and has no answers."""
    assert generate(tiny_untied.ours(), collate([], tiny_untied.encoder.spec), (), Sampling(2)) == []


def test_sampling(tiny_untied: Tiny) -> None:
    """A nucleus of nearly nothing is the likeliest token; a seed gives the same draw again, another seed another."""
    model, batch = tiny_untied.ours(), prompt(tiny_untied, "text")
    greedy = generate(model, batch, (), Sampling(STEPS))
    assert generate(model, batch, (), Sampling(STEPS, temperature=1.0, top_p=1e-6, seed=3)) == greedy
    drawn = [generate(model, batch, (), Sampling(STEPS, temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


# ----------------------------------------------------------------------------------------------------- preprocessing


def test_smart_resize() -> None:
    sizes = [28, 29, 41, 42, 43, 56, 70, 98, 111, 240, 333, 360, 480, 1080, 1920, 4096]
    budgets = [(28 * 28, 28 * 28), (3136, 7448), (3136, 12845056), (4 * 784, 1280 * 784), (100_352, 602_112)]
    for height in sizes:
        for width in sizes:
            for low, high in budgets:
                wanted = pictures.smart_resize(height, width, 28, low, high)
                assert rules.smart_resize(height, width, 28, low, high) == wanted, (height, width, low, high)


def test_narrow_pictures_are_refused() -> None:
    with pytest.raises(ValueError):
        pictures.smart_resize(28, 28 * 201, 28)
    with pytest.raises(UserError, match="5628 x 28"):
        rules.smart_resize(28, 28 * 201, 28, 3136, 1 << 30)


def normalised(tiny: Tiny, pixels_PD: Tensor) -> Tensor:
    return tiny.ours().normalise(pixels_PD).detach()


def test_patches_of_a_picture(tiny: Tiny) -> None:
    """At a size that needs no resizing (PIL's bicubic differs by a level here and there): order and normalising."""
    spec = tiny.encoder.spec
    ref, info = medium("image", 1, 84, 140)
    made = Media.make(spec, [(ref, info)])
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, 3, 84, 140), dtype=torch.uint8, generator=generator)
    processor = pictures.Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=1 << 20)
    wanted = processor(images=[Image.fromarray(frames[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    assert tuple(wanted["image_grid_thw"][0].tolist()) == made.plans[0].grid_thw
    found = normalised(tiny, vision.patchify(Clip(frames, (0.0,)), made.plans[0], spec).pixels_PD)
    assert float((found - wanted["pixel_values"]).abs().max()) <= 1e-5


@pytest.fixture(scope="module")
def video_processor() -> Any:
    """transformers' video processor."""
    pytest.importorskip("torchvision", reason="transformers' video processor needs torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor


@pytest.mark.parametrize("frames, height, width", [(4, 84, 140), (5, 170, 150), (2, 61, 233), (3, 28, 28)])
def test_patches_of_a_video(tiny: Tiny, video_processor: Any, frames: int, height: int, width: int) -> None:
    """Random frames: resizing, the last frame of an odd count, order and normalising."""
    spec = tiny.encoder.spec
    made = Media.make(spec, [medium("video", frames, height, width)])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)
    processor = video_processor(size={"shortest_edge": 784, "longest_edge": 1 << 30}, do_sample_frames=False)
    wanted = processor(videos=[pixels], return_tensors="pt")
    assert tuple(wanted["video_grid_thw"][0].tolist()) == made.plans[0].grid_thw
    found = normalised(tiny, vision.patchify(Clip(pixels, (0.0,) * frames), made.plans[0], spec).pixels_PD)
    assert float((found - wanted["pixel_values_videos"]).abs().max()) <= 1e-5


def test_odd_count_repeats_the_last_frame(tiny: Tiny) -> None:
    """By a frame sequence of even length whose last frame stands twice."""
    spec = tiny.encoder.spec
    odd = Media.make(spec, [medium("video", 5, 100, 90)])
    even = Media.make(spec, [medium("video", 6, 100, 90)])
    pixels = torch.randint(0, 256, (5, 3, 100, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    twice = torch.cat([pixels, pixels[-1:]])
    found = vision.patchify(Clip(pixels, (0.0,) * 5), odd.plans[0], spec).pixels_PD
    assert torch.equal(found, vision.patchify(Clip(twice, (0.0,) * 6), even.plans[0], spec).pixels_PD)


def test_one_frame_fills_its_patch(tiny: Tiny) -> None:
    spec = tiny.encoder.spec
    made = Media.make(spec, [medium("video", 1, 56, 56)])
    pixels = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    patches = vision.patchify(Clip(pixels, (0.0,)), made.plans[0], spec)
    features = patches.pixels_PD.unflatten(1, (3, 2, 14, 14))
    assert patches.grid_thw == (1, 4, 4)
    assert torch.equal(features[:, :, 0], features[:, :, 1])


# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ROWS)
def test_tokens_are_those_of_the_chat_template(tiny: Tiny, name: str) -> None:
    conversation = ROWS[name][0]
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        parts: Sequence[Any] = turn.parts
        content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": x.kind} for x in parts]
        messages.append({"role": turn.role, "content": turn.text if turn.role == "assistant" else content})
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert list(tiny.encoder.encode(conversation).ids) == wanted
    asked = Conversation("x", conversation.turns[:-1], "x")
    wanted = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert list(tiny.encoder.encode(asked, answer_next=True).ids) == wanted["input_ids"]


@pytest.mark.parametrize("name", ["text", "picture"])
def test_positions_where_transformers_agrees(tiny: Tiny, name: str) -> None:
    """Its rule for text after a video differs (the reference cases pin ours); for text and pictures both are one."""
    batch = row(tiny, name)
    kinds = batch.documents[0].media_mask_T.long()[None]
    grids = torch.tensor(batch.grids) if batch.grids else None
    wanted, _ = tiny.theirs.model.get_rope_index(batch.input_ids_T[None], kinds, image_grid_thw=grids)
    assert torch.equal(batch.positions_3T, wanted[:, 0])


def test_positions_of_a_video_by_hand(tiny: Tiny) -> None:
    """3 patches of 2 s at 2 positions a second: 0, 4, 8; text goes on past the largest of all, 8 here, not 6 x 5."""
    batch = row(tiny, "video")
    first = int(batch.media_index_M[0])
    expected = [(first + time, first + y, first + x) for time in (0, 4, 8) for y in range(6) for x in range(5)]
    assert list(map(tuple, batch.positions_3T.T[batch.media_index_M].tolist())) == expected
    after = batch.positions_3T[:, int(batch.media_index_M[-1]) + 1 :]
    assert after.tolist() == [list(range(first + 9, first + 9 + after.shape[1]))] * 3


@pytest.mark.parametrize(
    "available, fps, wanted", [(100, 25.0, 8), (75, 25.0, 6), (70, 25.0, 4), (3, 25.0, 2), (9000, 30.0, 32)]
)
def test_count_of_frames_at_a_rate(available: int, fps: float, wanted: int) -> None:
    """qwen-vl-utils' smart_nframes: rate times duration, between the limits, never more than there are, even."""
    limits = replace(LIMITS, fps=2.0, frames=None, min_frames=4, max_frames=32)
    assert rules.frame_count(available, fps, limits) == wanted
