"""Runs a sharded model in as many processes as the environment says; the tests start it.

Arguments: what to do (a function below), a base model, then its own, of which the last is a file for what was found.
`adapters` or `components` is what is trained.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.allocations import allocated_peak
from vft.adapters.lora import fill, initialise, is_adapter
from vft.adapters.targets import choose_trainable
from vft.common.task import Answer, Question
from vft.common.types import IGNORE_INDEX, Batch, Conversation, Document, MediaRef, Turn
from vft.config.data import DataConfig, VideoConfig
from vft.config.run import LoraConfig, ParallelConfig
from vft.data.chat import ChatEncoder
from vft.data.media.index import build as build_index
from vft.data.workers import WorkerPool
from vft.distributed.process_group import (
    DataParallel,
    World,
    all_of,
    environment,
    full_tensor,
    local_part,
    make_mesh,
    process_group,
)
from vft.inference import option_scores
from vft.inference.engine import Answerer
from vft.inference.generate import Sampling
from vft.models import build
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained
from vft.models.quantization import is_packed
from vft.models.weights import load_weights
from vft.parallel.parallelize import checkpoint_activations, materialise, parallelize
from vft.preparation.memory import run_step
from vft.preparation.synthetic import Video, row_of, text_document, video_document
from vft.training.losses import cross_entropy

TARGETS = {
    "adapters": ("language_model.*",),
    "components": ("language_model.*", "vision_encoder.*", "projector.*"),
}
PLAIN = ParallelConfig(shard=0, activation_checkpointing="none", compile=False)
WHOLE = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1, "c10d::allreduce_": 0}
"""Collectives, and which of their arguments is the whole tensor, not a shard."""


def share_out(
    model: VideoLanguageModel, lora: LoraConfig, world: World, parallel: ParallelConfig | None = None
) -> frozenset[str]:
    """Give a model on the meta device adapters, and shard it. Returns the names of the adapters' parameters."""
    choose_trainable(model, lora, ())
    parallel = parallel or PLAIN
    parallelize(model, make_mesh(world, parallel.shards(world.size)), parallel, model.compute_dtype, world.device)
    return frozenset(name for name, _ in model.named_parameters() if is_adapter(name))


def row_in(model: VideoLanguageModel, *documents: Document) -> Batch:
    """A row of documents, of words that every vocabulary has."""
    common = []
    for one in documents:
        ids_T = torch.where(one.media_mask_T, one.ids_T, one.ids_T % 50)
        labels_T = torch.where(one.labels_T == IGNORE_INDEX, IGNORE_INDEX, ids_T)
        common.append(replace(one, ids_T=ids_T, labels_T=labels_T))
    return row_of(model.processor, common)


# ------------------------------------------------------------------------------------------------------ scoring options


def scoring(base: str, questions: str, trained: str, output: str) -> None:
    """Answer and score each of the lists of questions in a JSON file, by name; the first process writes what each
    question got and how many options-passes each process had."""
    option_scores.MAX_ROWS = 64  # several chunks for few options
    world = environment()
    lists = {name: list(map(question_of, some)) for name, some in json.loads(Path(questions).read_text()).items()}
    checkpoint = Pretrained.open(base)
    model = build(checkpoint, torch.float32)
    config = DataConfig(video=VideoConfig(frames=4, max_pixels=56 * 56), workers=0)
    refs = [ref for asked in lists.values() for question in asked for ref in question.prompt.media]
    index = build_index(refs, config.cache_path, 0, config.decode_timeout_s, False)
    with process_group(world), WorkerPool(0, config.decode_timeout_s) as pool:
        lora = LoraConfig(rank=2, alpha=4, targets=TARGETS[trained])
        adapters = share_out(model, lora, world)
        model.to_empty(device=world.device)
        load_weights(model, checkpoint, adapters)
        initialise(model, seed=0)
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if is_adapter(name):
                generator = torch.Generator().manual_seed(number)
                fill(parameter, 0.3 * torch.randn(parameter.shape, generator=generator))
        encoder, part = ChatEncoder(checkpoint.tokenizer, model.processor), DataParallel(world.rank, world.size)
        answerer = Answerer(model, encoder, config, index.info, pool, world, part)
        passes: list[int] = []
        model.register_forward_pre_hook(lambda module, args: passes.append(args[0].num_targets))
        found = {}
        for name, asked in lists.items():
            passes.clear()
            answers = [one for one in answerer.answers(asked, Sampling(max_new_tokens=3), 2) if isinstance(one, Answer)]
            told = {answer.question.id: [answer.text, *answer.option_scores] for answer in answers}
            found[name] = {"answers": told, "passes": all_of(sum(map(bool, passes)))}
            drawn = answerer.answers(asked, Sampling(max_new_tokens=6, temperature=1.0, seed=3), 2)
            found[name]["drawn"] = [answer.text for answer in drawn if isinstance(answer, Answer)]
        if world.is_main:
            Path(output).write_text(json.dumps(found))


def question_of(one: dict[str, list[str]]) -> Question:
    """A question of its id, media and options."""
    media = [MediaRef("video" if path.endswith(".mp4") else "image", Path(path)) for path in one["media"]]
    prompt = Conversation(one["id"][0], (Turn("user", (*media, "What?")),), "q", tuple(one["options"]))
    return Question(one["id"][0], prompt, ())


# -------------------------------------------------------------------------------------------------------------- loading


