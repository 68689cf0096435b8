"""The data of a training run: what is trained on, where the run stands in it, and what cannot be used."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from vft.common.files import digest
from vft.config.run import Config
from vft.data.dataset import Dataset, Prompts
from vft.data.loader import Loader
from vft.data.quarantine import BadItem, check_bad, write_quarantine
from vft.data.streaming.stream import Streams
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, all_of, environment

logger = logging.getLogger(__name__)


class RunData:
    """Indexed documents, streams, and the loader that makes packs of both.

    Every process has the same documents and plan; its loader gives the packs of its own part of the data.
    """

    def __init__(
        self,
        config: Config,
        documents: Dataset,
        streams: Streams | None,
        pool: WorkerPool,
        part: DataParallel,
        device: torch.device,
    ) -> None:
        self.config, self.documents, self.streams, train = config, documents, streams, config.train
        self.archives = streams.archives if streams is not None else []
        documents.bad += [item for source in self.archives for item in source.bad]
        self.plan = documents.pack_plan(config.seed)
        last_epoch = None if train.epochs is None else train.epochs - 1
        prefetched = config.data.prefetch_packs
        self.loader = Loader(
            documents, self.plan, pool, part, train.packs_per_step, prefetched, last_epoch, streams, device
        )

    @property
    def digest(self) -> str:
        """The same for the same samples, texts and lengths."""
        if not self.archives:
            return self.documents.digest
        return digest(f"{self.documents.digest}{[source.digest for source in self.archives]}")

    def count_steps(self, done: int) -> int:
        """Steps of the whole run, if `done` of them have brought the loader to where it is."""
        train = self.config.train
        if train.epochs is None:
            return train.max_steps or 0
        return done + math.ceil(self.plan.packs_left(self.loader.cursor, train.epochs) / train.packs_per_step)

    def epochs_in(self, steps: int) -> float | None:
        """Epochs that so many steps make; None with streams, which have none."""
        rows = len(self.plan.first_packs)
        return None if self.archives or not rows else steps * self.config.train.packs_per_step / rows

    def state(self) -> dict[str, Any]:
        """What `Loader.restore` takes, of all processes. Every process calls it."""
        state = self.loader.state()
        state["streams"] = {name: place for part in all_of(state["streams"]) for name, place in part.items()}
        return state

    def exchange_found(self, samples: int, is_last_step: bool) -> None:
        """Tell every process which samples any of them found to be bad.

        Every process calls it. `samples` is how many have been trained on. Raises UserError if more than
        `data.max_bad_fraction` cannot be used, or if a stream has no usable sample at all.
        """
        loader, limit = self.loader, self.config.data.max_bad_fraction
        reports = all_of(loader.bad.report)
        new = loader.bad.merge(reports)
        if new:
            self.write_quarantine()
        for message in [item.message for item in new if item.reason == "archive"]:
            logger.warning("%s", message)
        for note in [note for report in reports for note in report.notes]:
            logger.warning("%s", note)
        if self.streams is None:
            check_bad(self.bad, self.documents.num_samples + len(self.documents.bad), limit)
            return
        exhausted = [source for report in reports for source in report.exhausted]
        if not samples and is_last_step:
            exhausted += [source.name for source in self.archives]
        if exhausted:
            num_good = sum(all_of(loader.num_streamed[exhausted[0]]))
            raise self.streams.nothing_in(exhausted[0], loader.bad.known.values(), num_good)
        loader.bad.check_streams(samples, self.streams.passes, limit)

    @property
    def bad(self) -> list[BadItem]:
        """What was left out by reading and scanning, then what could not be decoded."""
        return [*self.documents.bad, *self.loader.bad.known.values()]

    def write_quarantine(self) -> None:
        """Write `quarantine.jsonl`."""
        if environment().is_main:
            write_quarantine(self.config.output_dir, self.bad)

    def prompts(self) -> Prompts:
        """What the records ask, those of streams since the start of this process. Every process calls it."""
        prompts = self.documents.prompts
        # A copy, because the loader's thread goes on counting.
        for part in all_of(dict(self.streams.prompts)) if self.streams is not None else ():
            prompts.update(part)
        return prompts

    def report_unusable(self) -> None:
        """Write `quarantine.jsonl`, and say how many archives and samples cannot be used."""
        self.write_quarantine()
        for source in self.archives:
            if source.warning:
                logger.warning("%s: %s", source.name, source.warning)
        if self.documents.bad:
            file = self.config.output_dir / "quarantine.jsonl"
            first, count = self.documents.bad[0], len(self.documents.bad)
            logger.warning("%d sample(s) can't be used, such as %s: %s; all: %s", count, first.id, first.message, file)
