"""Render the demo's data sets: moving shapes as H.264 clips or JPEG pictures, described in the layouts of others.

    python tools/demo_world/make_data.py KIND ROOT

| kind       | what is written under ROOT                                                                     |
|------------|------------------------------------------------------------------------------------------------|
| captions   | `0_30_s_demo/0_30_s_demo_cap_SPLIT.json`, LLaVA-Video-178K's layout                            |
| qa         | `0_30_s_demo/0_30_s_demo_{mc,oe}_SPLIT.json`, the same: multiple choice and open questions     |
| actions    | `SPLIT/LABEL/NNNNN.mp4`, a folder an action                                                    |
| scenes     | `{summarize,story}_SPLIT.jsonl`: clips of three or four scenes, with their times               |
| pictures   | `llava_instruct_demo_SPLIT.json` and `SPLIT/NNNNNNNNNNNN.jpg`, LLaVA-Instruct-150K's layout    |
| tags       | what the base model was first trained on: as captions, and `sentences.jsonl` without videos    |
| scene_tags | what it was trained on next: up to four scenes a clip, and more texts without videos           |

SPLIT is `train`, or `held_out` for combinations that training never shows. A held-out clip has a record for each right
answer: records that ask the same of the same clip are its references. A second call with the same settings finds the
work done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import demo_sets
import readings
import rendering
import words
import world


def fingerprint(kind: str, counts: dict[str, int]) -> dict[str, Any]:
    """What the files depend on: equal fingerprints mean equal files."""
    modules = (world.__file__, words.__file__, readings.__file__, demo_sets.__file__, rendering.__file__)
    sources = b"".join(Path(module).read_bytes() for module in modules)
    return {"kind": kind, "clips": counts, "sources_sha256": hashlib.sha256(sources).hexdigest()}


def make_data(kind: str, root: Path, counts: dict[str, int], processes: int) -> None:
    """Render all splits and write their records, unless they are there already."""
    # Written last, so that it exists only beside complete work.
    done_file = root / "made.json"
    made = fingerprint(kind, counts)
    if done_file.exists() and json.loads(done_file.read_text()) == made:
        print(f"{root}: {sum(counts.values())} {kind} are there")
        return
    contents = demo_sets.make(kind, root, counts)
    done_file.unlink(missing_ok=True)
    rendering.render_all(contents.jobs, processes)
    for name, text in contents.texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    done_file.write_text(json.dumps(made) + "\n")
    described = " and ".join(f"{count} {split.replace('_', '-')}" for split, count in counts.items())
    print(f"{root}: {described}, {kind}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(demo_sets.KINDS), help="which data set")
    parser.add_argument("root", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, metavar="N", help="clips to train on (default: the kind's own)")
    parser.add_argument("--held-out", type=int, metavar="N", help="held-out clips (default: the kind's own)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a core")
    args = parser.parse_args()
    kind = demo_sets.KINDS[args.kind]
    train = kind.train if args.train is None else args.train
    held_out = kind.held_out if args.held_out is None else args.held_out
    try:
        make_data(args.kind, args.root, {"train": train, "held_out": held_out}, max(1, args.processes))
    except (ValueError, OSError) as error:
        sys.exit(f"make_data.py: {error}")


if __name__ == "__main__":
    main()
