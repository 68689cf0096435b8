"""Documents whose media are decoded in worker processes, and what takes the place of those that cannot be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from vft.common.types import Batch, Document, Patches
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError
from vft.data.media.frame_cache import NO_CACHE, FrameCache
from vft.data.packing import PackPlan, collate
from vft.data.quarantine import BadItem, BadItemLog
from vft.data.streaming.archives import ArchiveClip
from vft.data.streaming.stream import StreamedDocument, name_members
from vft.data.workers import WorkerPool

MAX_REPLACEMENTS = 100
"""Documents tried in place of one that cannot be decoded before its place is left empty."""


@dataclass(frozen=True)
class PendingDocument:
    """A document whose media are being decoded."""

    document: Document
    patches: list[Future[Patches]]
    """None if a medium is known to be bad."""
    number: int | None = None
    """In the index; None: out of a stream."""
    clip: ArchiveClip | None = None
    source: str = ""
    """The streaming source that it comes from."""

    @property
    def pixel_bytes(self) -> int:
        """Bytes of its patches once they are decoded, at most: two frames a temporal patch."""
        return sum(plan.grid_thw[0] * plan.height * plan.width * 6 for plan in self.document.media)


class Decoder:
    """Starts decoding documents and waits for them."""

    def __init__(self, dataset: Dataset, plan: PackPlan, pool: WorkerPool, bad: BadItemLog) -> None:
        self.dataset, self.plan, self.pool, self.bad = dataset, plan, pool, bad
        self._frames = FrameCache.of(dataset.config)

    def begin(self, number: int) -> PendingDocument:
        """Build a document of the index and start decoding its media."""
        document = self.dataset.build(number)
        return PendingDocument(document, self._submit(document, self._frames), number)

    def begin_streamed(self, streamed: StreamedDocument, source: str) -> PendingDocument:
        """Start decoding the media of a document out of a stream."""
        patches = self._submit(streamed.document, NO_CACHE, source)
        return PendingDocument(streamed.document, patches, clip=streamed.clip, source=source)

    def _submit(self, document: Document, frames: FrameCache, source: str = "") -> list[Future[Patches]]:
        if self.bad.agreed(document, source) is not None:
            return []
        return [frames.submit(self.pool, plan, self.dataset.encoder.processor) for plan in document.media]

    def finish(self, documents: Sequence[PendingDocument], epoch: int) -> Batch:
        """Wait for the documents of a pack. One of the index that cannot be decoded is replaced by another that is no
        longer, chosen by the plan."""
        ready = []
        for pending in documents:
            document, patches = pending.document, self._wait(pending)
            if pending.clip is not None:
                pending.clip.release()
            if patches is None and pending.number is not None:
                for attempt in range(MAX_REPLACEMENTS):
                    other = self.plan.replacement(pending.number, epoch, attempt)
                    if other is None:
                        break
                    replacement = self.begin(other)
                    document, patches = replacement.document, self._wait(replacement)
                    if patches is not None:
                        break
            if patches is not None:
                ready.append((document, patches))
        return collate(ready, self.dataset.encoder.processor)

    def _wait(self, pending: PendingDocument) -> list[Patches] | None:
        """None, and an entry in the log, if a medium cannot be decoded."""
        document, source = pending.document, pending.source
        num_samples = len(document.sample_ids)
        if (known := self.bad.agreed(document, source)) is not None:
            self.bad.add_again(known, num_samples)
            return None
        failed: list[BadItem] = []
        patches = []
        for plan, future in zip(document.media, pending.patches, strict=True):
            try:
                patches.append(future.result())
            except MediaError as error:
                name = plan.ref.name
                lost = num_samples if source else max(1, self.dataset.samples_by_medium[name])
                # If several media fail, the samples are counted with the first one.
                samples, message = 0 if failed else lost, name_members(str(error), plan.ref)
                failed.append(BadItem(document.sample_ids[0], name, error.reason, message, samples, source))
        self.bad.add(failed)
        return None if failed else patches
