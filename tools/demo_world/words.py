"""Texts about the world: tags for the base model, the answers of the five tasks, and the tokenizer's texts.

The base model describes videos by tags. All other texts are natural English, which the base has read, but never
together with a video: that is what fine-tuning teaches. Every text is a function of the scenes alone, so the right
answers about a clip are known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from world import COLORS, GROUNDS, MOTIONS, SHAPES, Scene, all_scenes

TAG_PROMPT = "List the tags."
CAPTION_PROMPT = "Describe the video."
PICTURE_PROMPT = "Describe the image."
SENTENCE_PROMPT = "Write the tags as a sentence."
SUMMARY_PROMPT = "Summarize the tags."
STORY_PROMPT = "Tell a story about the tags."
COPY_PROMPT = "Say it again."

VERBS = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows larger",
    "shrink": "shrinks to a smaller size",
}
PARTICIPLES = {
    "left": "moving to the left",
    "right": "moving to the right",
    "up": "moving up",
    "down": "moving down",
    "grow": "growing larger",
    "shrink": "shrinking to a smaller size",
}
DEEDS = {
    "left": "set out to the left",
    "right": "set out to the right",
    "up": "went up",
    "down": "went down",
    "grow": "was happy and grew larger",
    "shrink": "grew smaller",
}
"""A motion in the words of a story."""
TIMES = {"dark": "in the dark night", "light": "in the light of the sun"}
"""A ground in the words of a story."""

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


def reading(request: str, scenes: Sequence[Scene]) -> str:
    """A question without a video, which teaches the base model the English that its tags never use."""
    return f"{request}\n{tags(scenes)}"


LATER_TEXTS = """\
What color is the figure? What shape is it? Which way does the ring move? How many scenes are there? Is it red?
Does the square move up or down? What happens first? What happens last? Which figure comes after the blue triangle?
Please provide your answer by stating the letter followed by the full option. Answer with a single word. Yes. No.
A. red B. green C. blue D. yellow E. purple 0 1 2 3 4 5 6 7 8 9 one two three four five scenes in the video.
Which action does the video show? left right up down grow shrink larger smaller dark light background ground color
Summarize the video. First, a red ring moves to the left. Then a green square moves up. After that, a blue triangle
grows larger. Finally, a yellow cross shrinks to a smaller size. In the end, it was gone. There are three scenes.
Tell a story about the video. Once upon a time, a little red ring set out to the left, while a cyan square went down.
The purple cross was happy and grew. The sun was light and the night was dark. They met before they all went home.
You are a helpful assistant. Describe the video. List the tags. Describe the image.
system
user
assistant
"""
"""Words of the other tasks, so that the tokenizer does not split them into single bytes."""


def vocabulary() -> list[str]:
    """Every word of the tasks, once, in lower case."""
    scenes = all_scenes(held_out=False)
    texts = [LATER_TEXTS, *(text for scene in scenes for text in (tags([scene]), *captions(scene)))]
    return sorted({word.strip(".,?:").lower() for text in texts for word in text.split()} - {""})


def tokenizer_texts() -> list[str]:
    """Texts to learn the merges from: every whole word of the world occurs often enough to be one token."""
    scenes = all_scenes(held_out=False)
    texts = [text for scene in scenes for text in (tags([scene]), *captions(scene))]
    return texts + [TAG_PROMPT, CAPTION_PROMPT, SENTENCE_PROMPT, *LATER_TEXTS.splitlines()] * 20
