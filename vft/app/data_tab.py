"""The tab Data: what files of records hold, what is wrong with them, how a model sees them; to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from vft.app import draft, records
from vft.app.parts import Shared, told
from vft.app.workspace import Workspace
from vft.cli.predict import columns_of
from vft.common.errors import UserError
from vft.config.data import DataConfig, SourceConfig
from vft.config.run import Config
from vft.data import formats
from vft.data.detection import keys_of
from vft.recipes import TASKS

COLUMNS = ("video", "image", "question", "answer", "label", "system", "options", "id")
"""Names that the form has a field for; others are written as text."""
TRAIN, ALSO_TRAIN, EVALUATE = "train on it", "train on it, too", "evaluate with it"


@dataclass(frozen=True)
class _Fields:
    """The components that handlers of several sections read."""

    task: gr.Dropdown
    records: list[Any]
    """Those that `_read_form` takes, in its order."""


def build(shared: Shared) -> None:
    """The tab's components."""
    fields = _records_section(shared)
    begin = _samples_section(shared, fields)
    _settings_section(shared, fields, begin)


def _records_section(shared: Shared) -> _Fields:
    """Which records, how they are read, and what is found in them."""
    space = shared.space
    with gr.Row():
        root = gr.Textbox(_first_root(space), label="folder (data.root)", info="paths in records start here", scale=2)
        paths = gr.Dropdown(
            records.record_files_in(space, space.home / _first_root(space)),
            multiselect=True,
            allow_custom_value=True,
            label="files or folders of records",
            info="in that folder; others can be typed",
            scale=4,
        )
    with gr.Row():
        task = gr.Dropdown(list(TASKS), value="caption", label="task", info="what is to be learnt", min_width=120)
        kind = gr.Dropdown(
            [records.DETECTED, *formats.names()], value=records.DETECTED, label="format", info="of the records"
        )
        media = gr.Textbox(label="media folder", info="of their files, if not the folder itself; empty: looked for")
    with gr.Accordion("names of the columns or keys", open=False) as accordion:
        gr.Markdown("Where the file calls them otherwise: before the = vft's name, in the field the file's.")
        with gr.Row():
            columns = [
                gr.Dropdown([], value="", label=f"{name} =", allow_custom_value=True, min_width=140) for name in COLUMNS
            ]
        others = gr.Textbox(label="others, as NAME=KEY,...", info=f"also {', '.join(_other_columns())}")
    look = gr.Button("Read", variant="primary", elem_id="read")
    known = gr.HTML(elem_id="found")

    def files_in(folder: str) -> Any:
        return gr.Dropdown(choices=records.record_files_in(space, space.existing(folder or ".", "data.root")))

    def keys(folder: str, names: list[str]) -> list[Any]:
        data = records.data_of(space, folder)
        found = {key for name in names if space.path(data.root / name).exists() for key in keys_of(name, data)}
        return [gr.Dropdown(["", *sorted(found)]) for _ in columns]

    def read(task: str, *form: Any) -> list[Any]:
        data, sources = _read_form(space, *form)
        found = records.read(sources, data)
        facts, wrong = records.facts(found, data, task)
        samples = [sample for one in found for sample in one.samples]
        return [records.as_html(facts, wrong, samples[:3]), gr.Accordion(open=not samples or any(form[4:]))]

    fields = _Fields(task, [root, paths, kind, media, others, *columns])
    gr.on([*shared.shown, root.change], told(files_in), root, paths, show_progress="hidden")
    root.change(lambda: [], None, paths, show_progress="hidden")
    paths.change(told(keys), [root, paths], columns, show_progress="hidden")
    look.click(told(read), [task, *fields.records], [known, accordion])
    return fields


def _samples_section(shared: Shared, fields: _Fields) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Samples as a model sees them, and which clips can't be decoded. The model, and the recipe to begin with."""
    space = shared.space
    with gr.Row():
        models = _bases(space)
        model = gr.Dropdown(models, value=next(iter(models), ""), label="base model", allow_custom_value=True, scale=3)
        recipes = draft.recipes(space)
        first = "recipes/qwen2_5_vl_7b/caption.toml"
        recipe = gr.Dropdown(
            list(recipes),
            value=first if first in recipes else next(iter(recipes), None),
            label="begin with",
            info="while there are no settings yet (tab Train)",
            scale=2,
        )
    with gr.Row():
        shown = gr.Slider(1, 24, 4, step=1, label="samples to show")
        looked_at = gr.Number(200, label="of so many random ones", precision=0, minimum=1, min_width=120)
        show = gr.Button("Show as the model sees them", elem_id="show")
        decode = gr.Button("Decode all clips", elem_id="decode")
        stop = gr.Button("Stop", min_width=80)
    seen = gr.HTML(elem_id="seen")

    def config_of(task: str, model: str, text: str | None, recipe: str, *form: Any) -> Config:
        data, sources = _read_form(space, *form)
        changes = {"data.root": str(data.root), "data.sources": [records.table_of(one) for one in sources]}
        text = draft.changed(text or _recipe(space, recipe), {**changes, "task": task, "model.path": model})
        return draft.checked(space, text)

    def preview(shown: int, looked_at: float, *form: Any) -> str:
        return records.preview(config_of(*form), shown, int(looked_at or 1))

    def check(*form: Any) -> Iterator[str]:
        yield from records.decoded(config_of(*form))

    def bases() -> Any:
        return gr.Dropdown(choices=_bases(space)), gr.Dropdown(choices=[*draft.recipes(space)])

    form = [fields.task, model, shared.draft, recipe, *fields.records]
    gr.on(shared.shown, bases, None, [model, recipe], show_progress="hidden")
    show.click(told(preview), [shown, looked_at, *form], seen)
    running = decode.click(told(check), form, seen, show_progress="hidden")
    stop.click(lambda: "stopped", None, seen, cancels=running, show_progress="hidden")
    return model, recipe


