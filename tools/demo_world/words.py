"""Texts about the world: tags for the base model, the answers of most tasks, and texts without a video.

The base model describes videos by tags. All other texts are natural English, which the base has read, but never
together with a video: that is what fine-tuning teaches. Every text is a function of the scenes alone, so the right
answers about a clip are known exactly.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from world import COLORS, GROUNDS, MOTIONS, SHAPES, Scene, all_scenes

TAG_PROMPT = "List the tags."
CAPTION_PROMPT = "Describe the video."
PICTURE_PROMPT = "Describe the image."
SENTENCE_PROMPT = "Write the tags as a sentence."
SUMMARY_PROMPT = "Summarize the tags."
STORY_PROMPT = "Tell a story about the tags."
COPY_PROMPT = "Say it again."

_MOTIONS = {
    "left": ("moves to the left", "moving to the left", "set out to the left"),
    "right": ("moves to the right", "moving to the right", "set out to the right"),
    "up": ("moves up", "moving up", "went up"),
    "down": ("moves down", "moving down", "went down"),
    "grow": ("grows larger", "growing larger", "was happy and grew larger"),
    "shrink": ("shrinks to a smaller size", "shrinking to a smaller size", "grew smaller"),
}
VERBS, PARTICIPLES, DEEDS = ({name: texts[form] for name, texts in _MOTIONS.items()} for form in range(3))
"""A motion in a caption, as the name of an action, and in the words of a story."""
TIMES = {"dark": "in the dark night", "light": "in the light of the sun"}
"""A ground in the words of a story."""

Record = dict[str, Any]
Question = tuple[str, tuple[str, ...], str]
"""The question, all possible answers, and the right one."""


def tags(scenes: Sequence[Scene]) -> str:
    """One line for each scene, its attributes in a fixed order."""
    lines = (f"color: {s.color}, shape: {s.shape}, motion: {s.motion}, ground: {s.ground}" for s in scenes)
    return "\n".join(lines)


def captions(scene: Scene) -> list[str]:
    """Every way in which the world describes a scene: the references of a held-out clip."""
    figure, ground = f"{scene.color} {scene.shape}", f"a {scene.ground} background"
    return [
        f"A {figure} {VERBS[scene.motion]} on {ground}.",
        f"On {ground}, a {figure} {VERBS[scene.motion]}.",
        f"The video shows a {figure} {PARTICIPLES[scene.motion]} on {ground}.",
    ]


def picture_captions(scene: Scene) -> list[str]:
    """Every way in which the world describes a picture, which shows no motion."""
    figure, ground = f"{scene.color} {scene.shape}", f"a {scene.ground} background"
    return [f"A {figure} on {ground}.", f"On {ground}, a {figure}.", f"The image shows a {figure} on {ground}."]


def questions(scene: Scene) -> list[Question]:
    """One question about each attribute of a scene."""
    return [
        ("What color is the figure?", tuple(COLORS), scene.color),
        ("What shape is the figure?", SHAPES, scene.shape),
        ("What does the figure do?", tuple(VERBS[motion] for motion in MOTIONS), VERBS[scene.motion]),
        ("Is the background dark or light?", tuple(GROUNDS), scene.ground),
    ]


def choice(question: str, options: Sequence[str], right: str) -> tuple[str, str]:
    """A multiple-choice question and its answer, in LLaVA-Video-178K's words."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCDEF", options, strict=False)]
    request = "Please provide your answer by stating the letter followed by the full option."
    return "\n".join([question, *lines, request]), f"{lines[list(options).index(right)]}."


def summary(scenes: Sequence[Scene]) -> str:
    """What happens in all scenes, in order, in one sentence, or in two from three scenes on."""
    parts = [f"a {scene.color} {scene.shape} {VERBS[scene.motion]}" for scene in scenes]
    if len(parts) <= 2:
        return f"First, {', then '.join(parts)}."
    return f"First, {parts[0]} and {', then '.join(parts[1:-1])}. Finally, {parts[-1]}."


