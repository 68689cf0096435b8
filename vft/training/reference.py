"""What the reference makes of each answer, computed once before the first step and kept in the cache folder.

`reference/KEY.bin` has the log-probability of each suffix of all documents, by their numbers: a checksum, then float32.
KEY is a digest of all that these depend on: base and adapter, precision, documents and their media, our own code.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
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

    def of(self, number: int) -> Tensor:
        """Those of a document."""
        return self.log_p_S[self.starts[number] : self.starts[number + 1]]

    @property
    def missing(self) -> list[int]:
        """Numbers of the documents that are not known."""
        is_known = self.log_p_S.isfinite().tolist()
        return [number for number, start in enumerate(self.starts[:-1]) if not is_known[start]]

    def __call__(self, batch: Batch) -> Tensor:
        """Those of a row [suffixes], on its device."""
        parts = [self.of(document.number) for document in batch.documents if document.number is not None]
        if len(parts) < len(batch.documents):
            return nothing_known(batch)
        log_p_S = torch.cat([self.log_p_S[:0], *parts])
        # What could not be decoded is known to be bad, so that no row has it.
        assert bool(log_p_S.isfinite().all()), f"{batch.sample_ids}: the reference has not computed them"
        return move(log_p_S, batch.input_ids_T.device)


def computed_once(objective: Preference, prepared: PreparedModel, config: Config, data: RunData, world: World) -> Known:
    """The reference's log-probabilities of all documents, from the file or by a pass over those that it lacks.

    The model has the weights with which training begins. Every process calls it. What cannot be decoded becomes known
    as bad, and is tried again at the next start. Raises UserError if that is more than `data.max_bad_fraction`, if a
    value is not finite, or if the file cannot be written.
    """
    documents = data.documents
    starts = tuple(accumulate((config.answers * count for count in documents.samples), initial=0))
    known = Known(torch.full((starts[-1],), torch.nan), starts)
    key = _key(objective, prepared, config, documents)
    file = config.data.cache_path / "reference" / f"{key}.bin"
    report_progress("waiting for the log-probabilities of the reference", has_timeout=False)
    fix = "name a folder that can be written as data.cache_dir"
    lock = locked(file.with_suffix(".lock"), "another run with the same reference", fix)
    with lock if world.is_main else nullcontext():
        stored_S = all_of(_read(file, key) if world.is_main else None)[0]
        if stored_S is not None:
            known.log_p_S.copy_(stored_S)
        if missing := known.missing:
            text = "the reference computes log-probabilities of %d of %d documents, once; they are kept in %s"
            logger.info(text, len(missing), len(documents.documents), file)
        for found in _passes(objective, prepared, config, data, world, missing) if missing else ():
            for number, values in found:
                known.of(number).copy_(torch.tensor(values))
                if not all(map(math.isfinite, values)):
                    origin = documents.documents[number].conversations[0].origin
                    what = f"by the reference its answers have the log-probabilities {values}"
                    raise UserError(f'{origin}: {what}; take the record out, or set train.precision = "fp32"')
            if world.is_main:
                _write(file, key, known.log_p_S)
    return known


def _passes(
    objective: Preference,
    prepared: PreparedModel,
    config: Config,
    data: RunData,
    world: World,
    numbers: Sequence[int],
) -> Iterator[list[tuple[int, list[float]]]]:
    """What all processes have computed since the last time: document numbers with the values of their suffixes.

    The rows are those of training's first epoch, if all documents come once in it.
    """
    model, parallel = prepared.model, data.loader.parallel
    loader, steps = each_once(data.documents, numbers, data.loader.pool, parallel, world, config.seed)
    loader.bad = data.loader.bad
    own: list[tuple[int, list[float]]] = []
    with (
        evaluating(model),
        objective.reference(model),
        progress_bar(steps, "log-probabilities of the reference", "row", world.is_main) as bar,
    ):
        for step in range(1, steps + 1):
            report_progress(f"at row {step} of the reference")
            for pack in loader.step(is_last=step == steps):
                values = by_suffix(model, pack.batch).cpu()
                members = pack.batch.documents
                parts = values.split([len(document.suffix_lengths) for document in members])
                own += ((one.number or 0, part.tolist()) for one, part in zip(members, parts, strict=True))
            bar.update()
            if step % SAVE_EVERY == 0 or step == steps:
                data.exchange_found(0, is_last_step=False)
                yield [one for part in all_of(own, parallel.group) for one in part]
                own = []


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


def _read(file: Path, key: str) -> Tensor | None:
    """None if there is no file, or if it is damaged or another one."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: can't be read (%s); the reference computes again", file, error.strerror)
        return None
    checksum, values = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if checksum != _checksum(key, values):
        logger.warning("%s: damaged; the reference computes again", file)
        return None
    return torch.frombuffer(bytearray(values), dtype=torch.float32)


def _write(file: Path, key: str, log_p_S: Tensor) -> None:
    values = log_p_S.numpy().tobytes()
    with whole_file(file) as partial:
        partial.write_bytes(_checksum(key, values) + values)


def _checksum(key: str, values: bytes) -> bytes:
    return hashlib.sha256(key.encode() + values).digest()
