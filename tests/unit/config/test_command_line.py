"""A mistake on the command line is one line, with the option, setting or argument that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.main import run_main
from vft.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("finetune caption c.toml", "did you mean `vft train`?"),
        ("eval c.toml", "did you mean `vft evaluate`?"),
        ("train", "CONFIG.toml missing; `vft train --help` says what each is"),
        ("train caption", "CONFIG.toml missing: vft train caption CONFIG.toml"),
        ("train c.toml caption", "caption: the task comes first: vft train TASK c.toml"),
        ("train --config c.toml", "vft train has no option --config; CONFIG.toml is given without one"),
        ("train qa c.toml --dryrun", "vft train has no option --dryrun; did you mean --dry-run?"),
        ("train qa c.toml --train.max_steps 3", "without dashes, with =: train.max_steps=3"),
        ("train qa c.toml --lora_rank=8", "without dashes, with =: lora.rank=8"),
        ("train qa c.toml --learning_rate --dry-run", "without dashes, with =: train.learning_rate=VALUE"),
        ("train qa c.toml --gpus 2", "no option --gpus; the launcher says it: torchrun --nproc-per-node N"),
        ("train qa c.toml --strange 2", "it has --help, --dry-run; settings are given without dashes"),
        ("predict --model m", "VIDEO missing;"),
        ("predict --lora a clip.mp4", "no option --lora; did you mean --adapter?"),
        ("predict --model m --max_new_tokens 3 clip.mp4", "did you mean --max-new-tokens?"),
        ("predict --model m --video clip.mp4", "VIDEO is given without one"),
        ("predict --model m clip.mp4 --prompt", "--prompt: needs a value"),
        ("predict --model m --device cuda clip.mp4", "no option --device; it has --help, --model,"),
        ("merge --model m --adapter a --output o", "no option --model; did you mean --base?"),
        ("download UCF-101", "SET = UCF-101: did you mean 'ucf101'? must be one of"),
        ("benchmark MVBench --model m", "did you mean 'mvbench'?"),
        ("settings train.learning_rate", "`vft settings train` has learning_rate"),
        ("doctor --processes x", "--processes: invalid int value: 'x'"),
        ("app extra", "unrecognized arguments: extra"),
    ],
)
def test_one_line_that_names_what_was_meant(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_main(main.main, capsys, *words.split())
    assert done.status == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "export {run} --output a.safetensors",
            "--output = a.safetensors: becomes a folder of files",
        ),
        ("inspect c.toml --output {run}/file", "is a file; name a folder"),
        ("evaluate c.toml --output x.csv", "--output = x.csv: becomes a folder of files; name it x"),
        ("export {run} --output x.zip", "name it x"),
        ("inspect c.toml --output x.html", "name it x"),
        ("live {run} --svg x.png", "--svg = x.png: is written as SVG; name it x.svg"),
        ("compare {run} --html x.pdf", "--html = x.pdf: is written as HTML; name it x.html"),
        ("predict --model m --table x.xlsx clip.mp4", "--table = x.xlsx: is written as CSV; name it x.csv"),
        ("predict --model m --adapter {run}/x.safetensors clip.mp4", "name the folder that holds it, {run}"),
        ("predict --model m --adapter {run} clip.mp4", "{run} is a model's folder, not an adapter's"),
        ("predict --model m https://a.org/clip.mp4", "is an address of the network; download it"),
        ("predict --model m --columns path=video clip.mp4", 'columns.path = "video": our name comes first'),
        (
            "predict --model m --prompt Who is it {run}/file",
            "is, it: no such file; a prompt of several words",
        ),
        ("predict --model m --adapter=~/none clip.mp4", "--adapter = {home}/none: no such folder"),
        ("predict --model {run}/none {run}/file", "--model = '{run}/none': no such folder"),
        ("chat --model {run}/none", "--model = '{run}/none': no such folder"),
        ("download ucf101 --root {run}/file", "--root = {run}/file: is a file; name a folder"),
        ("plan c.toml --gpus 1 --gpu T4", "for another give --gpu-memory-gib alone"),
    ],
)
def test_files_and_folders_of_another_kind(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("file", "x.safetensors", "config.json"):
        (tmp_path / name).touch()
    done = run_main(main.main, capsys, *words.format(run=tmp_path).split())
    assert message.format(run=tmp_path, home=Path.home()) in done.error