def _settings_section(shared: Shared, fields: _Fields, begin: tuple[gr.Dropdown, gr.Dropdown]) -> None:
    """Take the records into the settings. `begin`: the model and the recipe of a run without settings."""
    space = shared.space
    with gr.Row():
        role = gr.Radio([TRAIN, ALSO_TRAIN, EVALUATE], value=TRAIN, label="use", scale=2)
        split = gr.Number(0.1, label="hold out", info="share of the media (eval.split); 0: none", step=0.01)
        use = gr.Button("Write to the settings", variant="primary", elem_id="use")

    def write(text: str | None, model: str, recipe: str, role: str, split: float, task: str, *form: Any) -> str:
        data, sources = _read_form(space, *form)
        if not (text or "").strip():
            text = draft.changed(_recipe(space, recipe), {"model.path": model} if model else {})
        text = with_sources(space, text or "", data, sources, role, split or 0.0, task)
        try:
            held_out = records.held_out_text(draft.checked(space, text))
        except UserError as error:
            gr.Warning(f"written to the settings, in which something else is wrong: {error}".replace("<", "&lt;"))
        else:
            gr.Info(f"written to the settings{held_out}; next: the tabs Plan and Train")
        return text

    use.click(told(write), [shared.draft, *begin, role, split, fields.task, *fields.records], shared.draft)


def with_sources(
    space: Workspace, text: str, data: DataConfig, sources: Sequence[SourceConfig], role: str, split: float, task: str
) -> str:
    """The settings with these sources to train on, or to evaluate with; `split` of the media are held out.

    UserError if sources that stay are relative to another folder.
    """
    tables = draft.tables(text)
    before, held_out = tables.get("data", {}), tables.get("eval", {}).get("sources", [])
    made = [records.table_of(one) for one in sources]
    is_same = space.path(before.get("root", ".")) == space.path(data.root)
    if role != TRAIN and not is_same and before.get("sources"):
        raise UserError(
            f"data.root = {str(data.root)!r}: the settings have {before.get('root', '.')!r}, and all sources need the "
            "same; choose a folder that holds both, or train on this alone"
        )
    changes: dict[str, Any] = {"data.root": str(data.root)}
    if role == EVALUATE:
        return draft.changed(text, changes | {"eval.sources": made, "eval.split": None})
    changes |= {"data.sources": [*(before.get("sources", []) if role == ALSO_TRAIN else []), *made], "task": task}
    # Held-out sources that are not in the new folder would only end the run.
    if split or not all((space.home / data.root / one.get("path", "")).exists() for one in held_out):
        changes["eval.sources"] = None
    return draft.changed(text, changes | {"eval.split": split or None})


def _read_form(
    space: Workspace, root: str, paths: list[str], kind: str, media: str, others: str, *columns: str
) -> tuple[DataConfig, list[SourceConfig]]:
    data = records.data_of(space, root)
    named = {name: key.strip() for name, key in zip(COLUMNS, columns, strict=True) if key and key.strip()}
    try:
        named |= columns_of(others or "")
    except ValueError as error:
        raise UserError(str(error)) from None
    return data, records.sources_of(space, data, paths or [], kind, (media or "").strip(), named)


def _recipe(space: Workspace, name: str) -> str:
    file = draft.recipes(space).get(name)
    if file is None:
        raise UserError("settings: there are none yet; choose a recipe to begin with")
    return file.read_text(encoding="utf-8")


def _bases(space: Workspace) -> list[str]:
    """Models, those that were made in runs last."""
    return sorted(space.models(), key=lambda name: name.startswith("runs/"))


def _first_root(space: Workspace) -> str:
    return "data" if (space.home / "data").is_dir() else "."


def _other_columns() -> list[str]:
    return sorted(formats.find("messages").columns - set(COLUMNS))
