"""Data sets of another trainer as sources: those of a dataset_info.json, and ms-swift's names with subsets and numbers.

After LLaMA-Factory's `data/parser.py` and `data/loader.py`, and ms-swift's `dataset/dataset_syntax.py`.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from vft.cli.foreign.draft import Draft, as_list, plain
from vft.cli.foreign.files import LLAMA_FACTORY, near
from vft.common.errors import UserError
from vft.common.files import read_object
from vft.config.toml import OTHER_TRAINERS as TABLES
from vft.config.toml import show
from vft.data.formats.messages import Messages

Source = dict[str, Any]
"""Settings of a source. Its `path` is relative to the current folder here."""


def convert_data(draft: Draft) -> None:
    """`data.root`, `data.sources` and `eval.sources`. UserError if there is nothing to train on."""
    is_factory = draft.tool == LLAMA_FACTORY
    folder, from_folder = draft.text("dataset_dir") if is_factory else ("", "")
    media, from_media = draft.text("media_dir" if is_factory else "ROOT_IMAGE_DIR")
    given = {"data": draft.take("dataset"), "eval": draft.take("eval_dataset" if is_factory else "val_dataset")}
    if not as_list(given["data"][0]):
        raise UserError(f"{draft.file}: names no dataset to train on; only configurations of training are read")
    info = _dataset_info(draft, folder) if is_factory else {}
    hub, of_hub = draft.take("use_hf", "USE_HF")
    columns = [
        ("prompt" if role == "query" else str(role), column) for column, role in draft.table("columns")[0].items()
    ]
    sources: dict[str, list[tuple[Source, str]]] = {"data": [], "eval": []}
    for table, (names, origin) in given.items():
        for name in map(str, as_list(names)):
            source = (
                _from_info(draft, name, folder, info) if is_factory else _from_name(draft, name, columns, bool(hub))
            )
            sources[table] += [(source, f"{origin.partition(':')[0]}: {name}")] if source else []
    if not sources["data"]:
        raise UserError(f"{draft.file}: dataset: none that vft can read: write the records to a file, and name that")
    paths = [source["path"] for source, _ in sources["data"] + sources["eval"]]
    folders = [*([folder] if is_factory else map(os.path.dirname, paths)), *filter(None, [media])]
    root = _common(folders) if is_factory or all(map(os.path.isabs, folders)) else "."
    origins = [from_folder if is_factory else "media are looked for below it, too"]
    origins += [text for value, text in ((media, from_media), (hub, of_hub)) if value]
    draft.put("data.root", root, "; ".join(origins))
    of_take = _mix(draft, [source for source, _ in sources["data"]])
    for table, found in sources.items():
        for i, (source, name) in enumerate(found):
            source |= {"path": os.path.relpath(source["path"], root)}
            source |= {"media": os.path.relpath(media, root)} if media and os.path.relpath(media, root) != "." else {}
            for key, value in source.items():
                draft.put(f"{table}.sources.{i}.{key}", value, name + (of_take if key == "take" else ""))


def _common(folders: Iterable[str]) -> str:
    """The folder that holds all of them."""
    folders = list(folders)
    if any(map(os.path.isabs, folders)):
        folders = [os.path.abspath(folder) for folder in folders]
    return os.path.commonpath([os.path.normpath(folder) for folder in folders]) or "."


def _mix(draft: Draft, sources: Sequence[Source]) -> str:
    """Shares of the sources, and how many samples of each. Returns where a limit to these is from."""
    strategy, of_strategy = draft.take("mix_strategy")
    probabilities, origin = draft.take("interleave_probs", "interleave_prob")
    if probabilities is not None and "train.max_steps" in draft.lines and len(as_list(probabilities)) == len(sources):
        for source, share in zip(sources, as_list(probabilities), strict=True):
            source["share"] = plain(share)
    elif probabilities is not None:
        draft.lose(origin, "share of each source needs train.max_steps: set both")
    if strategy not in (None, "concat"):
        draft.lose(of_strategy, "records come once an epoch, or by share until train.max_steps")
    most, origin = draft.number("max_samples")
    most = int(most or 0)
    for source in sources if most else ():
        number = int(source.get("take", f"random:{most}").partition(":")[2])
        source["take"] = f"random:{number}" if number < most else f"first:{most}"
    return f"; {origin}" if most else ""


def _columns_draft(draft: Draft, name: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """`columns` of a source, of pairs of a role and the column elsewhere."""
    found: dict[str, str] = {}
    pairs = [(role, column) for role, column in pairs if column]
    for role, column in pairs:
        ours, *known = TABLES["columns"].get(role, "").split(" ")
        own_question = role == "query" and dict(pairs).get("prompt", "instruction") != "instruction"
        if ours in Messages.columns and (column not in known or own_question):
            found[ours] = str(column)
        elif column not in known:
            fix = f"call the key {known[0]!r} in the records" if known else "is not read"
            draft.lose(f"columns.{role} of {name}: {show(column)}", fix)
    return found


# --------------------------------------------------------------------------------------------------- LLaMA-Factory


def _dataset_info(draft: Draft, folder: str) -> dict[str, Any]:
    """The data sets that dataset_info.json describes."""
    path = near(draft.file, os.path.join(folder, "dataset_info.json"))
    if path is None:
        on_hub = folder == "ONLINE" or folder.startswith("REMOTE:")
        fix = "run this where LLaMA-Factory is run, or copy it beside the file"
        fix = "it is on a hub: fetch it, and name its folder as dataset_dir" if on_hub else fix
        raise UserError(
            f"{draft.file}: {folder}/dataset_info.json: no such file, and it says where the records are; {fix}"
        )
    return read_object(path)


def _from_info(draft: Draft, name: str, folder: str, info: dict[str, Any]) -> Source | None:
    """A data set as dataset_info.json describes it; None, and a line, if vft can't read it."""
    about = info.get(name)
    if not isinstance(about, dict):
        near_names = difflib.get_close_matches(name, info, n=1)
        meant = f"; did you mean {near_names[0]!r}?" if near_names else ""
        raise UserError(f"{draft.file}: dataset = {name}: is not in {folder}/dataset_info.json{meant}")
    hub = next((key for key in ("hf_hub_url", "ms_hub_url", "om_hub_url") if about.get(key)), None)
    if hub:
        path = os.path.join(folder, _on_hub(draft, name, str(about[hub]), folder, is_hf=hub == "hf_hub_url"))
    elif isinstance(about.get("file_name"), str):
        path = os.path.join(folder, about["file_name"])
    else:
        draft.lose(f"dataset: {name}", "is made by a script or in a cloud: write its records to a file, and name that")
        return None
    for tag, value in (about.get("tags") or {}).items():
        if value not in TABLES["tags"].get(tag, "").split() and tag not in ("observation_tag", "function_tag"):
            known = " or ".join(TABLES["tags"].get(tag, "role").split())
            draft.lose(f"tags.{tag} of {name}: {show(value)}", f"turns are told by {known} here")
    for key in ("subset", "split", "folder"):
        if about.get(key) not in (None, "train"):
            draft.lose(f"{key} of {name}: {show(about[key])}", "name the files of this part as path of the source")
    source: Source = {"format": "messages", "path": path}
    source |= {"take": f"random:{about['num_samples']}"} if about.get("num_samples") else {}
    columns = _columns_draft(draft, name, (about.get("columns") or {}).items())
    return source | ({"columns": columns} if columns else {})


