"""`README.md` beside an exported adapter or model: what it is, how good, how it was made, how others load it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from vft.adapters.peft_format import recorded
from vft.common.files import replace_text
from vft.models.pretrained import Pretrained
from vft.reporting.run_report import comparison, facts, how_often, read_run, sampling
from vft.reporting.serving import components_of, not_served, ranks_of, vllm_serve

LAYOUT = Path(__file__).with_name("card.md")


def write_card(folder: Path, target: Path, step: int, checkpoint: Pretrained) -> None:
    """Write `target/README.md` from what the run in `folder` has left so far; `checkpoint` is its base.

    UserError where it can't be written.
    """
    run = read_run(folder)
    lora = run.config.get("lora")
    base, video = run.config["model"]["path"], run.config["data"]["video"]
    media = run.config["data"]["video"], run.config["data"].get("image", {})
    adapter = lora and {"path": str(target), "rank": ranks_of(lora), "components": components_of(lora)}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = environment.from_string(LAYOUT.read_text(encoding="utf-8")).render(
        base=base,
        target=str(target),
        task=run.config["task"],
        step=step,
        asked=recorded(target),
        version=version("vft"),
        frames=sampling(video),
        lora=lora,
        not_served=not_served(lora) if lora else "",
        serve=vllm_serve(
            base if lora else str(target), checkpoint.config.model_type, *media, checkpoint.weight_bytes, adapter
        ),
        tables=[table for table in comparison(run.evaluations) if table["title"] == "Scores"],
        facts=facts(run, None),
        sources=[f"{one['path']} ({one['format']}, {how_often(one)})" for one in run.config["data"]["sources"]],
        settings=run.settings.strip(),
    )
    replace_text(target / "README.md", card)
