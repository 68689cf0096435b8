"""Archives of small clips, and loaders that read them in this process: what the tests of streams share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.clips import make_clip
from tests.helpers.tars import write_tar
from vft.common.types import Document
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset, load_dataset
from vft.data.loader import LoadedPack, Loader
from vft.data.packing import Cursor
from vft.data.quarantine import BadItem
from vft.data.streaming.archives import START, Position
from vft.data.streaming.stream import SlotStream, Streams
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.recipes.caption import Caption

MAKE = Caption().conversations
PE = {"format": "pe_video", "path": "pe", "stream": True}
LLAVA = {"format": "llava_video", "path": "llava", "stream": True}


@cache
def clip(frames: int = 8) -> bytes:
    """A small clip."""
    with tempfile.TemporaryDirectory() as folder:
        return make_clip(Path(folder) / "clip.mp4", range(frames), fps=4).read_bytes()


def damaged_clip() -> bytes:
    """One whose index is right and whose frames can't be decoded."""
    content = bytearray(clip())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = b"\xff" * length
    return bytes(content)


def pe_pair(name: str, content: bytes | None = None, **fields: Any) -> list[tuple[str, bytes]]:
    """A clip as PE-Video has it, captioned by its own name."""
    record = {"human_caption": f"Clip {name} is seen.", "category": "x", **fields}
    return [(f"{name}.mp4", clip() if content is None else content), (f"{name}.json", json.dumps(record).encode())]


def pe_shards(folder: Path, sizes: Sequence[int], suffix: str = ".tar") -> list[str]:
    """Archives of so many clips each, called `NNN-MM`; their names."""
    names = [[f"{shard:03d}-{number:02d}" for number in range(size)] for shard, size in enumerate(sizes)]
    for shard, members in enumerate(names):
        write_pairs(folder / f"{shard:03d}{suffix}", map(pe_pair, members))
    return [name for members in names for name in members]


def write_pairs(path: Path, pairs: Iterable[Iterable[tuple[str, bytes]]]) -> Path:
    """An archive of clips, each given by its members."""
    return write_tar(path, [member for pair in pairs for member in pair])


def llava_record(video: Any, number: int, **more: Any) -> dict[str, Any]:
    """A question about a video, as LLaVA-Video-178K has it; every third has a second turn."""
    turns = [
        {"from": "human", "value": f"<image>\nWhat of {number}?"},
        {"from": "gpt", "value": f"It is {number} {'very ' * (number % 4)}much."},
    ]
    if number % 3 == 2:
        turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    return {"id": f"q{number}", "conversations": turns, "data_source": "0_30_s_x", "video": video} | more


def data_config(root: Path, *sources: Mapping[str, Any], **more: Any) -> DataConfig:
    """`[data]` with these sources; the cache lies beside the data."""
    settings: dict[str, Any] = {
        "cache_dir": str(root.with_name(f"{root.name}-cache")),
        "pack_tokens": 400,
        "workers": 0,
        "max_bad_fraction": 1.0,
        "video": {"frames": 4, "max_pixels": 56 * 56},
    }
    return DataConfig.model_validate({"root": root, "sources": sources, **settings, **more})


def spools(config: DataConfig) -> list[Path]:
    """The copies of clips that lie about."""
    return [path for path in (config.cache_path / "stream").rglob("*") if path.is_file() and path.name != ".lock"]


# --------------------------------------------------------------------------------------------------- a slot alone


@contextmanager
def stream_context(config: DataConfig, encoder: ChatEncoder, slots: int, seed: int = 0) -> Iterator[Streams]:
    """What the streams of one process share."""
    with WorkerPool(0, 60.0) as pool, closing(Streams(config, MAKE, encoder, pool, slots, seed)) as streams:
        yield streams


def slot_stream(streams: Streams, slot: int, start: Position = START) -> SlotStream:
    """One slot's stream through the first source."""
    return SlotStream(streams.archives[0], slot, streams, start)


