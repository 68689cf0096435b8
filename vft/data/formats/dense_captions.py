"""Dense captions: all events of a video, each with its start and end in seconds and a sentence.

Files are as ActivityNet Captions has them, `{VIDEO: {duration, timestamps, sentences}}`, or hold records with `video`,
`timestamps` and `sentences`. `moments` reads the same files and asks when each sentence happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vft.common.event_times import write_events
from vft.data.formats.moments import Moments, events_of


class DenseCaptions(Moments):
    """One question for each video, which the task asks. Fields: `segments`, a tuple of (start_s, end_s, text)."""

    def records(self, entry: Any) -> Iterator[Any]:
        """The entry as it is."""
        yield entry

    def ask(self, record: dict[str, Any]) -> tuple[Sequence[str], str, dict[str, Any]]:
        """As `Moments.ask`."""
        events = events_of(record)
        return [], write_events(events), {"segments": events}
