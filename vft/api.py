"""vft from Python, for notebooks and scripts. `import vft` offers these names; docs/use/python.md shows each of them.

A mistake of the user raises `vft.UserError`, a ValueError with a message of one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vft.adapters.peft_format import recorded
from vft.cli.predict import DECODE_TIMEOUT_S, DEFAULT_PROMPT
from vft.common.errors import UserError
from vft.common.scores import Interval
from vft.common.task import Answer
from vft.config import run as configs
from vft.config.data import DataConfig
from vft.config.run import Config, ModelConfig, ParallelConfig
from vft.data.media.video import scan
from vft.data.workers import WorkerPool
from vft.distributed.process_group import environment
from vft.inference.engine import Answerer, Failure
from vft.inference.evaluate import evaluation_config, score_all
from vft.inference.generate import Sampling
from vft.inference.requests import data_config, read_requests, want_texts, with_frame_times, with_labels
from vft.preparation.run import DTYPES, PreparedModel, load_for_inference, open_for_inference
from vft.recipes import task_of
from vft.recipes.main import train_config
from vft.reporting.run_folder import RecordedRun, read_run
from vft.training.export import adapter_folder

ConfigSource = str | Path | Mapping[str, Any]
"""A TOML file, or its tables as a dict."""


@dataclass(frozen=True)
class VideoModel:
    """A model that answers questions about videos and pictures. `load_model` makes one."""

    prepared: PreparedModel
    config: DataConfig
    """How frames are sampled and fitted."""
    about: Mapping[str, Any]
    """What its training recorded (vft.json), such as the `prompt`; empty for a model of another program."""

    def ask(
        self,
        clip: str | Path,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The model's answer about a video or picture: a text, or the likeliest label of a model of labels.

        Args:
            clip: file of the video or picture.
            prompt: what to ask; by default what the model was trained to answer.
            max_new_tokens: largest length of the answer, in tokens.
            temperature: 0 for greedy decoding, above 0 to sample.
            top_p: probability mass to sample from, above 0 and at most 1.
            seed: seed of sampling.

        Raises:
            UserError: the file cannot be read as a video or picture.
        """
        answer = self._answer(clip, prompt, Sampling(max_new_tokens, temperature, top_p, seed))
        return answer.text if answer.choice is None else answer.question.prompt.options[answer.choice]

    def probabilities(self, clip: str | Path) -> dict[str, float]:
        """The probability of each label for a video or picture, the likeliest first.

        Raises:
            UserError: the model was not trained on labels, or the file cannot be read.
        """
        answer = self._answer(clip, None, Sampling(1))
        if answer.choice is None:
            raise UserError("this model was not trained on labels; ask() it instead")
        shares = zip(answer.question.prompt.options, answer.option_probabilities, strict=True)
        return dict(sorted(shares, key=lambda one: -one[1]))

    def _answer(self, clip: str | Path, prompt: str | None, sampling: Sampling) -> Answer:
        """The answer; of a model of labels, to the question of its training, only the labels' scores."""
        asked = prompt or self.about.get("prompt") or DEFAULT_PROMPT
        before = "" if prompt else self.about.get("prompt_before_media", "")
        requests = read_requests([Path(clip)], asked, None, None, before, self.about.get("system"))
        if len(requests) != 1:
            raise UserError(f"{clip}: holds {len(requests)} questions; ask about one video or picture at a time")
        (request,) = requests if sampling.temperature else with_labels(requests, self.about)
        request = with_frame_times(request) if self.config.video.timestamps else request
        with WorkerPool(0, DECODE_TIMEOUT_S) as pool:
            encoder = self.prepared.encoder(self.config)
            answerer = Answerer(self.prepared.model, encoder, self.config, scan, pool, environment())
            texts = want_texts([request])
            (answer,) = answerer.answers([request.question], sampling, 1, show_progress=False, texts=texts)
        if isinstance(answer, Failure):
            raise UserError(answer.message)
        return answer