class OwnMemory(threading.Thread):
    """The most memory of its own that this process has had, looked at a thousand times a second.

    Own are anonymous and shared pages. Those of files that safetensors has mapped aren't: all processes see one copy,
    in the system's cache, which takes it back when others need it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.now()
        self.done = threading.Event()

    def run(self) -> None:
        """Until `done`."""
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.now())

    def end(self) -> int:
        """Bytes beyond those at the start."""
        self.done.set()
        self.join()
        return max(self.peak, self.now()) - self.before

    @staticmethod
    def now() -> int:
        """Bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def loading(base: str, trained: str, output: str) -> None:
    """Load a checkpoint; write bytes of each process, wrong tensors and the loss of a row."""
    world = environment()
    checkpoint = Pretrained.open(base)
    model = build(checkpoint, torch.float32)
    with process_group(world):
        adapters = share_out(model, LoraConfig(rank=2, targets=TARGETS[trained]), world)
        memory = OwnMemory()  # all that loading needs is there, but for memory of the weights
        memory.start()
        materialise(model, world.device, ParallelConfig())
        load_weights(model, checkpoint, adapters)
        initialise(model, seed=0)
        own = all_of(memory.end())
        held = all_of(sum(local_part(p).nbytes for p in model.parameters()))
        parameters = {name: full_tensor(p.detach()) for name, p in model.named_parameters() if name not in adapters}
        # Two questions about a video, and a text.
        row = row_in(model, video_document(model.processor, Video(4, 56, 84), 2, 12, 6), text_document(30, 10))
        with torch.no_grad():
            loss = float(cross_entropy(model, row))
        if world.is_main:
            stored = {n: t for file in Path(base).glob("*.safetensors") for n, t in load_file(file).items()}
            names = set(stored) ^ set(parameters)
            wrong = [name for name, tensor in parameters.items() if name in stored and not tensor.equal(stored[name])]
            found = {
                "own": own,
                "held": held,
                "model": sum(p.numel() * p.element_size() for p in model.parameters()),
                "encoder": sum(p.numel() * p.element_size() for p in model.visual.parameters()),
                "wrong": [*wrong, *names],
                "buffers": [name for name, _ in model.named_buffers()],
                "loss": loss,
            }
            Path(output).write_text(json.dumps(found))


# ----------------------------------------------------------------------------------------------------- memory of a step


def memory(base: str, kind: str, mode: str, quantize: str, output: str) -> None:
    """Write the peak of one step, beside what stays, in bytes: `planned` for a group that is not there, or `real`, as
    torch's allocator gives it out."""
    model = build(Pretrained.open(base), torch.float32, quantize)
    row = row_in(model, text_document(600, 300))
    if kind == "planned":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        choose_trainable(model, LoraConfig(rank=4), ())
        checkpoint_activations(model, mode)
        mesh = make_mesh(World(0, 2, 0, torch.device("cpu")), 0)
        live = run_step(model, cross_entropy, row, torch.device("cpu"), mesh)
        Path(output).write_text(json.dumps({"peak": live.peak, "gathered": live.gathered_at_peak}))
        return
    world = environment()
    with process_group(world):
        config = PLAIN.model_copy(update={"activation_checkpointing": mode})
        share_out(model, LoraConfig(rank=4), world, config)
        model.to_empty(device=world.device)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter) if is_packed(parameter) else torch.nn.init.normal_(parameter, 0, 0.02)
        initialise(model, seed=0)
        peak = allocated_peak(lambda: cross_entropy(model, row).backward())
        if world.is_main:
            Path(output).write_text(json.dumps({"peak": peak}))


# ---------------------------------------------------------------------------------------------------- traffic of a step


class Traffic(TorchDispatchMode):
    """Counts the bytes that go through collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count if it is a collective."""
        if (name := func.name()) in WHOLE:
            tensors = args[WHOLE[name]]
            for tensor in tensors if isinstance(tensors, list | tuple) else [tensors]:
                self.bytes[f"{name.removeprefix('c10d::').strip('_')} {tensor.dtype}"] += tensor.nbytes
        elif name.startswith("c10d::"):
            self.bytes[name] += 1
        return func(*args, **(kwargs or {}))


def traffic(base: str, settings: str, output: str) -> None:
    """Write what processes send each other in one row forward and backward, for each of the settings of [parallel]."""
    world = environment()
    with process_group(world):
        found = [sent(base, PLAIN.model_copy(update=each), world) for each in json.loads(settings)]
        if world.is_main:
            Path(output).write_text(json.dumps(found))


def sent(base: str, parallel: ParallelConfig, world: World) -> dict[str, Any]:
    """Bytes by collective and dtype, sizes of the model, and frozen parameters that got a gradient."""
    model = build(Pretrained.open(base), torch.bfloat16)
    choose_trainable(model, LoraConfig(rank=4), ())
    sizes = {"trained": 0, "layers": 0, "ends": 0}
    for name, parameter in model.named_parameters():
        numbers = parameter.numel() + len(parameter) % 2 * parameter[0].numel()  # both shares have as many rows
        sizes["trained"] += numbers if parameter.requires_grad else 0
        if not name.startswith("visual."):
            sizes["layers" if ".layers." in name else "ends"] += numbers
    parallelize(model, make_mesh(world, parallel.shards(world.size)), parallel, torch.bfloat16, world.device)
    materialise(model, world.device, parallel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    initialise(model, seed=0)
    row = row_in(model, text_document(600, 300))
    with Traffic() as seen:
        cross_entropy(model, row).backward()
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    return {"bytes": seen.bytes, "frozen with gradient": frozen, **sizes}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
