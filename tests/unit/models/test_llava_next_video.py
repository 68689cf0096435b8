"""LLaVA-NeXT-Video's own rules beside transformers' image processors and by hand: frames, crops, tiles, text."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlavaNextVideoConfig
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor

from tests.helpers.adapters import disturb
from tests.helpers.families import PINPOINTS, SIDE
from tests.helpers.patches import patches_of
from tests.helpers.tiny import CPU, Media, Tiny, every_logit, load_model, medium, talk
from tests.parity.test_against_transformers import row
from vft.adapters.lora import initialise
from vft.adapters.peft_format import export_adapter
from vft.adapters.targets import choose_trainable
from vft.cli.merge_lora import merge
from vft.common.errors import UserError
from vft.common.types import MediaPlan, VisionLimits
from vft.config.data import DataConfig, VideoConfig
from vft.config.run import Config, LoraConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import make_dataset
from vft.distributed.process_group import environment
from vft.inference import evaluate as evaluation
from vft.inference.evaluate import evaluation_config
from vft.models.llava_next_video.processor import LlavaProcessor, best_resolution, fitted
from vft.models.pretrained import Pretrained
from vft.recipes import task_of

RELEASED = LlavaNextVideoConfig()
SPEC = LlavaProcessor.from_hf(RELEASED, {})
"""With the released sizes."""


@pytest.fixture(scope="module")
def tiny(make_tiny: Any) -> Tiny:
    """Of this family."""
    return make_tiny("llava_next_video", "tied")


def noise(frames: int, height: int, width: int) -> Tensor:
    """Random frames, smooth enough that resizing is not all there is to see."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    coarse = torch.rand(frames, 3, height // 8 + 2, width // 8 + 2, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.round().to(torch.uint8)


def squares_of(pixels_PD: Tensor, processor: LlavaProcessor) -> Tensor:
    """Patches back to the encoder's squares, [squares, 3, side, side]."""
    grid, patch = processor.grid, processor.patch
    parts = pixels_PD.view(-1, grid, grid, 3, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, processor.side, processor.side)


def levels(normalised: Any, processor: LlavaProcessor) -> Tensor:
    """A processor's output back to 0..255."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.mean, processor.std))
    return (torch.tensor(np.asarray(normalised)) * std + mean) * 255


def assert_same_pixels(found: Tensor, wanted: Tensor) -> None:
    """Up to a level here and there, by which PIL's bicubic differs from torch's."""
    difference = (found.float() - wanted).abs()
    assert float(difference.max()) <= 2.01 and float(difference.mean()) < 0.25


def pil(frame_CHW: Tensor) -> Image.Image:
    return Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())


# ----------------------------------------------------------------------------------------------------------- pictures

SIZES = [(336, 336), (100, 700), (700, 100), (480, 640), (1080, 1920), (333, 335), (1, 50), (671, 673)]
SIZES += [(90, 60), (337, 9)]


def test_resolutions_and_sizes() -> None:
    """The same choice as transformers for every size, and the same size of the picture within it."""
    for height in range(20, 1500, 149):
        for width in range(20, 1500, 131):
            wanted = select_best_resolution((height, width), RELEASED.image_grid_pinpoints)
            assert best_resolution(height, width, SPEC.resolutions) == tuple(wanted)
            blank = np.zeros((3, height, width), dtype=np.uint8)
            assert fitted(height, width, wanted) == get_patch_output_size(blank, wanted, "channels_first")


def picture(height: int, width: int, processor: LlavaProcessor = SPEC, max_pixels: int = 1 << 30) -> MediaPlan:
    ref, info = medium("image", 1, height, width)
    return processor.plan(ref, info, VisionLimits(None, None, 1, 1, 1, max_pixels, None))


def test_tokens_of_pictures() -> None:
    """transformers' count, padding left out and a line break for each line."""
    theirs: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=RELEASED.image_grid_pinpoints),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    theirs._get_unpadded_features = LlavaNextVideoProcessor._get_unpadded_features.__get__(theirs)
    for height, width in [*SIZES, *((h, w) for h in range(30, 1300, 97) for w in range(30, 1300, 89))]:
        wanted = LlavaNextVideoProcessor._get_number_of_features(theirs, height, width, 336, 336) - 1
        plan = picture(height, width)
        assert plan.num_tokens == wanted, (height, width)
        assert SPEC.layout([plan]).tokens_M.numel() == wanted


