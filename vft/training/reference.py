"""What the reference makes of each answer, computed once before the first step and kept in the cache folder.

`reference/KEY.bin` has the log-probability of each suffix of all documents, by their numbers: a checksum, then float32.
KEY is a digest of all that these depend on: base and adapter, precision, documents and their media, our own code.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from vft.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from vft.common.console import progress_bar
from vft.common.errors import UserError
from vft.common.files import digest, locked, whole_file
from vft.common.types import Batch, move
from vft.config.run import Config
from vft.data.dataset import Dataset
from vft.data.stored import CODE, INDIFFERENT, ROWS, code_digest
from vft.distributed.heartbeat import report_progress
from vft.distributed.process_group import World, all_of
from vft.inference.evaluate import each_once, evaluating
from vft.preparation.run import PreparedModel
from vft.training.preferences import Preference, by_suffix, nothing_known
from vft.training.run_data import RunData

logger = logging.getLogger(__name__)

SAVE_EVERY = 100
"""Rows of each process after which progress is saved: what an interrupted start may lose."""
CHECKSUM_BYTES = 32


@dataclass(frozen=True)
class Known:
    """log p of the suffixes of all documents [suffixes], natural log, in float32; NaN if it is not known."""

    log_p_S: Tensor
    starts: Sequence[int]
    """The first suffix of each document, and the end of the last one."""

    def places(self, numbers: Sequence[int]) -> Tensor:
        """Where the values of documents with these numbers are, one after another."""
        return torch.tensor([i for n in numbers for i in range(*self.starts[n : n + 2])], dtype=torch.long)

    def __call__(self, batch: Batch) -> Tensor:
        """Those of a row [suffixes], on its device. UserError if one is not finite: what could not be decoded is known
        to be bad, so that no row has it."""
        numbers = [document.number for document in batch.documents if document.number is not None]
        if len(numbers) < len(batch.documents):
            return nothing_known(batch)
        log_p_S = self.log_p_S[self.places(numbers)]
        if not log_p_S.isfinite().all():
            what = f"the reference gives their answers the log-probabilities {log_p_S.tolist()}"
            fix = 'take the wrong one out, or set train.precision = "fp32"'
            raise UserError(f"samples {', '.join(batch.sample_ids)}: {what}; {fix}", on_one_rank=True)
        return move(log_p_S, batch.input_ids_T.device)


def computed_once(objective: Preference, prepared: PreparedModel, config: Config, data: RunData, world: World) -> Known:
    """The reference's log-probabilities of all documents, from the file or by a pass over those that it lacks.

    The model has the weights with which training begins. Every process calls it. What cannot be decoded becomes known
    as bad, and is tried again at the next start. Raises UserError if that is more than `data.max_bad_fraction`, or if
    the file cannot be written. The rows are those of training's first epoch, if each document comes once in it.
    """
    documents, model, parallel = data.documents, prepared.model, data.loader.parallel
    starts = tuple(accumulate((config.answers * count for count in documents.samples), initial=0))
    known = Known(torch.full((starts[-1],), torch.nan), starts)
    file = config.data.cache_path / "reference" / f"{_key(objective, prepared, config, documents)}.bin"
    report_progress("waiting for the log-probabilities of the reference", has_timeout=False)
    fix = "name a folder that can be written as data.cache_dir"
    lock = locked(file.with_suffix(".lock"), "another run with the same reference", fix)
    with lock if world.is_main else nullcontext():
        if (stored_S := all_of(_read(file) if world.is_main else None)[0]) is not None:
            known.log_p_S.copy_(stored_S)
        is_known = known.log_p_S.isfinite().tolist()
        if not (missing := [number for number, start in enumerate(starts[:-1]) if not is_known[start]]):
            return known
        text = "the reference computes log-probabilities of %d of %d documents, once; they are kept in %s"
        logger.info(text, len(missing), len(starts) - 1, file)
        loader, steps = each_once(documents, missing, data.loader.pool, parallel, world, config.seed)
        loader.bad = data.loader.bad
        bar = progress_bar(steps, "log-probabilities of the reference", "row", world.is_main)
        own: list[tuple[list[int], list[float]]] = []
        with evaluating(model), objective.reference(model), bar:
            for step in range(1, steps + 1):
                report_progress(f"at row {step} of the reference")
                for pack in loader.step(is_last=step == steps):
                    numbers = [one.number for one in pack.batch.documents if one.number is not None]
                    own.append((numbers, by_suffix(model, pack.batch).tolist()))
                bar.update()
                if step % SAVE_EVERY == 0 or step == steps:
                    data.exchange_found(0, is_last_step=False)
                    for numbers, values in chain.from_iterable(all_of(own, parallel.group)):
                        known.log_p_S[known.places(numbers)] = torch.tensor(values)
                    own = []
                    if world.is_main:
                        _write(file, known.log_p_S)
    return known


def _key(objective: Preference, prepared: PreparedModel, config: Config, documents: Dataset) -> str:
    """Differs for other values."""
    assert documents.index is not None
    adapter = Path(config.model.adapter) if objective.needs_start(config.model) else None
    files = [] if adapter is None else [(adapter / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    model = [hashlib.sha256(content).hexdigest() for content in files], prepared.pretrained.fingerprint
    settings = config.model.model_dump(include={"quantize", "rope_factor", "train"}), config.train.precision
    media = hashlib.sha256()
    table = documents.index.table.select(["path", "size_bytes", "mtime_ns"]).combine_chunks()
    for batch in table.to_batches(max_chunksize=ROWS):
        media.update(repr(batch.to_pydict()).encode())
    data = config.data.model_dump(exclude=INDIFFERENT), documents.encoder.fingerprint, documents.digest
    code = code_digest((*CODE, "adapters", "training"))
    return digest(repr((model, settings, media.hexdigest(), data, code)))


def _read(file: Path) -> Tensor | None:
    """None if there is no file, or if it is damaged or another one."""
    try:
        content = file.read_bytes()
    except OSError:  # writing says what is wrong
        return None
    checksum, values = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if checksum != _checksum(file, values):
        logger.warning("%s: damaged; the reference computes again", file)
        return None
    return torch.frombuffer(bytearray(values), dtype=torch.float32)


def _write(file: Path, log_p_S: Tensor) -> None:
    values = log_p_S.numpy().tobytes()
    with whole_file(file) as partial:
        partial.write_bytes(_checksum(file, values) + values)


def _checksum(file: Path, values: bytes) -> bytes:
    """With the name, so that a file of other values under it is noticed."""
    return hashlib.sha256(file.stem.encode() + values).digest()
