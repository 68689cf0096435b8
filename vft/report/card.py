"""`README.md` beside an exported adapter or model: what it is, how good, how it was made, how others load it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from vft.files import replace_text
from vft.report.page import comparison, facts, how_often, read_run, sampling
from vft.serving import not_served, vllm_serve

LAYOUT = Path(__file__).with_name("card.md")


def write_card(folder: Path, target: Path, step: int, prompt: str) -> None:
    """Write `target/README.md` from what the run in `folder` has left so far. UserError where it can't be written."""
    run = read_run(folder)
    lora = run.config.get("lora")
    base, video = run.config["model"]["path"], run.config["data"]["video"]
    # PiSSA's adapter is written with twice the rank.
    served = ("", 0) if lora is None else (str(target), lora["rank"] * (1 if lora["init"] == "kaiming" else 2))
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = environment.from_string(LAYOUT.read_text(encoding="utf-8")).render(
        base=base,
        target=str(target),
        task=run.config["task"],
        step=step,
        prompt=prompt,
        version=version("vft"),
        frames=sampling(video),
        lora=lora,
        not_served=not_served(lora) if lora else "",
        serve=vllm_serve(base if lora else str(target), video, *served),
        tables=[table for table in comparison(run.evaluations) if table["title"] == "Scores"],
        facts=facts(run, None),
        sources=[f"{one['path']} ({one['format']}, {how_often(one)})" for one in run.config["data"]["sources"]],
        settings=run.settings.strip(),
    )
    replace_text(target / "README.md", card)
