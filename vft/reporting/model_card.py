"""`README.md` beside an exported adapter or model: what it is, how good, how it was made, how others load it.

`card.md` beside this module is its template.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from vft.adapters.peft_format import recorded
from vft.common.files import replace_text
from vft.models.pretrained import Pretrained
from vft.reporting.run_folder import read_run
from vft.reporting.run_report import facts, how_often, sampling
from vft.reporting.score_tables import score_tables
from vft.reporting.serving import components_of, not_served, ranks_of, vllm_serve
from vft.reporting.templates import render


def write_card(folder: Path, target: Path, step: int, checkpoint: Pretrained) -> None:
    """Write `target/README.md` from what the run in `folder` has left so far; `checkpoint` is its base.

    Raises UserError if the file can't be written.
    """
    run = read_run(folder)
    lora = run.config.get("lora")
    base, video, image = run.config["model"]["path"], run.config["data"]["video"], run.config["data"].get("image", {})
    adapter = lora and {"path": str(target), "rank": ranks_of(lora), "components": components_of(lora)}
    model = base if lora else str(target)
    card = render(
        "card.md",
        base=base,
        target=str(target),
        task=run.config["task"],
        step=step,
        asked=recorded(target),
        version=version("vft"),
        frames=sampling(video),
        lora=lora,
        not_served=not_served(lora) if lora else "",
        serve=vllm_serve(model, checkpoint.config.model_type, video, image, checkpoint.weight_bytes, adapter),
        tables=[table for table in score_tables(run.evaluations) if table["title"] == "Scores"],
        facts=facts(run, None),
        sources=[f"{one['path']} ({one['format']}, {how_often(one)})" for one in run.config["data"]["sources"]],
        settings=run.settings.strip(),
    )
    replace_text(target / "README.md", card)
