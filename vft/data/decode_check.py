"""Decode all media of an index before a run, to know which can't be: a run itself finds them one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from vft.common.types import Document, MediaPlan
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError, as_media_error
from vft.data.media.video import decode_chunks
from vft.data.quarantine import BadItem
from vft.data.workers import WorkerPool

AHEAD = 16
"""Documents that wait for each worker."""

_Pending = tuple[Document, list[tuple[MediaPlan, Future[None]]]]


def decode_all(documents: Dataset, pool: WorkerPool) -> Iterator[list[BadItem]]:
    """For each document in turn, which of its media can't be decoded; of each medium the frames that training takes.

    A medium that several documents show is decoded once, for the first of them.
    """
    seen: set[str] = set()
    pending: deque[_Pending] = deque()
    for number in range(len(documents.documents)):
        document = documents.build(number)
        new = {plan.ref.name: plan for plan in document.media if plan.ref.name not in seen}
        seen.update(new)
        pending.append((document, [(plan, pool.submit(_decode, plan)) for plan in new.values()]))
        if len(pending) > AHEAD * max(1, pool.workers):
            yield _failed(documents, *pending.popleft())
    while pending:
        yield _failed(documents, *pending.popleft())


def _decode(plan: MediaPlan) -> None:
    """In a worker: decode and forget."""
    with as_media_error(plan.ref.files[0]):
        for _ in decode_chunks(plan):
            pass


def _failed(documents: Dataset, document: Document, decoding: list[tuple[MediaPlan, Future[None]]]) -> list[BadItem]:
    failed = []
    for plan, future in decoding:
        try:
            future.result()
        except MediaError as error:
            name = plan.ref.name
            lost = documents.samples_by_medium[name]
            failed.append(BadItem(document.sample_ids[0], name, error.reason, str(error), lost))
    return failed
