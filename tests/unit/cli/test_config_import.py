"""`vft config import`: configurations of LLaMA-Factory and ms-swift become ours, and nothing is dropped silently."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import vft.data.formats as formats
from vft.adapters.targets import match_targets
from vft.cli import config
from vft.cli.foreign import settings
from vft.cli.foreign.files import LLAMA_FACTORY, MS_SWIFT, Foreign
from vft.config import run
from vft.config.toml import OTHER_TRAINERS as TABLES
from vft.config.toml import REASONS_ELSEWHERE as REASON_OF
from vft.data.records.foreign_records import ANSWERS, QUESTIONS, SYSTEMS
from vft.data.records.record import TURN_KEYS

if TYPE_CHECKING:
    from tests.helpers.tiny import Tiny

MOVING = Path("docs/use/moving.md").resolve()
KINDS = ("yaml", "bash", "python", "toml")

FACTORY: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset": "clips, chats",
    "output_dir": "saves/clips",
    "bf16": True,
}
INFO: dict[str, Any] = {
    "clips": {
        "file_name": "clips.json",
        "columns": {"prompt": "ask", "query": "more", "response": "said", "videos": "clip"},
    },
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "num_samples": 50,
        "columns": {"messages": "dialog", "videos": "videos", "tools": "tools"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"},
    },
    "hub": {"hf_hub_url": "someone/some_clips", "columns": {"videos": "video"}},
    "made": {"script_url": "made.py"},
}
SCRIPT = r"""#!/bin/bash
# this one doesn't continue \
n=4   # don't count the host's CPU
export FPS_MAX_FRAMES=24
echo swift sft --model nothing
NPROC_PER_NODE=$n \
MAX_PIXELS=${PIXELS:-401408} \
swift sft \
    --model Qwen/Qwen2.5-VL-3B-Instruct \
    --dataset 'my clips/train.jsonl#300' other.csv \
    --columns '{"text": "query",
                "label_text": "response"}' \
    --tuner_type lora --target_modules q_proj qkv \
    --freeze_vit false --vit_lr 2e-6 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps $(expr 32 / $n / 2) \
    --max_steps 500 --warmup_ratio=0.05 \
    --split_dataset_ratio 0.02 --eval_steps 100 \
    --hub_token hf_secret --attn_impl flash_attn --flux 3 > log.txt 2>&1
swift infer --model elsewhere
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))


def convert(text: str | dict[str, Any], *options: str, name: str = "their.yaml") -> tuple[run.Config, str]:
    """What a file becomes: the checked configuration, and the text."""
    Path(name).write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    Path("run.toml").unlink(missing_ok=True)
    config.main(["import", name, "--output", "run.toml", *options], "vft config")
    written = Path("run.toml").read_text()
    return run.load(Path("run.toml")), written


def refusal(text: str | dict[str, Any], capsys: pytest.CaptureFixture[str], name: str = "their.yaml") -> str:
    with pytest.raises(SystemExit) as stopped:
        convert(text, name=name)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and not Path("run.toml").exists()
    return line


