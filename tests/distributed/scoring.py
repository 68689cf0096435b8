"""Scores the options of questions in as many processes as the environment says; the tests start it.

Arguments: a base model, a JSON file with lists of questions by name, `adapters` or `components` for what is trained, a
file for the scores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from vft.adapters.lora import fill, initialise, is_adapter
from vft.adapters.targets import choose_trainable
from vft.common.task import Answer, Question
from vft.common.types import Conversation, MediaRef, Turn
from vft.config.data import DataConfig, VideoConfig
from vft.config.run import LoraConfig, ParallelConfig
from vft.data.chat import ChatEncoder
from vft.data.media.index import build as build_index
from vft.data.workers import WorkerPool
from vft.distributed.process_group import DataParallel, all_of, environment, make_mesh, process_group
from vft.inference import option_scores
from vft.inference.engine import Answerer
from vft.inference.generate import Sampling
from vft.models import build
from vft.models.pretrained import Pretrained
from vft.models.weights import load_weights
from vft.parallel.parallelize import parallelize

TARGETS = {
    "adapters": ("language_model.*",),
    "components": ("language_model.*", "vision_encoder.*", "projector.*"),
}


def main(base: str, questions: str, trained: str, output: str) -> None:
    """Answer and score each list; the first process writes what each question got and how many options-passes each
    process had."""
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
        choose_trainable(model, lora, ())
        adapters = frozenset(name for name, _ in model.named_parameters() if is_adapter(name))
        parallelize(model, make_mesh(world, 0), ParallelConfig(), torch.float32, world.device)
        model.to_empty(device=world.device)
        load_weights(model, checkpoint, adapters)
        initialise(model, seed=0)
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if is_adapter(name):
                generator = torch.Generator().manual_seed(number)
                fill(parameter, 0.3 * torch.randn(parameter.shape, generator=generator))
        answerer = Answerer(
            model,
            ChatEncoder(checkpoint.tokenizer, model.processor),
            config,
            index.info,
            pool,
            world,
            DataParallel(world.rank, world.size),
        )
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


if __name__ == "__main__":
    main(*sys.argv[1:])
