#!/usr/bin/env python
"""Seconds and memory until a run knows its data: python tools/bench/startup.py [--records N --videos N] [--output FILE]

The records are as LLaVA-Video-178K has them: JSON lists in folders, seven or eight questions about each video, whose
path begins below the folder. The videos are empty files, and the media index knows them already. Each row of the table
is some processes of one host that start together, as torchrun starts them:

  bare     imports, the model's configuration and the tokenizer alone
  first    no plan is in the cache: one process makes it, the others wait
  warm     the plan is in the cache
  resume   as warm, in the middle of the second epoch

A start ends when the packs of the first step are planned and their documents are built. Memory is what a
process has for itself; pages of mapped files, which processes share and the system can take back, do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401
import pyarrow as pa
import pyarrow.parquet as pq
from measure import benchmark, in_new_process, report
from workload import open_random, settings

from vft.common.files import digest
from vft.config.data import DataConfig, SourceConfig
from vft.data.loader import Loader
from vft.data.media.index import SCHEMA
from vft.data.packing import Cursor
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel
from vft.models.flops import FlopCounter
from vft.preparation.documents import load_training
from vft.recipes.qa import QuestionAnswering

TEXT = (
    "a an the of in on with and then while person man woman child dog car ball kitchen street table "
    "holding walking cutting pouring running opens closes picks looks left right red blue white small "
    "large camera begins ends video"
)
FOLDERS = ("0_30_s_academic_v0_1", "30_60_s_academic_v0_1", "1_2_m_youtube_v0_1", "2_3_m_youtube_v0_1")
PACKS_PER_STEP = 16


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--way"]:  # a child process of `compare`
        measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    with benchmark(__doc__, add_arguments, repeats=1) as (options, folder):
        compare(options, options.world or folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--records", type=int, default=100_000, help="records (default 100000; the data set: 1300000)")
    parser.add_argument("--videos", type=int, default=13_700, help="videos (default 13700; the data set: 178000)")
    parser.add_argument("--workers", type=int, default=2, help="data.workers (default 2)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4], help="processes of a warm start (1 4)")
    parser.add_argument("--world", type=Path, help="folder for the records and the cache, kept; made if it is missing")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="which starts (default: all)")


WAYS = ("bare", "first", "warm", "resume")


def compare(options: argparse.Namespace, world: Path) -> None:
    """Time all ways and report."""
    if not (world / "data").exists():
        write_world(world, options.records, options.videos)
    rows = []
    for way in options.ways:
        for processes in [1] if way in ("bare", "first") else options.processes:
            for _ in range(options.repeats):
                if way == "first":
                    shutil.rmtree(world / "cache" / "plans", ignore_errors=True)
                child = partial(in_new_process, __file__, "--way", way, world, options.workers)
                with ThreadPoolExecutor(processes) as threads:
                    found = [one.result() for one in [threads.submit(child) for _ in range(processes)]]
                assert len({(one["digest"], one["ids"]) for one in found}) == 1, found
                rows.append(
                    {"start": way, "processes": processes, "seconds": max(one["seconds"] for one in found)}
                    | {"CPU s a process": max(one["cpu_s"] for one in found)}
                    | {"MiB a process": max(one["own_mib"] for one in found), "peak": max(one["peak"] for one in found)}
                    | {name: found[0][name] for name in ("documents", "digest", "ids")}
                )
    plans = sum(file.stat().st_size for file in (world / "cache").rglob("*") if file.is_file())
    report(f"Start with {options.records:,} records", rows, options, cache_bytes=plans)


# -------------------------------------------------------------------------------------------- in the child process


def measure(way: str, world: Path, workers: int) -> None:
    """Start once and print one line of JSON: seconds, own memory now and at most (MiB), digests of what is trained
    and of the ids of the first step."""
    sources = (SourceConfig(format="llava_video", path="records"),)
    data = DataConfig(
        root=world / "data", sources=sources, cache_dir=str(world / "cache"), workers=workers, pack_tokens=8192
    )
    config = settings("7b", data=data)
    prepared = open_random(config)
    encoder = prepared.encoder(data)
    found: dict[str, Any] = {"documents": 0, "digest": "", "ids": ""}
    began, cpu_began = time.perf_counter(), time.process_time()
    if way != "bare":
        documents = load_training(QuestionAnswering(), config, encoder)
        counter = FlopCounter(prepared.model, "none")
        costs = [counter.row(work.tokens, work.pairs, work.patches) for work in documents.work]
        plan = documents.pack_plan(seed=0)
        loader = Loader(documents, plan, WorkerPool(0, 1.0), DataParallel(), PACKS_PER_STEP, 8, None)
        loader.costs = costs
        if way == "resume":
            middle = len(plan.packs(1)) // 2
            loader.restore({"cursor": asdict(Cursor(1, middle, 0)), "streams": {}, "bad": []})
        taken = [documents.build(number) for one in loader.plan_step() for number in one.pack.documents]
        ids = [(one.sample_ids, one.ids_T.tolist()) for one in taken]
        found = {"documents": len(plan.lengths), "digest": documents.digest, "ids": digest(repr(ids))}
    found |= {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
    print(json.dumps({**found, "own_mib": status_mib("RssAnon", "RssShmem"), "peak": status_mib("VmHWM")}))


def status_mib(*names: str) -> float:
    """Memory of this process by the kernel's count, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(names))