def _on_hub(draft: Draft, name: str, address: str, folder: str, is_hf: bool) -> str:
    """The folder for a data set of a hub, and a line that says how to fetch it."""
    own = address.rpartition("/")[2]
    tool = (
        "hf download --repo-type dataset {} --local-dir {}"
        if is_hf
        else "modelscope download --dataset {} --local_dir {}"
    )
    command = tool.format(shlex.quote(address), shlex.quote(os.path.join(folder, own)))
    draft.lose(f"dataset: {name}", f"is on a hub, fetch it first: {command}")
    return own


# -------------------------------------------------------------------------------------------------------- ms-swift


def _from_name(draft: Draft, text: str, pairs: Sequence[tuple[str, str]], is_hf: bool) -> Source:
    """A data set as ms-swift names it: `[HF::|MS::]ID_OR_PATH[:SUBSET][#NUMBER]`; without a hub, of Hugging Face?"""
    name, _, number = text.partition("#")
    hub, name = re.fullmatch(r"(?:(HF|MS|hf|ms)::)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    is_file = bool(re.search(r"\.(jsonl?|csv|tsv|parquet|txt)$", name)) or os.path.exists(name)
    if is_file or os.path.isabs(name) or name.startswith("."):
        path = name
    else:
        address, _, subset = name.partition(":")
        path = os.path.join("data", _on_hub(draft, text, address, "data", hub.lower() == "hf" if hub else is_hf))
        if subset:
            draft.lose(f"subset of {text}", "name the files of this part as path of the source")
    source: Source = {"format": "messages", "path": path}
    source |= {"take": f"random:{number}"} if number.isdecimal() and int(number) else {}
    columns = _columns_draft(draft, text, pairs)
    return source | ({"columns": columns} if columns else {})
