"""Checks that stop a run before it goes wrong unnoticed: of its folder, of what it resumes, of its steps."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vft.common.errors import UserError, first_line
from vft.common.files import cannot_write, read_object, remove_partials, replace_text
from vft.common.rules import VERSION, changed_since
from vft.config import run as configs
from vft.config.run import Config, TrainConfig
from vft.distributed.process_group import all_of, local_part, sum_over_ranks
from vft.distributed.signals import stopped_by
from vft.models.base import VideoLanguageModel, component_of

logger = logging.getLogger(__name__)

FEW_STEPS = 30
"""Steps below which a run of so many epochs is warned of: the recipes' warm-up alone has about as many."""
HUGE_RATE = 0.1
"""Learning rate from which there is a warning."""
MANY_EPOCHS = 50
"""Epochs above which a run is warned of: supervised tuning takes one to three, and a demo of a few clips some tens."""

ENDED = ".ended"
"""In the folder of a run that ended before its last step: why, for whoever looks at it from elsewhere. The next start
removes it."""

IDENTITY = {
    "data": "the samples, their texts or lengths",
    "base": "the weights of model.path",
    "held_out": "the held-out samples or their answers",
}
"""What the digests in a checkpoint are of."""


def check_shares(config: Config, processes: int) -> None:
    """Raises UserError if the packs of a step cannot be divided evenly among the processes."""
    if config.train.packs_per_step % processes:
        raise UserError(
            f"train.packs_per_step = {config.train.packs_per_step}: must be a multiple of the number of processes, "
            f"{processes}"
        )


def check_steps(train: TrainConfig, steps: int) -> None:
    """Raises UserError if a run has no `steps`, or fewer than its warm-up."""
    if not steps:
        raise UserError(f"train.epochs = {train.epochs}: by repeats no record comes in so few; raise either")
    if train.warmup_steps > steps:
        raise UserError(
            f"train.warmup_steps = {train.warmup_steps}: the run has {steps} steps and would never reach the learning "
            f"rate; train longer (train.epochs, or train.max_steps), or take fewer, such as "
            f"train.warmup_steps={steps // 10}"
        )


def check_output_dir(config: Config) -> None:
    """Raises UserError if the folder cannot be written, or holds a run with another configuration or other rules: the
    two would mix."""
    folder = config.output_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir = {str(config.output_dir)!r}: {existing} is no folder that can be written; name another"
        )
    file = config.output_dir / "config.toml"
    if not file.is_file():
        return
    # The rules come first: under other rules the settings may only seem to differ, because their names have changed.
    states = sorted(config.output_dir.glob("checkpoints/step-*/state.json"))
    records = [path for path in (config.output_dir / "run.json", *states[-1:]) if path.is_file()]
    if records:
        check_rules(config.output_dir, read_object(records[0]))
    before = configs.load(file)
    for key, old, new in configs.differences(before, config):
        then, now = ("not set" if value is None else repr(value) for value in (old, new))
        raise UserError(
            f"{file}: {key} = {then} in the run that is there, {now} asked for; "
            "name another output_dir, or remove this one to begin anew"
        )


