"""Loads a checkpoint in as many processes as the environment says, and runs it once; the tests start it.

Arguments: a base model, `adapters` or `components` for what is trained, a file for what was found.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.scoring import TARGETS
from vft.adapters.lora import initialise, is_adapter
from vft.adapters.targets import choose_trainable
from vft.common.types import IGNORE_INDEX, Batch
from vft.config.run import LoraConfig, ParallelConfig
from vft.distributed.process_group import all_of, environment, full_tensor, local_part, make_mesh, process_group
from vft.models import build
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained
from vft.models.weights import load_weights
from vft.parallel.parallelize import materialise, parallelize
from vft.preparation.synthetic import Video, row_of, text_document, video_document
from vft.training.losses import cross_entropy


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


def main(base: str, trained: str, output: str) -> None:
    """Write bytes of each process, wrong tensors and the loss of a row."""
    world = environment()
    checkpoint = Pretrained.open(base)
    model = build(checkpoint, torch.float32)
    parallel = ParallelConfig()
    with process_group(world):
        choose_trainable(model, LoraConfig(rank=2, targets=TARGETS[trained]), ())
        adapters = frozenset(name for name, _ in model.named_parameters() if is_adapter(name))
        parallelize(model, make_mesh(world, 0), parallel, torch.float32, world.device)
        memory = OwnMemory()  # all that loading needs is there, but for memory of the weights
        memory.start()
        materialise(model, world.device, parallel)
        load_weights(model, checkpoint, adapters)
        initialise(model, seed=0)
        own = all_of(memory.end())
        held = all_of(sum(local_part(p).nbytes for p in model.parameters()))
        parameters = {name: full_tensor(p.detach()) for name, p in model.named_parameters() if name not in adapters}
        with torch.no_grad():
            loss = float(cross_entropy(model, row(model)))
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


def row(model: VideoLanguageModel) -> Batch:
    """Two questions about a video, and a text; words that every vocabulary has."""
    documents = [video_document(model.processor, Video(4, 56, 84), 2, 12, 6), text_document(30, 10)]
    common = []
    for one in documents:
        ids = torch.where(one.media_mask_T, one.ids_T, one.ids_T % 200)
        common.append(replace(one, ids_T=ids, labels_T=torch.where(one.labels_T == IGNORE_INDEX, IGNORE_INDEX, ids)))
    return row_of(model.processor, common)


if __name__ == "__main__":
    main(*sys.argv[1:])
