"""`README.md` beside an exported adapter or model: what it is, how good, how it was made, how others load it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from vft.files import replace_text
from vft.report.page import comparison, facts, read_run, sampling

LAYOUT = Path(__file__).with_name("card.md")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That `vllm serve --max-lora-rank` takes (vllm/config/lora.py, 0.11)."""


def write_card(folder: Path, target: Path, step: int, prompt: str) -> None:
    """Write `target/README.md` from what the run in `folder` has left so far. UserError where it can't be written."""
    run = read_run(folder)
    lora = run.config.get("lora")
    towers = sorted({name.partition(".")[0] for name in lora["targets"]}) if lora else []
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = environment.from_string(LAYOUT.read_text(encoding="utf-8")).render(
        base=run.config["model"]["path"],
        target=str(target),
        task=run.config["task"],
        step=step,
        prompt=prompt,
        version=version("vft"),
        frames=sampling(run.config["data"]["video"]),
        lora=lora,
        towers=towers,
        servable=towers in ([], ["language_model"]),
        max_rank=lora and next((rank for rank in VLLM_RANKS if rank >= lora["rank"]), lora["rank"]),
        tables=[table for table in comparison(run.evaluations) if table["title"] == "Scores"],
        facts=facts(run, None),
        sources=[f"{one['path']} ({one['format']}, weight {one['weight']:g})" for one in run.config["data"]["sources"]],
        settings=run.settings.strip(),
    )
    replace_text(target / "README.md", card)
