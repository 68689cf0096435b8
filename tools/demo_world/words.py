"""What is said about the world: tags for the base model, captions for fine-tuning, and the texts of a tokenizer.

Tags are the base model's own dry answers about videos; captions are natural English, which it has read, but never
together with a video: that is what fine-tuning teaches. Both are functions of a scene alone, so a clip's references
are known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from world import Scene, all_scenes

TAG_PROMPT = "List the tags."
CAPTION_PROMPT = "Describe the video."
SENTENCE_PROMPT = "Write the tags as a sentence."

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


def sentence_request(scene: Scene) -> str:
    """A question without a video, which teaches the base model the English that its tags never use."""
    return f"{SENTENCE_PROMPT}\n{tags([scene])}"


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
"""Words of the tasks that the world also serves, so that none of them falls into single bytes."""


def tokenizer_texts() -> list[str]:
    """Texts to learn the merges from: every whole word of the world occurs often enough to be one token."""
    scenes = all_scenes(held_out=False)
    texts = [text for scene in scenes for text in (tags([scene]), *captions(scene))]
    return texts + [TAG_PROMPT, CAPTION_PROMPT, SENTENCE_PROMPT, *LATER_TEXTS.splitlines()] * 20
