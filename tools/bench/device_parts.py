"""The parts of `device.py`: each is a function from a `Bench` to rows of a table.

A row has `what`, figures, and `wrong`: the bounds that do not hold, with both numbers, or an empty text.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from device_sizes import Size
from measure import DEVICE, WAITS, in_turns
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig
from workload import SHAPES, write_checkpoint, write_clips, write_records

from vft.common.device_specs import peak_flops
from vft.common.types import Segment, move
from vft.config import run as configs
from vft.config.data import DataConfig, SourceConfig, VideoConfig
from vft.config.run import CheckpointConfig, Config, LogConfig, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from vft.models.attention import attend, build_plan, check_kernel, document_segments, has_kernel, sdpa
from vft.models.decoder import head_width
from vft.models.delta_rule import TOLERANCE, has_fla, recurrence_of, results_of, trial_inputs
from vft.models.qwen3_5.model import rule_shape
from vft.models.released import RELEASED
from vft.preparation.memory import GIB

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace: what the device does."""
ATTENTION = 0.02
"""Largest difference from float64, of the largest value: bf16 has 8 bits."""
MEMORY = 0.05
"""How far a peak may be from its plan."""


class Failed(Exception):
    """A command of a part failed."""


@dataclass(frozen=True)
class Bench:
    """Where a part works, and how large everything is."""

    folder: Path
    """Of all parts."""
    size: Size
    launch: tuple[str, ...] = ()
    """Words before the programs that use the device; none: this Python."""
    eager: bool = False
    """Leave out what is compiled."""
    part: str = ""

    def of(self, part: str) -> Bench:
        """The same for a part."""
        return replace(self, part=part)

    @property
    def own(self) -> Path:
        """Folder of the part."""
        return self.folder / self.part

    @property
    def shared(self) -> Path:
        """Folder of what several parts use."""
        return self.folder / f"shared-{self.size.shape}"

    @property
    def launcher(self) -> list[str]:
        """The first words of a command that uses the device."""
        return list(self.launch) or [sys.executable]

    def rows_file(self, part: str) -> Path:
        """File of the rows that a part has found so far."""
        return self.folder / part / "rows.jsonl"

    def rows(self, part: str) -> list[Row]:
        """Those rows."""
        file = self.rows_file(part)
        return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []

    # ------------------------------------------------------------------------------------------------- commands

    def begin(self, *words: object, on_device: bool = True, processes: int = 1) -> subprocess.Popen[str]:
        """Start a program, as several processes of one run if there are to be more."""
        launcher = self.launcher if on_device else [sys.executable]
        if processes > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launcher = [*torchrun, "--no-python", *launcher]
        hidden = {} if on_device else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": search, **hidden}
        return subprocess.Popen(
            [*launcher, *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: object, on_device: bool = True, processes: int = 1) -> str:
        """Run a program. Returns what it printed; raises `Failed` with its last line."""
        process = self.begin(*words, on_device=on_device, processes=processes)
        printed, _ = process.communicate()
        if process.returncode:
            print(printed)  # into the part's log
            raise Failed("".join(printed.strip().splitlines()[-1:]) or f"status {process.returncode}")
        return printed

    @staticmethod
    def end(process: subprocess.Popen[Any]) -> None:
        """End a process that leads a group, and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def observed(self, folder: Path, task: str, config: Path, *settings: str) -> list[object]:
        """Words of a training command that notes what `observed.py` says in `folder`."""
        notes = ("--notes", folder / "notes.jsonl")
        return [TOOLS / "bench/observed.py", *notes, f"vft.recipes.{task}", config, *settings]


@dataclass(frozen=True)
class Run:
    """What a training run left."""

    folder: Path

    @property
    def steps(self) -> list[Row]:
        """The lines of metrics.jsonl."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").open(encoding="utf-8"))
        return [line for line in lines if "loss" in line]

    @property
    def scores(self) -> Row:
        """The line of the last evaluation."""
        lines = list(map(json.loads, (self.folder / "metrics.jsonl").open(encoding="utf-8")))
        return next((line for line in reversed(lines) if "loss" not in line), {})

    @property
    def losses(self) -> list[float]:
        """Of all steps."""
        return [line["loss"] for line in self.steps]

    @property
    def late(self) -> float:
        """Mean loss of the last quarter."""
        losses = self.losses
        return mean(losses[-max(1, len(losses) // 4) :])

    @property
    def notes(self) -> list[Row]:
        """What `observed.py` noted."""
        return [json.loads(line) for line in (self.folder / "notes.jsonl").open(encoding="utf-8")]


def at_most(name: str, found: float, limit: float) -> str:
    """Nothing, or what does not hold. NaN does not."""
    return "" if found <= limit else f"{name} {found:.4g}, at most {limit:.4g}"


def line(what: str, wrong: Iterable[str] = (), **figures: Any) -> Row:
    """A row."""
    return {"what": what, **figures, "wrong": "; ".join(filter(None, wrong))}


def relative(found: float, right: float) -> float:
    """Relative difference."""
    return abs(found - right) / abs(right) if isfinite(found) else float("inf")


# ------------------------------------------------------------------------------------------------------------ versions


def versions(bench: Bench) -> Iterator[Row]:
    """The device and its software, and what `vft doctor` finds."""
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "device": properties.name,
        "GiB": properties.total_memory / GIB,
        "devices": torch.cuda.device_count(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "",
        "ROCm": torch.version.hip or "",
        "Python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "bf16 TFLOP/s": (peak_flops(DEVICE) or 0) / 1e12,
    }
    yield from ({"table": "versions", **line(name, found=value)} for name, value in facts.items())
    process = bench.begin(TOOLS / "doctor.py", "--json", on_device=False)
    printed, _ = process.communicate()
    for finding in json.loads(printed):
        wrong = finding["fix"] if finding["status"] == "error" else ""
        yield {"table": "doctor", **line(finding["what"], [wrong], status=finding["status"], found=finding["found"])}


# -------------------------------------------------------------------------------------------------- attention's kernel


def kernel(bench: Bench) -> Iterator[Row]:
    """Attention of every shape that a family has, beside float64: output and gradients, eager and compiled."""
    dtype = torch.bfloat16
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_kernel(DEVICE, dtype)
    trouble = [str(one.message) for one in caught if "varlen" in str(one.message)]
    if not has_kernel(DEVICE, dtype) and not trouble:
        trouble = ["torch has no varlen attention"]
    yield line("the kernel's trial at the start of a run", trouble)
    ways: dict[str, Callable[..., Tensor]] = {"eager": attend}
    if not bench.eager:
        ways["compiled"] = torch.compile(attend, dynamic=True)
    for heads, key_heads, width, causal in sorted(attention_shapes()):
        for way, function in ways.items():
            errors = attention_errors(function, heads, key_heads, width, causal, bench.size.kernel_rows)
            wrong = [at_most(name, error, ATTENTION) for name, error in errors.items()]
            what = "decoder" if causal else "encoder"
            yield line(f"{what}, {heads} and {key_heads} heads of {width}, {way}", wrong, **errors)


def attention_shapes() -> set[tuple[int, int, int, bool]]:
    """Heads, heads of keys, width of a head, whether causal: of all released models."""
    shapes = set()
    for released in RELEASED.values():
        config = AutoConfig.for_model(**released)
        text, vision = config.text_config, config.vision_config
        shapes.add((text.num_attention_heads, text.num_key_value_heads, head_width(text), True))
        heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
        shapes.add((heads, heads, vision.hidden_size // heads, False))
    return shapes


def attention_errors(
    function: Callable[..., Tensor], heads: int, key_heads: int, width: int, causal: bool, rows: int
) -> dict[str, float]:
    """Largest differences from float64, of the largest value: of the output and of the gradients."""
    if causal:  # one question, and a video with several
        third = rows // 3
        segments = [*document_segments(0, third, [7]), *document_segments(third + 7, third, [9, 130, 64])]
    else:
        lengths = [64] * (rows // 256) + [rows // 2, 1, 17]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        segments = [Segment(start, length) for start, length in zip(starts, lengths, strict=True)]
    plan = move(build_plan(segments, causal), DEVICE)
    total = segments[-1].q_start + segments[-1].q_length
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)

    inputs = [random(total, count, width).requires_grad_() for count in (heads, key_heads, key_heads)]
    cotangent = random(total, heads, width)
    out = function(*inputs, plan)
    found = [out, *torch.autograd.grad(out, inputs, cotangent)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out64 = in_float64(exact, segments, causal)
    right = [out64, *torch.autograd.grad(out64, exact, cotangent.double())]
    names = ("output", "dq", "dk", "dv")
    pairs = zip(names, found, right, strict=True)
    return {name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def in_float64(inputs: Sequence[Tensor], segments: Iterable[Segment], causal: bool) -> Tensor:
    """Attention of queries, keys and values [T, H, K] by its definition, segment by segment."""
    q_THK, k_THK, v_THK = inputs
    repeats, parts = q_THK.shape[1] // k_THK.shape[1], []
    for one in segments:
        own = slice(one.q_start, one.q_start + one.q_length)
        before = slice(one.prefix_start, one.prefix_start + one.prefix_length)
        k, v = (
            torch.cat([x[before], x[own]]).repeat_interleave(repeats, 1, output_size=q_THK.shape[1])
            for x in (k_THK, v_THK)
        )
        scores = torch.einsum("qhk,lhk->hql", q_THK[own], k) / q_THK.shape[-1] ** 0.5
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(one.prefix_length)
            scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(torch.einsum("hql,lhk->qhk", scores.softmax(-1), v))
    return torch.cat(parts)


def recurrence(bench: Bench) -> Iterator[Row]:
    """The delta rule of every shape that a family has, in chunks and by fla's kernels, if they are installed: errors
    beside float64, and the time of forward and backward."""
    third, dtype = bench.size.kernel_rows // 3, torch.bfloat16
    segments = [*document_segments(0, third, [7]), *document_segments(third + 7, third, [9, 130, 64])]
    texts = [AutoConfig.for_model(**released).text_config for released in RELEASED.values()]
    for shape in sorted({rule_shape(text) for text in texts if hasattr(text, "linear_num_key_heads")}):
        inputs, plain = trial_inputs(segments, shape, dtype, DEVICE), recurrence_of(segments, 1, DEVICE)
        right = results_of([x.double() for x in inputs], plain)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            forms = {"chunks": plain}
            if has_fla(DEVICE, dtype, shape):
                forms["fla"] = recurrence_of(segments, 1, DEVICE, by_fla=True)
        works = {name: partial(results_of, inputs, form) for name, form in forms.items()}
        times = in_turns(works, 5 if bench.size.is_true else 1)
        what = "{} and {} heads of {} and {}".format(*shape)
        for name, work in works.items():
            pairs = zip(work(), right, strict=True)
            errors = [float((one.double() - r).norm() / r.norm()) for one, r in pairs]
            error = max(errors) if all(map(isfinite, errors)) else float("nan")
            wrong = [at_most("error", error, TOLERANCE)]
            yield line(f"{what}, {name}", wrong, error=error, ms=1000 * median(times[name]))
        trouble = [str(one.message) for one in caught if "fla's" in str(one.message)]
        if trouble or "fla" not in forms:
            yield line(f"{what}, fla's trial", trouble, found="" if trouble else "not installed")


def decoding(bench: Bench) -> Iterator[Row]:
    """Attention of one new token to all before it, as a 7B generates: by each backend of SDPA and as it is called."""
    keys, dtype, batch, calls = bench.size.decode_keys, torch.bfloat16, 8, 20 if bench.size.is_true else 1
    q = torch.randn(batch, 28, 1, 128, device=DEVICE).to(dtype)
    k, v = (torch.randn(batch, keys, 4, 128, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(2))
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=DEVICE)
    works: dict[str, Callable[[], object]] = {"as it is called": lambda: sdpa(q, k, v, mask)}
    refused = []
    for name, backend in SDPBackend.__members__.items():
        if name in ("ERROR", "OVERRIDEABLE"):
            continue

        def by_backend(backend: Any = backend) -> object:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, mask)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each reason to refuse is one
                by_backend()
            works[name.lower()] = by_backend
        except RuntimeError:
            refused.append(name.lower())

    def many(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                work()

        return run

    times = {n: median(t) / calls for n, t in in_turns({n: many(w) for n, w in works.items()}, 5, warm_up=2).items()}
    fastest = min(times.values())
    for name, seconds in times.items():
        wrong = [at_most("times the fastest", seconds / fastest, 1.5)] if name == "as it is called" else []
        yield line(name, wrong, ms=1000 * seconds, **{"GB/s": (k.nbytes + v.nbytes) / seconds / 1e9})
    for name in refused:
        yield line(name, ms="refuses")


# ---------------------------------------------------------------------------------------------------------- the demo


def demo_data(bench: Bench) -> Path:
    """Clips and captions of the demo."""
    folder = bench.shared / "demo"
    if not folder.exists():
        few = ("--train", 24, "--held-out", 4) if bench.size.demo_steps < 50 else ()
        bench.run(TOOLS / "demo_world/make_data.py", "captions", folder, *few, on_device=False)
    return folder


def demo_words(bench: Bench, name: str, steps: int, *settings: str) -> list[object]:
    """A run of the demo's caption recipe, with other settings."""
    few = ("data.max_samples_per_pack=4", "eval.max_new_tokens=4") if steps < 50 else ()
    given = (
        f"output_dir={bench.own / name}",
        f"data.root={demo_data(bench)}",
        f"data.cache_dir={bench.shared / 'cache'}",
        f"train.max_steps={steps}",
        f"train.warmup_steps={max(1, steps // 10)}",
        "eval.every_steps=0",
        *few,
        *settings,
    )
    (bench.own / name).mkdir(parents=True, exist_ok=True)
    return bench.observed(bench.own / name, "caption", ROOT / "recipes/demo/caption.toml", *given)


DEMO_SETTINGS = {
    "compiled": ("parallel.compile=true",),
    "nf4": ("model.quantize=nf4",),
    "offload": ("parallel.offload=frozen",),
    "recomputed": ("parallel.activation_checkpointing=full",),
}
FARTHER = {"nf4": 0.3}
"""Relative differences of the last losses that are not 5 %: the base is another."""


def demo(bench: Bench) -> Iterator[Row]:
    """The demo's captions in bf16, from training to scores; killed and resumed, and with each further setting."""
    steps, size = bench.size.demo_steps, bench.size
    every = max(1, steps // 4)
    usual = (
        f"train.precision={size.precision}",
        f"checkpoint.every_steps={every}",
        "parallel.compile=false",
        f"eval.every_steps={steps}",
    )
    began = time.perf_counter()
    bench.run(*demo_words(bench, "whole", steps, *usual))
    whole = Run(bench.own / "whole")
    score = next((value for name, value in whole.scores.items() if "cider" in name), None)
    low = [] if score is None else [at_most("minus CIDEr-D", -score, -size.demo_score)]
    falls = at_most("the last losses, of the first", whole.late / whole.losses[0], size.demo_falls)
    yield line("whole", [*low, falls], **demo_figures(whole, began), **{"CIDEr-D": score})
    for kind in size.demo_kinds:
        if kind == "compiled" and bench.eager:
            continue
        began = time.perf_counter()
        words = demo_words(bench, kind, steps, *usual, "eval.every_steps=0", *DEMO_SETTINGS.get(kind, ()))
        wrong = [killed(bench, words, bench.own / kind, every, whole)] if kind == "killed" else []
        bench.run(*words)
        run = Run(bench.own / kind)
        if kind == "killed":
            near = [relative(a, b) for a, b in zip(run.losses, whole.losses, strict=True)][: every + 5]
            wrong.append(at_most("losses until shortly after it resumed, relatively", max(near), 0.02))
        differs = relative(run.late, whole.late)
        wrong.append(at_most("the last losses beside the whole run's, relatively", differs, FARTHER.get(kind, 0.05)))
        yield line(kind, wrong, **demo_figures(run, began), differs=differs)


def demo_figures(run: Run, began: float) -> Row:
    """Seconds and losses."""
    rate = median(line["tokens_per_s"] for line in run.steps)
    losses = {"first loss": run.losses[0], "last losses": run.late}
    return {"seconds": time.perf_counter() - began, "tokens/s": rate, **losses}


def killed(bench: Bench, words: list[object], folder: Path, every: int, whole: Run) -> str:
    """Run until the first checkpoint, and kill. Returns what is wrong."""
    process = bench.begin(*words)
    checkpoint = folder / "checkpoints" / f"step-{every:06d}" / "manifest.json"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    over = process.poll() is not None
    process.kill()
    printed, _ = process.communicate()
    if over:
        print(printed)
    return "it ended before it could be killed" if over else ""


def same(bench: Bench) -> Iterator[Row]:
    """Losses in float32 on the device and on the CPU."""
    runs = []
    for name in ("device", "cpu"):
        words = demo_words(bench, name, bench.size.same_steps, "train.precision=fp32", "checkpoint.every_steps=0")
        bench.run(*words, on_device=name == "device")
        runs.append(Run(bench.own / name).losses)
    differences = [relative(a, b) for a, b in zip(*runs, strict=True)]
    yield line("first step", [at_most("relatively", differences[0], 1e-5)], differs=differences[0])
    yield line("all steps", [at_most("relatively", max(differences), 1e-3)], differs=max(differences))


def processes(bench: Bench) -> Iterator[Row]:
    """One process and one on each device, on the same packs: sharded, and each with the whole model."""
    count, steps = bench.size.processes or torch.cuda.device_count(), bench.size.same_steps
    runs = {}
    for name, number, shards in (("one", 1, 0), ("sharded", count, 0), ("replicas", count, 1)):
        settings = (f"train.packs_per_step={count}", "train.precision=fp32", f"parallel.shard={shards}")
        bench.run(*demo_words(bench, name, steps, *settings, "checkpoint.every_steps=0"), processes=number)
        runs[name] = run = Run(bench.own / name)
        differs = [relative(a, b) for a, b in zip(run.losses, runs["one"].losses, strict=True)]
        figures = {"processes": number, "ms a step": 1000 * median(one["step_time_s"] for one in run.steps)}
        wrong = [at_most("losses beside one process, relatively", max(differs), 1e-3)]
        yield line(name, wrong, **figures, differs=max(differs))
        if count == 1:
            return


def saves(bench: Bench) -> Iterator[Row]:
    """Checkpoints that are written while training goes on, each beside a copy made on the device when it began."""
    folder, size = bench.own, bench.size
    model = folder / "model"
    write_checkpoint(model, SHAPES[size.save_shape], torch.float32)
    config = timed_config(bench, model, records(bench, 1), "none", False)
    changes = {
        "output_dir": folder / "run",
        "lora": LoraConfig(rank=64),
        "train": config.train.model_copy(update={"max_steps": size.saves}),
        "checkpoint": CheckpointConfig(every_steps=1, keep_last=0),
        "log": LogConfig(),
    }
    words = bench.observed(folder, "qa", write_config(config.model_copy(update=changes), folder))
    bench.run(words[0], "--clones", folder / "clones", *words[1:])
    wrong = tensors = 0
    for clone in sorted((folder / "clones").iterdir()):
        saved = load_file(folder / "run/checkpoints" / clone.stem / "trainable.safetensors")
        right = load_file(clone)
        tensors += len(right)
        wrong += sum(not torch.equal(saved[name], values) for name, values in right.items())
    yield line(
        f"{size.saves} saves",
        [at_most("tensors that are not those of their step", wrong, 0), "" if tensors else "nothing was saved"],
        tensors=tensors,
        **{"ms a step": 1000 * median(one["step_time_s"] for one in Run(folder / "run").steps)},
    )


# -------------------------------------------------------------------------------------------------------- a true size


def checkpoint(bench: Bench) -> Path:
    """A model of the true size with random weights."""
    folder = bench.shared / "model"
    if not folder.exists():
        partial = bench.shared / "model.partial"
        write_checkpoint(partial, SHAPES[bench.size.shape], torch.bfloat16, 4 * GIB, DEVICE)
        partial.rename(folder)
        torch.cuda.empty_cache()
    return folder


def records(bench: Bench, questions: int) -> SourceConfig:
    """Videos of one size with `questions` each; 0: texts alone."""
    size, file = bench.size, bench.shared / f"records-{questions}.json"
    if not file.exists():
        bench.shared.mkdir(exist_ok=True)
        if questions:
            folder = bench.shared / "clips"
            clips = sorted(folder.glob("*.mp4")) or write_clips(folder, size.clips, size.side, size.side, size.frames)
            write_records(file, clips, questions, max(1, size.words // questions))
        else:
            # About two tokens a word, in the question and in the answer.
            text = " ".join(["red", "disc", "moves"] * (size.text_tokens // 13))
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            file.write_text(json.dumps([{"id": str(i), "messages": turns} for i in range(64)]), encoding="utf-8")
    return SourceConfig(format="llava_video" if questions else "messages", path=file.name)


def timed_config(
    bench: Bench, model: Path, source: SourceConfig, mode: str, compiled: bool, quantize: str = "none"
) -> Config:
    """A run whose steps are timed: one pack a step, the last step in a trace of the profiler."""
    size = bench.size
    steps = size.warm_up + size.steps + 1
    data = DataConfig(
        root=bench.shared,
        sources=(source,),
        pack_tokens=size.pack_tokens if source.format == "llava_video" else size.text_tokens,
        workers=max(1, min(8, len(os.sched_getaffinity(0)) - 1)),
        cache_dir=str(bench.shared / "cache"),
        video=VideoConfig(frames=size.frames, min_pixels=size.side**2, max_pixels=size.side**2),
    )
    return Config(
        output_dir=bench.own,
        model=ModelConfig.model_validate({"path": str(model), "quantize": quantize}),
        lora=LoraConfig(rank=16, dropout=0.0),
        data=data,
        train=TrainConfig.model_validate({"max_steps": steps, "packs_per_step": 1, "precision": size.precision}),
        parallel=ParallelConfig.model_validate({"activation_checkpointing": mode, "compile": compiled}),
        checkpoint=CheckpointConfig(every_steps=0),
        log=LogConfig(profile_steps=(steps, steps)),
    )


def write_config(config: Config, folder: Path) -> Path:
    """Write it as TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.toml"
    file.write_text(configs.dump(config), encoding="utf-8")
    return file


def timed(bench: Bench, what: str, config: Config) -> Row:
    """A row for a run of `timed_config`: speed, memory beside the plan, compiled graphs, waits, idle time."""
    folder, warm_up = bench.own / what.replace(", ", "-").replace(" ", "_"), bench.size.warm_up
    file = write_config(config.model_copy(update={"output_dir": folder}), folder)
    try:
        bench.run(*bench.observed(folder, "qa", file))
    except Failed as error:
        return line(what, [str(error)])
    run = Run(folder)
    steps, noted = run.steps[warm_up:-1], [note for note in run.notes if "step" in note]
    planned = next(note["planned"] for note in run.notes if "planned" in note)
    peak, recompiled = noted[-1].get("allocated", 0), noted[-1]["graphs"] - noted[warm_up - 1]["graphs"]
    busy = trace_figures(folder / "profile/rank-0.json.gz")
    waited = median(one["data_wait_s"] / one["step_time_s"] for one in steps)
    wrong = [
        at_most("peak, beside its plan, relatively", relative(peak, planned), MEMORY) if bench.size.is_true else "",
        at_most("graphs compiled after the first steps", recompiled, 0),
        at_most("waits a step", busy["waits"], 1),
        at_most("share of a step that waits for data", waited, 0.05) if bench.size.is_true else "",
    ]
    figures = {
        "tokens": median(one["tokens"] for one in steps),
        "step s": median(one["step_time_s"] for one in steps),
        "tokens/s": median(one["tokens_per_s"] for one in steps),
        "samples/s": median(one["samples_per_s"] for one in steps),
        "MFU": median(one["mfu"] or 0 for one in steps),
        "HFU": median(one["hfu"] or 0 for one in steps),
        "peak GiB": peak / GIB,
        "planned GiB": planned / GIB,
        "graphs": noted[-1]["graphs"],
        "recompiled": recompiled,
        **busy,
    }
    return line(what, wrong, **figures)


def trace_figures(file: Path) -> Row:
    """Of a trace: how often the CPU waited for the device, and the share of time in which the device did nothing."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        events: list[Mapping[str, Any]] = json.load(stream)["traceEvents"]
    # The profiler itself waits once, at its end.
    waits = max(0, sum(event.get("name") in WAITS for event in events) - 1)
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in ON_DEVICE)
    if not spans:
        return {"waits": waits, "idle": None}
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {"waits": waits, "idle": 1 - busy / (end - spans[0][0])}


def step(bench: Bench, mode: str, quantize: str = "none") -> Iterator[Row]:
    """Steps of a true size with a mode of recomputation, eager and compiled, with one question a video and more."""
    model = checkpoint(bench)
    for kind, compiled, questions in bench.size.kinds:
        if kind == mode and not (compiled and bench.eager):
            how = "compiled" if compiled else "eager"
            config = timed_config(bench, model, records(bench, questions), mode, compiled, quantize)
            yield timed(bench, f"{mode}, {how}, {questions} a video", config)


def nf4(bench: Bench) -> Iterator[Row]:
    """The same with weights of 4 bits."""
    model = checkpoint(bench)
    for compiled in (False,) if bench.eager else (False, True):
        config = timed_config(bench, model, records(bench, 1), "none", compiled, "nf4")
        yield timed(bench, f"nf4, {'compiled' if compiled else 'eager'}", config)


def text(bench: Bench) -> Iterator[Row]:
    """Rows of text alone."""
    config = timed_config(bench, checkpoint(bench), records(bench, 0), "none", not bench.eager)
    yield timed(bench, f"text of {bench.size.text_tokens}", config)


def fragmentation(bench: Bench) -> Iterator[Row]:
    """Rows of all lengths, of videos of all sizes, one after another: what the allocator holds beside the tensors."""
    size, file = bench.size, bench.shared / "random.json"
    model = checkpoint(bench)
    if not file.exists():
        clips, side = [], size.side
        for number, (height, width) in enumerate([(side, side), (side // 2, side), (side, side // 2)]):
            own = bench.shared / f"random-{number}"
            clips += write_clips(own, max(2, size.clips // 3), height, width, 2, longest=4 * size.frames)
        write_records(file, clips, 3, max(1, size.words // 4), mixed=True)
    source = SourceConfig(format="llava_video", path=file.name)
    config = timed_config(bench, model, source, "none", not bench.eager)
    video = VideoConfig(fps=8.0, min_frames=2, max_frames=2 * size.frames, max_pixels=size.side**2)
    data = config.data.model_copy(update={"video": video, "max_samples_per_pack": 6})
    train = config.train.model_copy(update={"max_steps": size.random_rows})
    config = config.model_copy(update={"data": data, "train": train, "log": LogConfig(), "output_dir": bench.own})
    bench.run(*bench.observed(bench.own, "qa", write_config(config, bench.own)))
    last = [note for note in Run(bench.own).notes if "step" in note][-1]
    tokens = [one["tokens"] for one in Run(bench.own).steps]
    wrong = [at_most("allocations that were tried again", last.get("retries", 0), 0)]
    if bench.size.is_true:
        wrong.append(at_most("held, of allocated", last["reserved"] / last["allocated"], 1.15))
    figures = {"tokens": f"{min(tokens)} to {max(tokens)}", "graphs": last["graphs"], "retries": last.get("retries")}
    sizes = {f"{name} GiB": last.get(name, 0) / GIB for name in ("allocated", "reserved")}
    yield line(f"{len(tokens)} random rows", wrong, **figures, **sizes)


def generation(bench: Bench) -> Iterator[Row]:
    """Seconds of a generated token: one question alone, and eight at once."""
    model, size = checkpoint(bench), bench.size
    records(bench, 1)
    clips = sorted((bench.shared / "clips").glob("*.mp4"))
    read = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    for count in (1, 8):
        notes = bench.own / f"notes-{count}.jsonl"
        words = ("--notes", notes, TOOLS / "predict.py", "--model", model, "--batch-size", count)
        asked = [clips[i % len(clips)] for i in range(count)]
        prompt = ("--prompt", "What happens?", "--max-new-tokens", size.new_tokens, "--precision", size.precision)
        bench.run(TOOLS / "bench/observed.py", *words, *prompt, "--frames", size.frames, *asked)
        found = [json.loads(text)["token_s"] for text in notes.open(encoding="utf-8") if "token_s" in text]
        seconds = [one for times in found for one in times]
        if not seconds:
            yield line(f"{count} at once", ["no answer is longer than a token"])
            continue
        token_s = median(seconds)
        figures = {"ms a token": 1000 * token_s, "tokens/s": count / token_s, "GB/s of weights": read / token_s / 1e9}
        yield line(f"{count} at once", passes=len(seconds), **figures)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "versions": versions,
    "kernel": kernel,
    "recurrence": recurrence,
    "decoding": decoding,
    "demo": demo,
    "same": same,
    "processes": processes,
    "saves": saves,
    "step-none": lambda bench: step(bench, "none"),
    "step-mlp": lambda bench: step(bench, "mlp"),
    "step-full": lambda bench: step(bench, "full"),
    "step-nf4": nf4,
    "text": text,
    "fragmentation": fragmentation,
    "generation": generation,
}
"""In the order in which a fault would be understood best."""
QUICK = [
    *("versions", "kernel", "recurrence", "decoding", "demo", "same", "processes", "saves", "step-none", "step-full"),
    "generation",
]
"""The essentials."""