# ------------------------------------------------------------------------------------------------------- the records


def write_world(world: Path, records: int, videos: int) -> None:
    """Records, empty videos, and the media index of them."""
    draw = random.Random(0)
    root = world / "data"
    rows = []
    names: list[tuple[str, str]] = []
    for number in range(videos):
        folder = FOLDERS[number % len(FOLDERS)]
        name = f"academic_source/Charades/part_{number // 1000:03d}/{draw.getrandbits(40):010x}.mp4"
        file = root / "records" / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0")
        status = file.stat()
        frames = draw.randrange(150, 1500)
        rows.append(
            {"kind": "video", "path": str(file.resolve()), "size_bytes": status.st_size}
            | {"mtime_ns": status.st_mtime_ns, "deadline_s": 60.0, "height": 360, "width": 640, "num_frames": frames}
            | {"fps": 30.0, "stream_index": 0, "duration_s": frames / 30.0}
        )
        names.append((folder, name))
    (world / "cache").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), world / "cache" / "media.parquet")
    questions = records - records * 2 // 7
    kinds: dict[str, tuple[int, Callable[[random.Random], tuple[str, str]]]] = {
        "cap": (min(videos, records - questions), caption),
        "oe_v0_1_qa": (questions, open_question),
        "mc_v0_1_qa": (records - questions - min(videos, records - questions), choice),
    }
    for kind, (count, make) in kinds.items():
        by_folder: dict[str, list[Any]] = {folder: [] for folder in FOLDERS}
        for number in range(count):
            folder, name = names[number % videos]
            asked, answer = make(draw)
            turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
            record = {"id": f"{kind}-{number}", "conversations": turns, "data_source": folder, "video": name}
            by_folder[folder].append(record)
        for folder, own in by_folder.items():
            (root / "records" / folder / f"{folder}_{kind}_processed.json").write_text(json.dumps(own), "utf-8")


def text(draw: random.Random, fewest: int, most: int) -> str:
    """Some words."""
    return " ".join(draw.choices(TEXT.split(), k=draw.randint(fewest, most)))


def caption(draw: random.Random) -> tuple[str, str]:
    """A few prompts ask for all captions, which are long."""
    asked = draw.choice(["Please provide a detailed description of the video.", "What is happening in this video?"])
    return asked, text(draw, 100, 300)


def open_question(draw: random.Random) -> tuple[str, str]:
    """A question of a video's own."""
    return f"What is {text(draw, 4, 12)}?", text(draw, 5, 40)


def choice(draw: random.Random) -> tuple[str, str]:
    """A question with options."""
    options = "\n".join(f"{letter}. {text(draw, 3, 8)}" for letter in "ABCD")
    return f"What is {text(draw, 4, 12)}?\n{options}\nPlease respond with only the letter.", draw.choice("ABCD") + "."


if __name__ == "__main__":
    main()