@pytest.mark.parametrize("height, width", [(112, 56), (90, 200), (201, 77), (56, 56), (300, 310), (40, 500)])
def test_pixels_of_pictures(tiny: Tiny, height: int, width: int) -> None:
    processor: Any = tiny.encoder.processor
    plan, frames = picture(height, width, processor), noise(1, height, width)
    found = squares_of(patches_of(frames, plan, processor).pixels_PD, processor)
    theirs = LlavaNextImageProcessorPil(
        crop_size={"height": SIDE, "width": SIDE}, size={"shortest_edge": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    wanted = levels(theirs(images=[pil(frames[0])])["pixel_values"][0], processor)
    assert found.shape == wanted.shape
    assert_same_pixels(found, wanted)


def test_less_room_means_fewer_tiles() -> None:
    """`max_pixels` leaves out resolutions; the smallest always stays."""
    sizes = [picture(900, 900, max_pixels=limit).num_tokens for limit in (1 << 30, 672 * 672 - 1, 1)]
    assert sizes[0] > sizes[1] == sizes[2]


# ------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("height, width", [(90, 160), (161, 91), (56, 56), (57, 400), (30, 41)])
def test_pixels_of_videos(tiny: Tiny, height: int, width: int) -> None:
    """Beside CLIP's own processor, with which the model was trained: the shorter side to the square's, the middle."""
    processor: Any = tiny.encoder.processor
    plan, frames = Media.make(processor, [medium("video", 3, height, width)]).plans[0], noise(3, height, width)
    found = squares_of(patches_of(frames, plan, processor).pixels_PD, processor)
    theirs = CLIPImageProcessorPil(crop_size={"height": SIDE, "width": SIDE}, size={"shortest_edge": SIDE})
    wanted = levels(np.stack(theirs(images=[pil(frame) for frame in frames])["pixel_values"]), processor)
    assert_same_pixels(found, wanted)


@pytest.mark.parametrize("available, wanted", [(100, 32), (33, 32), (31, 31), (1, 1), (7200, 8)])
def test_frames_are_spread_evenly(available: int, wanted: int) -> None:
    ref, info = medium("video", available, 240, 320, fps=25.0)
    plan = SPEC.plan(ref, info, VisionLimits(None, 32 if wanted != 8 else 8, 1, 32, 1, 1, None))
    assert plan.frame_indices == tuple(np.linspace(0, available - 1, wanted, dtype=int).tolist())
    assert plan.num_tokens == 144 * wanted and (plan.height, plan.width) == (336, 336)


def test_frames_at_a_rate() -> None:
    """1 a second, within the limits; an odd count stays odd."""
    ref, info = medium("video", 175, 240, 320, fps=25.0)
    counts = [
        len(SPEC.plan(ref, info, VisionLimits(1.0, None, low, high, 1, 1, None)).frame_indices)
        for low, high in ((1, 32), (9, 32), (1, 5))
    ]
    assert counts == [7, 9, 5]


def test_a_size_of_their_own_is_refused() -> None:
    ref, info = medium("video", 10, 240, 320)
    with pytest.raises(UserError, match=r"resized_height = 224.*336 x 336"):
        SPEC.plan(ref, info, VisionLimits(None, 4, 1, 4, 1, 1, None, resized_height=224, resized_width=224))


# --------------------------------------------------------------------------------------------------------------- text


def test_text_of_a_conversation(tiny: Tiny) -> None:
    """One <s> in front; the form of the Vicuna template that the model was trained with, closed answers and no space
    behind them; the closing token is supervised."""
    video, tokenizer = medium("video", 4, 56, 56)[0], tiny.encoder.tokenizer
    turns: list[Any] = [("user", [video, "Who?"]), ("assistant", "No."), ("user", "No?"), ("assistant", "Nobody")]
    encoded = tiny.encoder.encode(talk(*turns))
    learnt = [label for label in encoded.labels if label != -100]
    found, labels = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (encoded.ids, learnt))
    text = found.replace("\u2581", " ").replace("<0x0A>", "\n")
    assert text.replace("> ", ">") == "<s>USER: <video>\nWho? ASSISTANT: No.</s>USER: No? ASSISTANT: Nobody</s>"
    assert labels.replace("\u2581", " ") == " No.</s> Nobody</s>"


def test_media_are_matched_in_the_order_of_the_template(tiny: Tiny) -> None:
    """It puts pictures before videos: embeddings go where their own placeholders are."""
    (video, video_info), (image, image_info) = medium("video", 4, 56, 56), medium("image", 1, 90, 60)
    conversation = talk(("user", [video, "and", image]), ("assistant", "Yes."))
    media = Media.make(tiny.encoder.processor, [(video, video_info), (image, image_info)])
    made = tiny.encoder.document([conversation], media.plans)
    assert [plan.ref.kind for plan in made.media] == ["image", "video"]
    processor: Any = tiny.encoder.processor
    order = (processor.image_token, media.plans[1]), (processor.video_token, media.plans[0])
    assert made.ids_T[made.media_mask_T].tolist() == [token for token, plan in order for _ in range(plan.num_tokens)]


def test_longer_than_the_context_is_left_out(tiny: Tiny) -> None:
    """With both numbers; a question beside it that fits stays, and together they may be longer than the context."""
    ref, info = medium("video", 4, 56, 56)
    short = [talk(("user", [ref, "Who?"]), ("assistant", "No."), id=str(i)) for i in range(4)]
    long = talk(("user", [ref, "Who is there, and what happens in the video?"]), ("assistant", "A dog."), id="long")
    context = 4 * 4 + tiny.encoder.encode(short[0]).text_tokens
    processor: Any = replace(tiny.encoder.processor, context_tokens=context)  # type: ignore[type-var]
    encoder = ChatEncoder(tiny.encoder.tokenizer, processor)
    config = DataConfig(video=VideoConfig(frames=4))
    documents = make_dataset([*short, long], encoder, config, lambda ref: info)
    assert documents.lengths[0] > context and documents.build(0).sample_ids == ("0", "1", "2", "3")
    (bad,) = documents.bad
    assert bad.reason == "unfit" and re.search(
        rf"\d+ tokens of text, more than the model's context of {context}", bad.message
    )


def test_context_of_the_released_model() -> None:
    """4,096 positions; linear scaling by 2 makes 8,192 of them."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    found = []
    for parameters in (None, rope):
        text = LlamaConfig(max_position_embeddings=4096, rope_parameters=parameters)
        found.append(LlavaProcessor.from_hf(LlavaNextVideoConfig(text_config=text), {}).context_tokens)
    assert found == [4096, 8192]


# -------------------------------------------------------------------------------------------------------- checkpoints


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("file", "table", "change", "expected"),
    [
        ("preprocessor_config", "", {"crop_size": {"height": 224, "width": 224}}, "crop_size = 224.*56"),
        ("config", "", {"spatial_pool_mode": "max"}, "spatial_pool_mode = 'max'"),
        ("config", "", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("config", "", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ("config", "", {"image_grid_pinpoints": [[60, 120]]}, "image_grid_pinpoints.*56"),
        ("config", "text_config", DYNAMIC, "rope_type = 'dynamic'"),
        ("config", "text_config", {"attention_bias": True}, "attention_bias"),
        ("config", "text_config", {"model_type": "mistral", "sliding_window": 64}, "sliding_window = 64"),
        ("config", "text_config", {"model_type": "qwen2"}, "model_type = 'qwen2'"),
    ],
)
def test_what_is_not_known_is_refused(
    tiny: Tiny, tmp_path: Path, file: str, table: str, change: dict[str, Any], expected: str
) -> None:
    path = shutil.copytree(tiny.path, tmp_path / "base") / f"{file}.json"
    content = json.loads(path.read_text())
    (content[table] if table else content).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=expected):
        load_model(str(path.parent), None, torch.float32, CPU)


# ------------------------------------------------------------------------------------------- positions beyond 4,096


def test_stretched_positions_are_those_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    """An adapter trained with `rope_factor` is loaded with it; merged, it stands in config.json, and transformers'
    logits are ours."""
    lora = LoraConfig(rank=2, alpha=4, targets=("language_model.q_proj",))
    checkpoint = Pretrained.open(str(tiny.path), rope_factor=3.0)
    model = load_model(str(tiny.path), None, torch.float32, CPU, rope_factor=3.0).model
    choose_trainable(model, lora, ())
    initialise(model, 0)
    disturb(model)
    about = {"base_fingerprint": checkpoint.fingerprint, "rope_factor": 3.0}
    export_adapter(model, tmp_path / "adapter", lora, str(tiny.path), about, write=True)
    merge(str(tiny.path), tmp_path / "adapter", tmp_path / "merged")
    batch = row(tiny, "video")
    loaded = load_model(str(tiny.path), tmp_path / "adapter", torch.float32, CPU)
    again = load_model(str(tmp_path / "merged"), None, torch.float32, CPU)
    with torch.no_grad():
        plain, wanted = (every_logit(one, batch) for one in (tiny.ours(), model.eval()))
        theirs = tiny.load(tmp_path / "merged")(**tiny.inputs(batch)).logits[0]
        for found in (theirs, every_logit(loaded.model, batch), every_logit(again.model, batch)):
            assert float((found - wanted).abs().max()) <= 1e-4
        assert float((wanted - plain).abs().max()) > 0.5
    assert again.model.processor.context_tokens == 3 * 4096


def test_evaluation_has_the_context_of_training(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.rope_factor` of the settings, or that of the adapter; another than the adapter's is refused."""

    class Seen(Exception): ...

    def held_out(task: Any, config: Any, encoder: Any) -> None:
        raise Seen(encoder.processor.context_tokens)

    monkeypatch.setattr(evaluation, "load_held_out", held_out)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "vft.json").write_text(json.dumps({"rope_factor": 3.0}))
    world = environment()

    def config(given: float | None) -> Config:
        model = {"path": str(tiny.path), "rope_factor": given}
        return Config.model_validate({"task": "qa", "output_dir": "run", "model": model})

    for given, adapter, wanted in ((2.0, None, 2), (None, tmp_path / "adapter", 3), (3.0, tmp_path / "adapter", 3)):
        with pytest.raises(Seen, match=str(wanted * 4096)):
            used = evaluation_config(config(given), adapter)
            evaluation.score_all(task_of(used), used, {tmp_path / "base.jsonl": None}, world)
    with pytest.raises(UserError, match=r"model\.rope_factor = 2\.0.*trained with 3\.0"):
        evaluation_config(config(2.0), tmp_path / "adapter")


def test_a_family_that_was_not_made_for_it_refuses(make_tiny: Any) -> None:
    with pytest.raises(UserError, match=r"linear.*factor 2\.0.*model.rope_factor.*qwen2_5_vl"):
        load_model(str(make_tiny("qwen2_5_vl", "tied").path), None, torch.float32, CPU, rope_factor=2.0)