def load_model(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    precision: Literal["bf16", "fp32"] | None = None,
    quantize: Literal["none", "nf4"] = "none",
    fps: float | None = None,
    frames: int | None = None,
    max_frames: int | None = None,
    max_pixels: int | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> VideoModel:
    """Load a base or merged model, or a LoRA adapter on its base.

    Args:
        model: folder or hub name of the base or merged model.
        adapter: folder of a LoRA adapter, such as `runs/mine/adapter`, of its run or of a checkpoint of it.
        precision: by default bf16 on a GPU and fp32 on a CPU.
        quantize: "nf4" holds the decoder's layers in 4 bits.
        fps, frames, max_frames, max_pixels: frames a second, or a fixed number of frames, the largest number of
            frames, and the largest height x width of a frame; by default as in the model's training.
        template_options: keywords of the chat template, such as {"enable_thinking": True}; by default as in training.

    Raises:
        UserError: the model or the adapter is not there, or they do not fit each other.
    """
    world = environment()
    folder = None if adapter is None else adapter_folder(Path(adapter))
    dtype = DTYPES[precision or ("bf16" if world.device.type == "cuda" else "fp32")]
    prepared = open_for_inference(ModelConfig(path=str(model), quantize=quantize), folder, dtype)
    about = prepared.pretrained.json_file("vft.json") if folder is None else recorded(folder)
    limits = {"fps": fps, "frames": frames, "max_frames": max_frames, "max_pixels": max_pixels}
    about |= {} if template_options is None else {"template_options": template_options}
    config = data_config(about, limits)
    load_for_inference(prepared, world.device, None, ParallelConfig())
    return VideoModel(prepared, config, about)


def train(config: ConfigSource, overrides: Sequence[str] = (), *, task: str | None = None) -> RecordedRun:
    """Train a run, or resume it if its output_dir has checkpoints; returns what it has written.

    Args:
        config: TOML file of the run, or its tables as a dict.
        overrides: settings that replace those of `config`, such as `["train.max_steps=100", "lora.rank=8"]`.
        task: caption, qa, classify, summarize, story, ground or module:Class; by default the configuration's.

    Raises:
        UserError: a setting is wrong, or the data or the model cannot be read.
    """
    loaded = _load(config, overrides)
    train_config(loaded, task or loaded.task or "caption")
    return read_run(loaded.output_dir)


def evaluate(
    config: ConfigSource, adapter: str | Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Interval]:
    """Score the base model, or an adapter on it, on the held-out samples of a configuration.

    Args:
        config: TOML file of a training run, or its tables as a dict. The samples are those of `eval.sources`, or held
            out by `eval.split`.
        adapter: folder of a LoRA adapter, of its run or of a checkpoint; None scores the base model alone.
        overrides: settings that replace those of `config`.

    Returns:
        Each metric of the task with the ends of its 95 % interval. The answers are in `predictions/adapter.jsonl` or
        `predictions/base.jsonl` of the run's output_dir.

    Raises:
        UserError: a setting is wrong, or the data, the model or the adapter cannot be read.
    """
    folder = None if adapter is None else adapter_folder(Path(adapter))
    loaded = evaluation_config(_load(config, overrides), folder)
    name = "base" if folder is None else "adapter"
    file = loaded.output_dir / "predictions" / f"{name}.jsonl"
    return score_all(task_of(loaded), loaded, {file: folder}, environment())[name]


def load_run(folder: str | Path) -> RecordedRun:
    """What a run has written so far: `steps` (a dict for each step, as in metrics.jsonl), `evaluations` (scores by
    step), `predictions`, `quarantine`, `config` and more. UserError if the folder is not one of a run."""
    if not Path(folder, "config.toml").is_file():
        raise UserError(f"{folder}: no config.toml; name the output_dir of a run")
    return read_run(Path(folder))


def _load(source: ConfigSource, overrides: Sequence[str]) -> Config:
    return configs.load(source if isinstance(source, Mapping) else Path(source), overrides)