def one_epoch(stream: SlotStream, look: Callable[[Document], Any] = lambda document: document) -> list[Any]:
    """The documents of a slot's first epoch, or what `look` sees in them while their copies are there."""
    seen: list[Any] = []
    while True:
        pack = stream.next_pack()
        if pack.exhausted:
            return seen
        for one in pack.documents:
            if one.after.epoch:
                return seen
            seen.append(look(one.document))
            one.clip.release()


# ---------------------------------------------------------------------------------------------------- whole steps

Step = dict[int, tuple[tuple[str, ...], int, list[list[int]]]]
"""By slot: sample ids, digest, and the token ids, labels and positions of the row."""


class Run:
    """The loaders of `ranks` processes side by side, with what the trainer does between two steps."""

    def __init__(
        self, config: DataConfig, encoder: ChatEncoder, ranks: int, slots: int, prefetch: int, stack: ExitStack
    ) -> None:
        indexed = [source for source in config.sources if not source.stream]
        self.documents: Dataset = load_dataset(config, indexed, MAKE, encoder, seed=0)
        plan = self.documents.pack_plan(seed=0)
        self.streams: list[Streams | None] = []
        self.loaders: list[Loader] = []
        for rank in range(ranks):
            pool = stack.enter_context(WorkerPool(config.workers, 60.0))
            streams = None
            if config.streamed:
                streams = stack.enter_context(closing(Streams(config, MAKE, encoder, pool, slots, seed=0)))
            self.streams.append(streams)
            self.loaders.append(
                Loader(self.documents, plan, pool, DataParallel(rank, ranks), slots, prefetch, None, streams)
            )

    def step(self) -> Step:
        """The rows of all processes; what one found bad is then known to all."""
        packs: list[LoadedPack] = [pack for loader in self.loaders for pack in loader.step()]
        self.reports = [loader.bad.report for loader in self.loaders]
        for loader in self.loaders:
            loader.bad.merge(self.reports)
        assert len({loader.cursor for loader in self.loaders}) == 1
        return {pack.slot: (pack.batch.sample_ids, pack.digest, _row(pack)) for pack in packs}

    def steps(self, count: int) -> list[Step]:
        """Several."""
        return [self.step() for _ in range(count)]

    def nothing(self) -> str:
        """The error of the streams that have nothing for a row."""
        (source,) = {source for report in self.reports for source in report.exhausted}
        streams = self.streams[0]
        assert streams is not None
        return str(streams.nothing_in(source, self.bad, sum(loader.num_streamed[source] for loader in self.loaders)))

    @property
    def bad(self) -> list[BadItem]:
        """What has been found bad, the same in every process."""
        known = [sorted(loader.bad.known.values(), key=lambda item: item.key) for loader in self.loaders]
        assert all(one == known[0] for one in known)
        return known[0]

    def state(self) -> str:
        """What a checkpoint holds of the data, as JSON."""
        positions = {name: list(at) for loader in self.loaders for name, at in loader.positions.items()}
        cursor = self.loaders[0].cursor
        state = {**self.loaders[0].state(), "cursor": [cursor.epoch, cursor.pack, cursor.step]}
        return json.dumps({**state, "streams": positions})

    def seek(self, state: str) -> None:
        """Go on from there."""
        for loader in self.loaders:
            kept = json.loads(state)
            loader.restore({**kept, "cursor": asdict(Cursor(*kept["cursor"]))})


@contextmanager
def running(
    config: DataConfig, encoder: ChatEncoder, ranks: int = 1, slots: int = 2, prefetch: int = 3, state: str = ""
) -> Iterator[Run]:
    """A run, from its start or from a checkpoint on."""
    with ExitStack() as stack:
        run = Run(config, encoder, ranks, slots, prefetch, stack)
        if state:
            run.seek(state)
        yield run


def _row(pack: LoadedPack) -> list[list[int]]:
    batch = pack.batch
    return [batch.input_ids_T.tolist(), batch.labels_T.tolist(), *batch.positions_3T.tolist()]