def test_llama_factory(capsys: pytest.CaptureFixture[str]) -> None:
    Path("zero.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    given = FACTORY | {
        "eval_dataset": "hub",
        "eval_strategy": "steps",
        "eval_steps": 200,
        "media_dir": "media",
        "max_samples": 80,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": "2e-5",  # text in YAML, because there is no dot
        "num_train_epochs": 1.5,
        "lr_scheduler_type": "polynomial",
        "quantization_bit": 4,
        "pissa_init": True,
        "video_fps": 1.0,
        "deepspeed": "zero.json",
        "mask_history": True,
        "template": "qwen2_vl",
        "report_to": ["wandb", "swanlab"],
    }
    ours, text = convert(given, "--gpus", "8")
    assert ours.train.packs_per_step == 2 * 4 * 8 and ours.data.max_samples_per_pack == 1
    assert ours.train.learning_rate == 2e-5 and ours.train.epochs == 2 and ours.seed == 42
    assert ours.lora is not None and (ours.lora.rank, ours.lora.alpha, ours.lora.init) == (8, 16, "pissa_niter_16")
    assert ours.model.quantize == "nf4" and ours.parallel.offload == "frozen" and ours.log.wandb
    assert (ours.data.video.fps, ours.data.video.max_frames, ours.data.video.max_pixels) == (1.0, 128, 65536)
    assert ours.data.pack_tokens == 2048 and ours.checkpoint.every_steps == 500 and ours.checkpoint.keep_last == 0
    clips, chats = ours.data.sources
    assert (clips.path, clips.media, clips.take) == ("data/clips.json", "media", "first:80")
    assert clips.columns == {"question": "ask", "input": "more", "answer": "said", "videos": "clip"}
    assert (chats.path, chats.take, chats.columns) == ("data/chats.jsonl", "random:50", {"messages": "dialog"})
    assert ours.eval.every_steps == 200 and [source.path for source in ours.eval.sources] == ["data/some_clips"]
    lost = text.partition("# Not taken over")[2]
    for name in (
        "lr_scheduler_type",
        "mask_history",
        "template",
        "deepspeed",
        "swanlab",
        'columns.tools of chats: "tools": is not read',
        "assistant_tag",
    ):
        assert name in lost
    assert "hf download --repo-type dataset someone/some_clips --local-dir data/some_clips" in lost
    assert all(f"not taken over: {line[2:]}" in capsys.readouterr().err for line in lost.splitlines()[1:2])
    for line in text.splitlines():
        assert not re.match(r"\w+ = ", line) or "  # " in line, line


def test_ms_swift_command() -> None:
    ours, text = convert(SCRIPT, name="train.sh")
    assert ours.model.path == "Qwen/Qwen2.5-VL-3B-Instruct" and ours.train.packs_per_step == 2 * 4 * 4
    assert ours.lora is not None and ours.lora.dropout == 0.05 and ours.train.betas == (0.9, 0.95)
    assert ours.lora.targets == ("language_model.q_proj", "vision_encoder.qkv")
    assert ours.train.component_learning_rates == {"vision_encoder": 2e-6}
    assert ours.train.max_steps == 500 and ours.train.warmup_steps == 25
    first, second = ours.data.sources
    assert (first.path, first.take, second.path) == ("my clips/train.jsonl", "random:300", "other.csv")
    assert first.columns == {"question": "text", "answer": "label_text"}
    assert (ours.data.image.max_pixels, ours.data.video.max_frames) == (401408, 24)
    assert ours.data.video.max_pixels == 768 * 28 * 28  # of qwen-vl-utils
    assert ours.eval.split == 0.02 and ours.eval.every_steps == 100
    assert "flux: 3" in text and "hf_secret" not in text and "(not shown)" in text


def test_ms_swift_files() -> None:
    """Its YAML and JSON, the call of a file with options behind it, tokens as limits, several hosts."""
    given = {
        "model": "Qwen/Qwen3-VL-4B-Instruct",
        "dataset": ["/clips/a.jsonl", "/clips/b.jsonl"],
        "ENV": {"NFRAMES": "8"},
    }
    ours, _ = convert(given)
    assert (str(ours.data.root), [source.path for source in ours.data.sources]) == ("/clips", ["a.jsonl", "b.jsonl"])
    assert ours.data.video.frames == 8 and ours.data.video.fps is None and ours.train.packs_per_step == 16
    for dataset, root in (("/clips/a.jsonl", "/clips/raw"), ("a.jsonl", "raw")):
        (source,) = convert(given | {"dataset": dataset, "ROOT_IMAGE_DIR": root})[0].data.sources
        assert source.path == "a.jsonl" and source.media == "raw"
    Path("their.json").write_text(json.dumps(given | {"tuner_type": "full", "packing": True}))
    call = "NNODES=2 NPROC_PER_NODE=8 VIDEO_MAX_TOKEN_NUM=128 swift sft their.json --freeze_llm true --freeze_vit false"
    ours, text = convert(call, name="call.sh")
    assert ours.lora is None and ours.model.train == ("vision_encoder",) and ours.train.learning_rate == 1e-5
    assert ours.data.video.max_pixels == 128 * 32 * 32 and ours.data.max_samples_per_pack == 0
    assert ours.train.packs_per_step == 16
    assert "per_device_train_batch_size 1 x gradient_accumulation_steps 1 x 16 GPUs (NPROC_PER_NODE x NNODES)" in text