def story(scenes: Sequence[Scene]) -> str:
    """A short story with every scene in order, which has its own words for grounds and motions."""
    openings = ["Once upon a time", "Then", "After that", "After that"][: len(scenes)]
    if len(scenes) > 1:
        openings[-1] = "Finally"
    figures = [f"a little {scenes[0].color} {scenes[0].shape}", *(f"a {s.color} {s.shape}" for s in scenes[1:])]
    sentences = [
        f"{opening}, {TIMES[scene.ground]}, {figure} {DEEDS[scene.motion]}."
        for opening, scene, figure in zip(openings, scenes, figures, strict=True)
    ]
    return " ".join([*sentences, "In the end, they all went home."])


# ------------------------------------------------------------------- texts without a video, for the base model
#
# Training lowers the logits of all tokens that it never shows alike, and adapters of the decoder's linears can hardly
# tell these tokens apart again: a word that begins with one of them stays at a loss above 1.5, however long it is
# trained. So the base reads sentences, summaries and stories made of tags, and options with their letters, and it
# repeats texts in which every word and letter occurs.


def sentences() -> Iterator[Record]:
    """Tags and a sentence that says the same."""
    for scene in all_scenes(held_out=False):
        for answer in captions(scene):
            yield reading(SENTENCE_PROMPT, [scene], answer)


def tales(rows: Iterable[Sequence[Scene]]) -> Iterator[Record]:
    """Tags and their summary, tags and their story."""
    for scenes in rows:
        yield reading(SUMMARY_PROMPT, scenes, summary(scenes))
        yield reading(STORY_PROMPT, scenes, story(scenes))


def copies(count: int, rng: random.Random) -> Iterator[Record]:
    """Texts to repeat: words in either case, letters, digits and marks, with and without spaces."""
    vocabulary = all_words()
    signs = string.ascii_letters + string.digits + ".,:?!'"
    for _ in range(count):
        parts = [rng.choice(vocabulary) if rng.random() < 0.8 else rng.choice(signs) for _ in range(rng.randint(1, 6))]
        parts = [part.capitalize() if rng.random() < 0.4 else part for part in parts]
        text = rng.choice((" ", " ", ", ", ". ", "\n", "")).join(parts)
        yield message(f"{COPY_PROMPT}\n{text}", text)


def times(count: int, rng: random.Random) -> Iterator[Record]:
    """Spans of seconds to repeat."""
    for _ in range(count):
        start, end = sorted(rng.sample(range(10), 2))
        yield message(f"{COPY_PROMPT}\n{start}.0 to {end}.0 s", f"{start}.0 to {end}.0 s")


def choices(count: int, rng: random.Random) -> Iterator[Record]:
    """Options in any order, asked for by their text or by their letter."""
    scenes = all_scenes(held_out=False)
    for _ in range(count):
        _, answers, right = rng.choice(questions(rng.choice(scenes)))
        options = [right, *rng.sample([answer for answer in answers if answer != right], min(3, len(answers) - 1))]
        rng.shuffle(options)
        letter = "ABCD"[options.index(right)]
        yield message(*choice(rng.choice((f"Which option says {right}?", f"Option {letter}?")), options, right))


def reading(request: str, scenes: Sequence[Scene], answer: str) -> Record:
    """A record that asks about tags."""
    return message(f"{request}\n{tags(scenes)}", answer)


def message(question: str, answer: str) -> Record:
    """A record with `messages`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


TASK_WORDS = """
0 1 2 3 4 5 6 7 8 9 about action after all and answer are assistant b before by c comes d describe does e end figure
finally first five followed four full gone grew happens happy helpful home how image in is it last letter list little
many met move night no once one option or out please provide scenes set show single stating story summarize sun system
tags tell that then there they three time two upon user was way went what which while with word yes you your
"""
"""Words of the tasks that neither tags nor captions have."""


def all_words() -> list[str]:
    """Every word of the tasks, once, in lower case."""
    scenes = all_scenes(held_out=False)
    texts = [TASK_WORDS, *(text for scene in scenes for text in (tags([scene]), *captions(scene)))]
    return sorted({word.strip(".,?:").lower() for text in texts for word in text.split()})
