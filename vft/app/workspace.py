"""The folders that the page may read and write, and what lies in them: runs, models, adapters.

Whatever a browser sends names files through `Workspace.path`, and settings through `Workspace.check`: nothing outside
the chosen folders is read, no code that a setting names is imported, and nothing is sent anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vft.common.errors import UserError
from vft.config.run import Config

MAX_DEPTH = 5
"""Folders below a chosen one that are searched for runs and models."""
MAX_FOLDERS = 20_000
"""Searched in all, so that a page over a large disk still opens."""
SKIPPED = frozenset({"node_modules", "site-packages", "__pycache__", "checkpoints", "predictions", "scores", "tests"})


@dataclass(frozen=True)
class Workspace:
    """`folders` are absolute and resolved; the first is the current directory of all that the page does."""

    folders: tuple[Path, ...]
    is_online: bool = False
    """Whether models may be downloaded, archives be streamed from servers, and figures be sent to wandb."""

    @property
    def home(self) -> Path:
        """Relative paths start here, and new runs are written to `runs/` in it."""
        return self.folders[0]

    @property
    def own(self) -> Path:
        """Where the page keeps uploads, and what it started that is no run."""
        return self.home / ".vft-app"

    @property
    def described(self) -> str:
        """The folders, for messages."""
        return " and ".join(map(str, self.folders))

    def path(self, text: str | Path, what: str = "path") -> Path:
        """An absolute path in the chosen folders; symbolic links are followed first. It need not exist.

        Raises UserError if it is empty or leads out of them.
        """
        name = str(text).strip()
        if not name or "\0" in name or not is_text(name):
            raise UserError(f"{what}: is empty, or no text; name a file or folder in {self.described}")
        path = Path(os.path.realpath(self.home / os.path.expanduser(name)))
        if not any(path == folder or folder in path.parents for folder in self.folders):
            raise UserError(
                f"{what} = {name!r}: lies outside {self.described}; `vft app --folder DIR` adds a folder to the page"
            )
        return path

    def existing(self, text: str | Path, what: str = "path") -> Path:
        """The same of a file or folder that must be there; not a device or a pipe, whose reading may never end."""
        path = self.path(text, what)
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"{what} = {str(text).strip()!r}: there is no file or folder {path}")
        return path

    def run(self, text: str | Path) -> Path:
        """The folder of a run. UserError if it is none, or if a link in it leads out of the chosen folders: runs come
        from others, too, and their files are shown and written to."""
        folder = self.existing(text, "run")
        if not is_run(folder):
            raise UserError(f"run = {str(text)!r}: is no run's folder")
        for file in (*folder.glob("*"), *folder.glob("*/*")):
            if file.is_symlink():
                self.path(file, "link")
        return folder

    def shown(self, path: Path) -> str:
        """A path as settings write it: relative to `home`, if it lies in it."""
        return str(path.relative_to(self.home)) if self.home in path.parents else str(path)

    def check(self, config: Config, needs_model: bool = True) -> None:
        """UserError if a configuration reads or writes outside the folders, imports code, or goes to the network. A
        hub's model need not be here, if only its name is needed."""
        self.path(config.output_dir, "output_dir")
        root = self.path(config.data.root, "data.root")
        if config.data.cache_dir:
            self.path(config.data.cache_dir, "data.cache_dir")
        if config.model.adapter:
            self.path(config.model.adapter, "model.adapter")
        if needs_model or not self._is_hub_name(config.model.path):
            self.model(config.model.path)
        sources = {"data.sources": config.data.sources, "eval.sources": config.eval.sources}
        named = [("task", config.task or "")]
        for key, source in ((key, source) for key, group in sources.items() for source in group):
            named.append((f"{key}.format", source.format))
            if "://" not in source.path:
                self.path(root / source.path, f"{key}.path")
            elif not self.is_online:
                raise UserError(f"{key}.path = {source.path!r}: is on a server; `vft app --online` allows that")
            if source.media:
                self.path(root / source.media, f"{key}.media")
        for key, name in named:
            if ":" in name:
                raise UserError(f"{key} = {name!r}: is code of its own, which the page doesn't run; use `vft train`")
        if config.log.wandb and not self.is_online:
            raise UserError("log.wandb = true: sends figures to a server; `vft app --online` allows that")

    def model(self, name: str) -> str:
        """`name` of a base or merged model: a folder in the chosen ones, or a hub's model in this machine's cache.

        Raises UserError if it is neither; with `is_online` a hub's model may be one that has to be downloaded.
        """
        name = name.strip()
        is_hub_name = self._is_hub_name(name)
        if is_hub_name and not self.is_online and not _is_cached(name):
            raise UserError(
                f"model = {name!r}: is no folder in {self.home}, and was not downloaded; `hf download {name}` does, or "
                "`vft app --online`"
            )
        if not is_hub_name and not (self.existing(name, "model") / "config.json").is_file():
            raise UserError(f"model = {name!r}: the folder has no config.json; name that of a model")
        return name

    def _is_hub_name(self, name: str) -> bool:
        return name.count("/") == 1 and name[0] not in "./~" and not os.path.exists(self.home / name)

    def runs(self) -> list[Path]:
        """Folders of runs, the youngest first."""
        found = [folder for folder in self.walk() if is_run(folder)]
        return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)

    def models(self) -> list[str]:
        """Base and merged models in the folders, as `shown`."""
        found = (folder for folder in self.walk() if (folder / "config.json").is_file())
        return [self.shown(folder) for folder in found if any(folder.glob("*.safetensors"))]

    def adapters(self) -> list[str]:
        """Adapters in the folders, as `shown`: exported ones, and runs that have one in a checkpoint only."""
        return [self.shown(folder) for folder in self.walk() if (folder / "adapter_config.json").is_file()]

    def configurations(self) -> list[str]:
        """TOML files in the folders that are settings of a run, as `shown`; those of runs first."""
        files = (file for folder in self.walk() for file in sorted(folder.glob("*.toml")))
        found = [self.shown(file) for file in files if is_text(file.name) and self._has_settings(file)]
        return sorted(found, key=lambda name: not name.endswith(("/settings.toml", "/config.toml")))

    def _has_settings(self, file: Path) -> bool:
        with suppress(UserError, OSError), self.existing(file).open("rb") as stream:  # no pipes, nor links to elsewhere
            text = stream.read(20_000)
            return all(re.search(key, text, re.MULTILINE) for key in (rb"^output_dir\b", rb"^(\[model\]|model\b)"))
        return False

    def walk(self) -> Iterator[Path]:
        """The chosen folders and those below, each once; without hidden ones, those that can't be opened, and those
        whose names are no text."""
        seen: set[str] = set()
        for top in self.folders:
            for folder, names, _ in os.walk(top):
                depth = len(Path(folder).relative_to(top).parts)
                is_end = depth == MAX_DEPTH or folder in seen or len(seen) > MAX_FOLDERS
                wanted = (name for name in names if name not in SKIPPED and name[0] != "." and is_text(name))
                names[:] = [] if is_end else sorted(wanted)
                if folder not in seen and os.access(folder, os.R_OK | os.X_OK):
                    seen.add(folder)
                    yield Path(folder)


def _is_cached(hub_name: str) -> bool:
    with suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(hub_name, "config.json"), str)
    return False


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8, as those are that a browser can show and send back."""
    return name == name.encode(errors="ignore").decode()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, also of one that the page has just started."""
    return (folder / "job.json").is_file() or all((folder / name).is_file() for name in ("config.toml", "run.json"))