SWIFT = {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "dataset": "a.jsonl", "max_length": 4096}
LAYERS = ("q_proj", "up_proj", "qkv")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # ms-swift's names of layers are those of any component; LLaMA-Factory's only of those that are not frozen
        (
            SWIFT | {"target_modules": [*LAYERS]},
            {
                "lora.targets": (
                    *("language_model.q_proj", "language_model.up_proj"),
                    *("vision_encoder.up_proj", "vision_encoder.qkv"),
                )
            },
        ),
        (
            SWIFT | {"model": "Qwen/Qwen3-VL-4B-Instruct", "target_modules": ["up_proj", "linear_fc1"]},
            {"lora.targets": ("language_model.up_proj", "vision_encoder.linear_fc1", "projector.linear_fc1")},
        ),
        (
            FACTORY | {"lora_target": ",".join(LAYERS)},
            {"lora.targets": ("language_model.q_proj", "language_model.up_proj")},
        ),
        (
            FACTORY | {"lora_target": "qkv,q_proj", "freeze_vision_tower": False},
            {"lora.targets": ("language_model.q_proj", "vision_encoder.qkv")},
        ),
        (SWIFT | {"target_modules": ["all-linear", "lm_head"]}, {"lora.targets": ("language_model.*",)}),
        (
            FACTORY | {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
            {"lora.targets": ("language_model.*", "vision_encoder.*")},
        ),
        (
            FACTORY
            | {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
            | {"model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct"},
            {"lora.targets": ("language_model.*", "vision_encoder.*", "projector.*")},
        ),
        # an adapter is no reference, unless it is named as one
        (
            FACTORY | {"stage": "dpo", "adapter_name_or_path": "runs/a"},
            {"model.adapter": "runs/a", "objective.reference": "base"},
        ),
        (
            SWIFT | {"rlhf_type": "kto", "adapters": "runs/a", "ref_adapters": "runs/a"},
            {"model.adapter": "runs/a", "objective.reference": "start"},
        ),
        (
            SWIFT | {"rlhf_type": "dpo", "tuner_type": "full", "adapters": "runs/a"},
            {"model.adapter": "", "objective.reference": None},
        ),
        (SWIFT | {"rlhf_type": "orpo", "adapters": "runs/a"}, {"objective.reference": None}),
        # what is held out, and when it is asked
        (SWIFT | {"split_dataset_ratio": 0.1, "eval_strategy": "no"}, {"eval.split": None, "eval.every_steps": 0}),
        (SWIFT | {"split_dataset_ratio": 0.1, "val_dataset": "b.jsonl"}, {"eval.split": None, "eval.every_steps": 500}),
        (SWIFT | {"eval_dataset": "gsm8k", "eval_use_evalscope": True}, {"eval.sources": ()}),
        (FACTORY | {"val_size": 0.1}, {"eval.split": 0.1, "eval.every_steps": 0}),
        # lengths
        (SWIFT | {"max_epochs": 2, "num_train_epochs": 5}, {"train.epochs": 2}),
        (SWIFT | {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, {"train.warmup_ratio": None}),
        (SWIFT | {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9}, {"train.warmup_steps": 9}),
        (
            SWIFT | {"save_total_limit": -1, "save_strategy": "no"},
            {"checkpoint.keep_last": 0, "checkpoint.every_steps": 0},
        ),
        # the environment, as a table
        (
            SWIFT | {"model_kwargs": '{"fps_max_frames": 12, "max_pixels": 50176}'},
            {"data.video.max_frames": 12, "data.image.max_pixels": 50176},
        ),
        # thoughts
        (FACTORY | {"model_name_or_path": "Qwen/Qwen3.5-4B"}, {"data.learn_thought_tags": True}),
        (
            FACTORY | {"model_name_or_path": "Qwen/Qwen3.5-4B", "enable_thinking": False},
            {"data.learn_thought_tags": False},
        ),
        (
            FACTORY | {"model_name_or_path": "Qwen/Qwen3.5-4B", "template": "qwen3_5_nothink"},
            {"data.learn_thought_tags": False},
        ),
        (SWIFT | {"quant_bits": 4}, {"model.quantize": "none"}),
        (SWIFT | {"quant_bits": 4, "quant_method": "bnb"}, {"model.quantize": "nf4"}),
        (
            SWIFT | {"router_aux_loss_coef": 0, "logging_steps": 0.1},
            {"train.routing_loss": False, "log.every_steps": 1},
        ),
        (SWIFT | {"fsdp": "full_shard offload"}, {"parallel.offload": "frozen"}),
    ],
)
def test_meanings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    ours, _ = convert(given)
    assert {key: attrgetter(key)(ours) for key in expected} == expected


@pytest.mark.parametrize(
    ("script", "processes"),
    [
        ("torchrun --master_port 29500 --nproc_per_node=4 --nnodes 2 swift/cli/sft.py", 8),
        ("torchrun --nproc-per-node gpu /src/swift/cli/sft.py", 1),
        ("CUDA_VISIBLE_DEVICES=0,1 swift sft", 1),  # one process, with layers on both
        ("CUDA_VISIBLE_DEVICES=0,1 accelerate launch --config_file two.yaml --machine_rank 0 swift/cli/sft.py", 6),
        ("deepspeed --num_gpus 4 --hostfile hosts.txt swift/cli/sft.py", 4),
        ("CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train", 2),  # one process each
        ("FORCE_TORCHRUN=1 NNODES=2 NPROC_PER_NODE=4 llamafactory-cli train", 8),
    ],
)
def test_launchers(script: str, processes: int) -> None:
    Path("two.yaml").write_text("num_machines: 2\nnum_processes: 6\nfsdp_config: {fsdp_offload_params: true}")
    model = (
        "--model_name_or_path a/Qwen3-VL-4B --dataset clips" if "llama" in script else "--model ./m --dataset a.jsonl"
    )
    size = "--per_device_train_batch_size 3 --gradient_accumulation_steps 5"
    ours, text = convert(f"{script} {model} {size}", name="train.sh")
    assert ours.train.packs_per_step == 15 * processes
    assert ours.parallel.offload == ("frozen" if "two.yaml" in script else "none")
    for word in ("CUDA_VISIBLE_DEVICES", "config_file", "hostfile", "FORCE_TORCHRUN"):
        assert (word in text) == (word in script)


SHELL = r"""#!/bin/bash
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}" LD_LIBRARY_PATH=$CONDA_PREFIX/lib
export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
ROOT=${ROOT:=/clips}
MODEL=${MODEL:-${ROOT}/Qwen3-VL-4B}
python3 - "$MODEL" <<'PY' > log.txt
print("it isn't shell; swift sft --model nothing")
PY
[[ -f "$MODEL/config.json" ]] || { echo "no $MODEL ($(python -c "print('$MODEL')") samples)"; exit 1; }
DATA=(
    a.jsonl   # first
    'b c.jsonl'
)
ARGS=(--dataset "${DATA[@]}" --max_length 512)
ARGS+=(--output_dir "runs/$(date +%s)")
NODE_RANK=$RANK ${SWIFT:-swift} sft --model "${MODEL}" "${ARGS[@]}" --max_steps "${MAX_STEPS:--1}" 2>&1 | tee log.txt
echo "it's done"
"""


def test_a_longer_script() -> None:
    """Lists, nested defaults, here-documents, and what is not set but not needed."""
    ours, text = convert(SHELL, name="train.sh")
    assert ours.model.path == "/clips/Qwen3-VL-4B" and ours.train.epochs == 3 and ours.train.packs_per_step == 16
    assert [source.path for source in ours.data.sources] == ["a.jsonl", "b c.jsonl"]
    assert ours.data.pack_tokens == 512 and str(ours.output_dir) == "runs/imported"
    lost = text.partition("# Not taken over")[2]
    for word in ("output_dir", "PYTHONPATH", "LD_LIBRARY_PATH", "NODE_RANK"):
        assert word in lost


def test_empty_and_joined_texts() -> None:
    """An empty text is a word, and pieces in quotes are one."""
    call = 'swift sft --model ./m --dataset "$B.jsonl" --system "$A" --prefix \'\' --max_steps 7'
    script = f'A="""two words"""\nB=x\'y z\'\n{call}'
    ours, text = convert(script, name="train.sh")
    assert ours.train.max_steps == 7 and ours.data.sources[0].path == "xy z.jsonl" and 'system: "two words"' in text


def test_hubs() -> None:
    given = SWIFT | {"dataset": ["a/b", "MS::c/d"], "use_hf": True}
    lost = convert(given)[1]
    assert "hf download --repo-type dataset a/b" in lost and "modelscope download --dataset c/d" in lost


@pytest.mark.parametrize(
    ("given", "kind", "beta", "gamma", "rpo_alpha"),
    [
        ({"stage": "dpo", "pref_beta": 0.2, "pref_ftx": 0.5}, "dpo", 0.2, None, 0.5),
        ({"stage": "dpo", "pref_loss": "simpo"}, "simpo", 0.1, 0.5, 0.0),
        ({"stage": "kto", "kto_chosen_weight": 1.5, "pref_ftx": 0.5}, "kto", 0.1, None, 0.0),
        ({"rlhf_type": "orpo", "beta": 0.3}, "orpo", 0.3, None, 0.0),
        ({"rlhf_type": "simpo", "simpo_gamma": 0.7}, "simpo", 2.0, 0.7, 1.0),  # with the chosen answer's loss
        ({"rlhf_type": "dpo", "loss_type": ["ipo"]}, "ipo", 0.1, None, 0.0),
    ],
)
def test_preferences(given: dict[str, Any], kind: str, beta: float, gamma: float | None, rpo_alpha: float) -> None:
    base = {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "dataset": "pairs.jsonl"} if "rlhf_type" in given else FACTORY
    objective = convert(base | given)[0].objective
    assert objective is not None and (objective.kind, objective.strength) == (kind, beta)
    assert (objective.gamma, objective.rpo_alpha) == (gamma, rpo_alpha)
    assert objective.desirable_weight == given.get("kto_chosen_weight")


def test_the_records_are_read() -> None:
    """The samples of the imported sources are those of the files in the others' layout."""
    turns = [{"role": "user", "content": "<video>What now?"}, {"role": "bot", "content": "Rain."}]
    turns[1]["role"] = "assistant"
    Path("data/clips.json").write_text(
        json.dumps([{"ask": "What?", "more": "In short.", "said": "A dog.", "clip": ["1.mp4"]}])
    )
    Path("data/chats.jsonl").write_text(json.dumps({"dialog": turns, "videos": ["2.mp4"]}) + "\n")
    ours, _ = convert(FACTORY)
    texts = []
    for source in ours.data.sources:
        samples, bad = formats.read(source, ours.data)
        assert not bad
        texts += [
            [part if isinstance(part, str) else Path(str(part.path)).name for turn in s.turns for part in turn.parts]
            for s in samples
        ]
    assert texts == [["1.mp4", "What?\nIn short.", "A dog."], ["2.mp4", "What now?", "Rain."]]


def test_the_page_on_moving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configurations of docs/use/moving.md are one: those of LLaMA-Factory and ms-swift become that of vft."""
    page = MOVING.read_text(encoding="utf-8")
    block = {kind: re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0] for kind in KINDS}
    about = re.search(r"`(\{\"clips\".*?)` in `data/dataset_info.json`", page, re.DOTALL)
    assert about
    Path("data/dataset_info.json").write_text(about[1])
    ast.parse(block["python"])
    expected = run.load(tomllib.loads(block["toml"]))
    ours, _ = convert(block["yaml"], "--gpus", "2")
    assert run.differences(ours, expected, ()) == []
    assert capsys.readouterr().out.startswith("wrote run.toml, with what is not taken over at its end; next: ")
    ours, _ = convert(block["bash"], name="train.sh")
    assert capsys.readouterr().out.startswith("wrote run.toml; next: ")
    assert run.differences(ours, expected, ("data.root", "data.sources")) == []
    assert ours.data.root / ours.data.sources[0].path == Path("data/train.jsonl")


def test_columns_that_need_no_mention_are_known() -> None:
    """They are names that the reader of records knows by itself."""
    for role, known in {"prompt": QUESTIONS, "response": ANSWERS[0], "system": SYSTEMS, "messages": TURN_KEYS}.items():
        assert set(TABLES["columns"][role].split()[1:]) <= {*known}


@pytest.mark.parametrize(
    "base", [FACTORY, {"model": "Qwen/Qwen3.5-4B", "dataset": "a.jsonl", "freeze_vit": False, "freeze_aligner": False}]
)
def test_nothing_is_dropped(base: dict[str, Any]) -> None:
    """Every known name, and an unknown one, is told of in the file: as an origin or as not taken over."""
    tool = LLAMA_FACTORY if "stage" in base else MS_SWIFT
    numbers = {"NFRAMES": 6, "lora_dropout": 0.5, "dpo_label_smoothing": 0.1, "label_smoothing": 0.1, "pissa_iter": 8}
    numbers |= dict.fromkeys(("FPS_MAX_FRAMES", "video_maxlen", "VIDEO_MAX_TOKEN_NUM", "IMAGE_MAX_TOKEN_NUM"), 64)
    extra = {
        "quant_method": "hqq",
        "vit_lr": 1e-6,
        "aligner_lr": 1e-6,
        "pissa_convert": True,
        "strange": 5,
        "cpo_alpha": 0.5,
        "bf16": False,
    }
    numbers |= dict.fromkeys(("eval_steps", "adam_beta1", "NNODES", "NPROC_PER_NODE", "warmup_ratio", "val_size"), 0.5)
    extra |= dict.fromkeys(("eval_strategy", "save_strategy", "mix_strategy", "deepspeed", "media_dir"), "epoch")
    known = {name for names in TABLES["names"].values() for name in names.split()}
    known |= {name.replace("*", "one") for name in REASON_OF} - TABLES["allowed"].keys()
    for name, value in {
        **dict.fromkeys(known - base.keys() - {"model", "model_name_or_path"}, 1),
        **numbers,
        **extra,
    }.items():
        is_text = name in ("adapters", "adapter_name_or_path", "run_name", "output_dir")
        value = "runs/a" if is_text else 50_176 if "pixels" in name.lower() else value
        if "rslora" in name or "dora" in name:
            value = True
        text = config.to_toml(settings.convert(Foreign(tool, base | {name: value}), Path("their.yaml")))
        assert re.search(rf"# .*\b{name}\b", text), name
        assert not re.search(rf"default of {name}\b", text), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FACTORY | {"stage": "ppo"}, 'stage = "ppo" has no counterpart here; of its values sft, dpo, kto'),
        (FACTORY | {"finetuning_type": "freeze"}, "finetuning_type"),
        (FACTORY | {"model_name_or_path": "org/Llama-9-8B"}, "vft trains Qwen2.5-VL, Qwen3-VL"),
        (FACTORY | {"model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct-AWQ"}, "fewer bits"),
        (FACTORY | {"dataset": "clip"}, "dataset = clip: is not in data/dataset_info.json; did you mean 'clips'?"),
        (FACTORY | {"dataset": "made"}, "dataset: none that vft can read"),
        (FACTORY | {"dataset_dir": "else"}, "else/dataset_info.json: no such file"),
        (FACTORY | {"warmup_ratio": "much"}, 'warmup_ratio: "much": must be a number'),
        (FACTORY | {"learning_rate": -1}, "as our configuration: train.learning_rate = -1"),
        (FACTORY | {"freeze_language_model": True}, "everything is frozen"),
        (FACTORY | {"dataset": None, "infer_backend": "vllm"}, "names no dataset to train on"),
        (SWIFT | {"columns": "[1]"}, "must be a table of names"),
        (SWIFT | {"model_kwargs": "[" * 9999}, "must be a table of names"),
        (FACTORY | {"lora_target": "qkv"}, "lora.targets"),
        (FACTORY | {"lora_target": [{"a": 1}], "lora_rank": 0}, "lora.rank"),
        (FACTORY | {"dataset_dir": "REMOTE:a/b"}, "it is on a hub: fetch it"),
        (FACTORY | {"adapter_name_or_path": "a,b"}, "one adapter is gone on from"),
        (FACTORY | {"adapter_name_or_path": "a", "create_new_adapter": True}, "vft merge"),
        ({"train_dataset": "a.yaml", "model": "Qwen/Qwen3-VL-4B-Instruct"}, "LLaMA-Factory's v1 engine"),
        ({"model": "Qwen/Qwen3-VL-4B-Instruct", "tensor_model_parallel_size": 2}, "is of Megatron"),
        ("a: !!python/object/apply:os.mkdir ['made']\nmodel: x", "not YAML"),
        ("- a list", "no settings by name"),
    ],
)
def test_refused_in_one_line(given: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(given, capsys)
    assert message in line and "their.yaml" in line and not Path("made").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("megatron sft --model a/b", "Megatron's are not"),
        ("swift sft --model 'a", "not a shell script"),
        ("swift sft --model $BASE --dataset a.jsonl", 'model = "$BASE": is not set in the file'),
        ("swift sft --model Qwen/Qwen3-VL-4B-Instruct --dataset $(touch made).jsonl", "is not set in the file"),
        ("swift sft --dataset a.jsonl", "names no model"),
        ("swift sft gone.yaml", "gone.yaml: no such file"),
        ("NNODES=$WORLD_SIZE swift sft --model ./m --dataset a.jsonl", 'NNODES = "$WORLD_SIZE": is not set'),
        ("swift pt --model ./m --dataset a.jsonl", "`swift pt`"),
        ("a=xxxxxxxxxx\n" + "a=$a$a$a$a\n" * 10 + "swift sft --model $a", "characters"),
        ("swift rlhf --rlhf_type grpo --model Qwen/Qwen3-VL-4B-Instruct", "grpo"),
    ],
)
def test_scripts_refused(script: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(script, capsys, name="train.sh") and not Path("made").exists()


def test_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed without --output; a file that exists is kept; texts of any kind stay within their line."""
    odd = FACTORY | {"output_dir": 'a"\n[model]\nx\u2028\x7f', "note": "b\n[lora]"}
    Path("their.yaml").write_text(yaml.safe_dump(odd))
    config.main(["import", "their.yaml"], "vft config")
    assert tomllib.loads(capsys.readouterr().out)["output_dir"] == odd["output_dir"]
    Path("run.toml").write_text("mine")
    with pytest.raises(SystemExit):
        config.main(["import", "their.yaml", "--output", "run.toml"], "vft config")
    assert Path("run.toml").read_text() == "mine" and "exists" in capsys.readouterr().err


def test_layers_are_those_of_the_model(family: str, each_tiny: Tiny) -> None:
    """Names of layers that are told apart by component are all that the vision encoder has, and are found."""
    (known,) = (table for pattern, table in TABLES["layers"].items() if re.search(pattern, family))
    patterns = [f"{component}.{name}" for component, names in known.items() for name in names.split()]
    patterns += [f"language_model.{name}" for name in settings.LANGUAGE_LAYERS if "moe" not in family]
    model = each_tiny.ours()
    match_targets(model, patterns)
    layers = match_targets(model, ["vision_encoder.*"])["vision_encoder.*"]
    assert {layer.rpartition(".")[2] for layer in layers} == {*known["vision_encoder"].split()}