@contextmanager
def locked_folder(config: Config, facts: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder of a run, write what the run is (`facts`), and keep other runs out of it until the end.

    If the run ends early, `ENDED` says why. Raises UserError if another run is at work there.
    """
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
    try:
        remove_partials(folder)
        if not (folder / "run.json").exists():
            replace_text(folder / "run.json", json.dumps({**facts, "rules": VERSION}, indent=1) + "\n")
        replace_text(folder / "config.toml", configs.dump(config))
        (folder / ENDED).unlink(missing_ok=True)
        yield
        if name := stopped_by():
            replace_text(folder / ENDED, f"stopped by {name}; the same command goes on\n")
    except Exception as error:
        with suppress(UserError):  # the disk may be what failed
            replace_text(folder / ENDED, f"failed: {first_line(error)}\n")
        raise
    finally:
        lock.release()


def check_rules(place: Path, state: Mapping[str, Any]) -> None:
    """Raises UserError if a run was started under other rules: its second half would be trained on other samples."""
    if changed := changed_since(state):
        raise UserError(
            f"{place}: the run there was begun under {changed}. Name another output_dir to begin anew, or finish it "
            "with the vft that began it"
        )


def check_identity(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raises UserError if the rules, the data or the base have changed since the checkpoint: its cursor would be wrong.

    The held-out samples may not change either, because scores before and after would be compared; but other settings
    (`held_out_settings`) may choose other ones.
    """
    check_rules(checkpoint, then)
    for what, meaning in IDENTITY.items():
        digest = now.get(what)
        if what == "held_out" and then.get("held_out_settings") != now.get("held_out_settings"):
            continue
        if then.get(what) != digest:
            goes_on = "; with model.adapter = that of this run it starts from what was learnt" * (what == "data")
            raise UserError(
                f"{checkpoint}: {what} = {str(then.get(what))[:16]} then, {str(digest)[:16]} now: {meaning} changed "
                f"since; put it back, or name another output_dir{goes_on}"
            )


def warn_of_weights(config: Config) -> None:
    """A message that says what `weight`, a key of older files, means, and what has taken its place."""
    weighted = [source for source in config.data.sources if source.weight is not None]
    if weighted:
        streams = any(source.stream for source in config.data.sources)
        meaning = "rows of a step beside those of other weights" if streams else "how often records come in an epoch"
        instead = "share, its fraction of the samples" if streams else "repeats, the same under a clearer name"
        weights = ", ".join(f"{source.path} {source.weight:g}" for source in weighted)
        logger.info("data.sources: weight (%s) is read as before, %s; give %s", weights, meaning, instead)


def warn_of_rates(train: TrainConfig) -> None:
    """A warning about a learning rate that no run survives: AdamW moves each weight by about as much in a step."""
    rates = {"learning_rate": train.learning_rate}
    rates |= {f"component_learning_rates.{name}": rate for name, rate in train.component_learning_rates.items()}
    for name, rate in rates.items():
        if rate >= HUGE_RATE:
            text = "train.%s = %g: a step moves each weight by about as much; usual are 1e-6 to 1e-3"
            logger.warning(text, name, rate)


def warn_of_epochs(train: TrainConfig, steps: int, epochs: float | None, samples: int) -> None:
    """A warning if a run sees each of its samples so often that it learns them by heart, or if epochs make hardly any
    steps."""
    if train.max_steps is None and steps < FEW_STEPS:
        text = "train.epochs = %d is only %d step(s), which teach little: raise it, or put fewer samples in a step"
        logger.warning(text, train.epochs or 1, steps)
    if epochs is not None and epochs > MANY_EPOCHS:
        text = "%d steps of %d rows are %.0f epochs of %d samples, which will be learnt by heart: "
        logger.warning(
            text + "fewer train.max_steps or train.packs_per_step, or more data",
            steps,
            train.packs_per_step,
            epochs,
            samples,
        )


def warn_of_benchmarks(config: Config) -> None:
    """A warning if a benchmark is trained on."""
    if any(source.format == "video_mme" for source in config.data.sources):
        logger.warning("Video-MME is a benchmark: scores on it mean nothing after training on it")


class NonFiniteSteps:
    """Skips steps whose loss or gradient norm is not finite, and ends the run after several in a row.

    Both numbers are sums over all processes, so all processes decide alike.
    """

    MAX_IN_A_ROW = 3
    MAX_NAMED = 20
    in_a_row = 0

    def skips(self, step: int, loss: float, norm: float, sample_ids: Sequence[str]) -> bool:
        """Whether to skip the step. `sample_ids` are those of this process.

        Raises UserError if it is one too many.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        ids = [id for part in all_of(tuple(sample_ids)) for id in part]
        more = f" and {len(ids) - self.MAX_NAMED} more" if len(ids) > self.MAX_NAMED else ""
        message = (
            f"step {step}: loss {loss}, gradient norm {norm}: not finite; nothing was updated. "
            f"Samples of this step: {', '.join(ids[: self.MAX_NAMED])}{more}"
        )
        if self.in_a_row == self.MAX_IN_A_ROW:
            raise UserError(f"{message}. The third in a row: lower train.learning_rate, or look at these samples")
        logger.warning("%s", message)
        return True


def check_first_step(model: VideoLanguageModel, loss: float, had_media: bool) -> None:
    """Find weights that were not loaded, and trained parameters that get no gradient.

    Every process calls it, between the first backward pass and the first update. Raises UserError for a sure sign, and
    warns of a doubtful one.
    """
    guessing = math.log(model.config.vocab_size)
    if loss > 1.05 * guessing:  # the loss of random weights is a little above it, too
        logger.warning(
            "the first loss, %.2f, is above that of guessing, ln(vocabulary) = %.2f: check that model.path is the "
            "checkpoint you mean, unless you know that it answers in another form",
            loss,
            guessing,
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (parameter.grad is not None):
            state = "is trained but has no gradient" if parameter.requires_grad else "is frozen but has a gradient"
            raise UserError(f"{name} {state} after the first step; check lora.targets and model.train")
    # Only B: A has no gradient as long as B is zero. Without media the vision encoder has none.
    adapters = {n: p for n, p in model.named_parameters() if n.endswith("lora_B.weight")}
    if not adapters:
        return
    sizes = torch.stack([local_part(p.grad).abs().sum().double() for p in adapters.values() if p.grad is not None])
    for name, size in zip(adapters, sum_over_ranks(sizes).tolist(), strict=True):
        component = component_of(name, model.components)
        if size == 0 and (component == "language_model" or had_media):
            raise UserError(f"{name}: gradient is 0 everywhere after the first step; check lora.targets ({component})")
