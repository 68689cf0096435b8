#!/usr/bin/env python
"""The README's tables of what trains on which card, by `vft plan`: python tools/bench/cards.py [MODEL ...]

Each cell is the recipe `qa.toml` of the model's family with rows of up to 8,192 tokens, on small cards 2,048. It says
how the weights are held and what the backward pass computes again. Nothing is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import in_venv  # noqa: F401

from vft.common.types import Batch
from vft.config import run as configs
from vft.preparation.planning import PRODUCT_SHARE, Memory, Planner, Search, Setting
from vft.preparation.synthetic import filled_row
from vft.training.losses import cross_entropy

Cards = tuple[tuple[int, int], ...]
RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = {
    "Qwen/Qwen3.5-2B": "qwen3_5_2b",
    "Qwen/Qwen3.5-4B": "qwen3_5_4b",
    "Qwen/Qwen3.5-9B": "qwen3_5_9b",
    "Qwen/Qwen3.5-27B": "qwen3_5_27b",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl_4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl_8b",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_30b_a3b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl_3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl_7b",
    "Qwen/Qwen2.5-VL-72B-Instruct": "qwen2_5_vl_72b",
    "llava-hf/LLaVA-NeXT-Video-7B-hf": "llava_next_video_7b",
}
"""The folder of the recipe by the model's name."""
CARDS = ((1, 24), (1, 48), (1, 80), (2, 80), (8, 80), (8, 192))
"""Number of GPUs, and GiB of each."""
SMALL_CARDS = ((1, 8), (1, 12), (1, 16))
TOKENS, FEW_TOKENS = 8192, 2048
"""Most tokens of a row, and on small cards."""


class Remembering(Planner):
    """Counts what does not depend on the card's memory once."""

    def memory(self, setting: Setting, row: Batch) -> Memory:
        """As `Planner.memory`."""
        known = self.__dict__.setdefault("known", {})
        key = setting.config.model_dump_json(include={"model", "parallel"}), setting.gpus
        if key not in known:
            known[key] = super().memory(setting, row).sizes
        return Memory(setting, known[key])


def lines(models: list[str], cards: Cards = CARDS, tokens: int = TOKENS) -> list[str]:
    """The rows of a table."""
    rows = []
    for model in models:
        overrides = [f"model.path={model}", f"data.pack_tokens={tokens}"]
        config = configs.load(RECIPES / MODELS[model] / "qa.toml", overrides)
        planner = Remembering(cross_entropy)
        row = filled_row(planner.model_of(config).processor, config.data)
        settings = [Setting(config, gpus, gib, 300, None, PRODUCT_SHARE) for gpus, gib in cards]
        cells = [cell(planner.search(setting, row)) for setting in settings]
        rows.append(f"| {short(model)} | {' | '.join(cells)} |")
    return rows


def short(model: str) -> str:
    """The name of a model in the table."""
    return model.partition("/")[2].removesuffix("-hf").removesuffix("-Instruct")


def cell(search: Search) -> str:
    """What is to be set for one model on some GPUs."""
    ways = []
    for memory in search.fitting:
        setting, parallel = memory.setting, memory.setting.config.parallel
        weights = "NF4" if setting.config.model.quantize == "nf4" else "offload" if parallel.offload != "none" else ""
        weights += " shards" if setting.gpus > 1 and setting.shards > 1 else ""
        ways.append(f"{weights or 'bf16'}, {parallel.activation_checkpointing}".strip())
    return " or ".join(ways) or "no"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    models = parser.parse_args().models or [*MODELS]
    if unknown := sorted(set(models) - set(MODELS)):
        parser.error(f"{unknown[0]}: must be one of {', '.join(MODELS)}")
    for cards, tokens in ((CARDS, TOKENS), (SMALL_CARDS, FEW_TOKENS)):
        names = [f"{gpus} x {gib} GiB" for gpus, gib in cards]
        print(f"| rows of {tokens:,} tokens | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", sep="\n")
        for model in models:
            row = lines([model], cards, tokens)
            if not row[0].endswith("no |" + " no |" * (len(cards) - 1)):
                print(*row, sep="\n", flush=True)
        print()


if __name__ == "__main__":
    main()
