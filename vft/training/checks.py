"""Checks that stop a run before it goes wrong in silence: of its folder, of what it resumes, of its first step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vft.adapters.targets import component_of
from vft.common.errors import UserError
from vft.common.files import cannot_write, read_object, remove_partials, replace_text
from vft.common.rules import VERSION, changed_since
from vft.config import run as configs
from vft.config.run import Config
from vft.distributed.process_group import all_of, local_part, sum_over_ranks
from vft.models.base import VideoLanguageModel

IDENTITY = {
    "data": "the samples, their texts or lengths",
    "base": "the weights of model.path",
    "held_out": "the held-out samples or their answers",
}
"""What the digests in a checkpoint stand for."""


def check_shares(config: Config, processes: int) -> None:
    """UserError where a step's rows can't be shared out evenly."""
    if config.train.packs_per_step % processes:
        raise UserError(
            f"train.packs_per_step = {config.train.packs_per_step}: must be a multiple of the number of processes, "
            f"{processes}"
        )


def check_warmup(config: Config, steps: int) -> None:
    """UserError where the run is over before the warm-up is."""
    if config.train.warmup_steps > steps:
        raise UserError(
            f"train.warmup_steps = {config.train.warmup_steps}: the run has {steps} steps and would never reach the "
            "learning rate; lower it"
        )


def check_output_dir(config: Config) -> None:
    """UserError where the folder can't be written, or holds a run of another configuration or by other rules: two runs
    would mix."""
    folder = config.output_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir = {str(config.output_dir)!r}: {existing} is no folder that can be written; name another"
        )
    file = config.output_dir / "config.toml"
    if not file.is_file():
        return
    # First: what is asked for now may look different only because settings have got other names since.
    states = sorted(config.output_dir.glob("checkpoints/step-*/state.json"))
    for said in [one for one in (config.output_dir / "run.json", *states[-1:]) if one.is_file()][:1]:
        check_rules(config.output_dir, read_object(said))
    before = configs.load(file)
    for key, old, new in configs.differences(before, config):
        raise UserError(
            f"{file}: {key} = {old!r} in the run that is there, {new!r} asked for; "
            "name another output_dir, or remove this one to begin anew"
        )


def take_folder(config: Config, about: Mapping[str, Any]) -> FileLock:
    """Make a run's folder, write what the run is, and keep it as long as the result. UserError where another run is at
    work there."""
    folder = config.output_dir
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir = {str(folder)!r}: another run is at work there; wait for it, or name another"
        ) from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    remove_partials(folder)
    if not (folder / "run.json").exists():
        replace_text(folder / "run.json", json.dumps({**about, "rules": VERSION}, indent=1) + "\n")
    replace_text(folder / "config.toml", configs.dump(config))
    return lock


def check_rules(place: Path, state: Mapping[str, Any]) -> None:
    """UserError where a run was begun under other rules: its second half would be trained on other samples."""
    if changed := changed_since(state):
        raise UserError(
            f"{place}: the run there was begun under {changed}. Name another output_dir to begin anew, or finish it "
            "with the vft that began it"
        )


def check_identity(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """UserError where the rules, the data or the base are not those that the checkpoint was made with: its cursor would
    lie.

    Nor may the held-out samples be edited, whose scores would be laid beside those of before, but for other settings
    of them (`held_out_settings`).
    """
    check_rules(checkpoint, then)
    for what, meaning in IDENTITY.items():
        digest = now.get(what)
        if what == "held_out" and then.get("held_out_settings") != now.get("held_out_settings"):
            continue
        if then.get(what) != digest:
            raise UserError(
                f"{checkpoint}: {what} = {str(then.get(what))[:16]} then, {str(digest)[:16]} now: {meaning} changed "
                "since; put it back, or name another output_dir"
            )


def tell_of_weights(config: Config, say: Callable[[str], None]) -> None:
    """Say what `weight`, a key of older files, means."""
    weighed = [source for source in config.data.sources if source.weight is not None]
    if weighed:
        streams = any(source.stream for source in config.data.sources)
        meaning = "rows of a step beside those of other weights" if streams else "how often records come in an epoch"
        instead = "share, its fraction of the samples" if streams else "repeats, the same under a clearer name"
        told = ", ".join(f"{source.path} {source.weight:g}" for source in weighed)
        say(f"data.sources: weight ({told}) is read as before, {meaning}; give {instead}")


def warn_of_benchmarks(config: Config, say: Callable[[str], None]) -> None:
    """Some sets are to be evaluated on."""
    if any(source.format == "video_mme" for source in config.data.sources):
        say("warning: Video-MME is a benchmark: scores on it mean nothing after training on it")


class NotFinite:
    """Steps whose loss or gradient is no number change nothing; some of them in a row end the run.

    Both are sums over all processes, so all of them decide alike.
    """

    IN_A_ROW = 3
    NAMED = 20

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.in_a_row = say, 0
        self.skipped = 0
        """Since this process began."""

    def skips(self, step: int, loss: float, norm: float, sample_ids: Sequence[str]) -> bool:
        """Whether the step is to be left out. UserError where it is one too many; `sample_ids` are this process's."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        ids = [one for part in all_of(tuple(sample_ids)) for one in part]
        more = f" and {len(ids) - self.NAMED} more" if len(ids) > self.NAMED else ""
        text = (
            f"step {step}: loss {loss}, gradient norm {norm}: not finite; nothing was updated. "
            f"Samples of this step: {', '.join(ids[: self.NAMED])}{more}"
        )
        if self.in_a_row == self.IN_A_ROW:
            raise UserError(f"{text}. The third in a row: lower train.learning_rate, or look at these samples")
        self.say(f"warning: {text}")
        self.skipped += 1
        return True


def check_first_step(model: VideoLanguageModel, loss: float, had_media: bool, say: Callable[[str], None]) -> None:
    """Weights that were never loaded, and adapters or components that get no gradient: both train on without a word.

    Call it between the first backward pass and the first update; every process must. UserError for a sure sign, a
    warning through `say` for a doubtful one.
    """
    chance = math.log(model.config.vocabulary)
    if loss > 1.05 * chance:  # random weights are a little above it too
        say(
            f"warning: the first loss, {loss:.2f}, is above that of guessing, ln(vocabulary) = {chance:.2f}: check "
            "that model.path is the checkpoint you mean, unless you know that it answers in another form"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (parameter.grad is not None):
            state = "is trained but has no gradient" if parameter.requires_grad else "is frozen but has a gradient"
            raise UserError(f"{name} {state} after the first step; check lora.targets and model.train")
    # B's gradient alone: A's is exactly zero as long as B is. Without media nothing reaches the vision encoder.
    named = {n: p for n, p in model.named_parameters() if n.endswith("lora_B.weight")}
    if not named:
        return
    sizes = torch.stack([local_part(p.grad).abs().sum().double() for p in named.values() if p.grad is not None])
    for name, size in zip(named, sum_over_ranks(sizes).tolist(), strict=True):
        component = component_of(name, model.components)
        if size == 0 and (component == "language_model" or had_media):
            raise UserError(f"{name}: gradient is 0 everywhere after the first step; check lora.targets ({component})")
