"""`log.profile_steps`: a trace of some steps by torch.profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch

from vft.config.run import LogConfig
from vft.distributed.process_group import World


class Profiler:
    """Records the steps `first` to `last` into `file`."""

    def __init__(self, file: Path, first: int, last: int) -> None:
        self.file, self.first, self.last = file, first, last
        self.profile: torch.profiler.profile | None = None

    @classmethod
    def of(cls, config: LogConfig, folder: Path, world: World) -> Profiler | None:
        """The profiler of this process; None if no steps are to be recorded."""
        steps = config.profile_steps
        return None if steps is None else cls(folder / "profile" / f"rank-{world.rank}.json.gz", *steps)

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self.first:
            self.profile = torch.profiler.profile()  # of the CPU, and of the GPU if there is one
            self.profile.start()

    def after(self, step: int) -> bool:
        """Call after each step. Returns whether the trace has been written."""
        if self.profile is None or step < self.last:
            return False
        self.profile.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.file))
        self.profile = None
        return True
