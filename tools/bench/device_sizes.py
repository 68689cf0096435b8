"""How large the models, rows and runs of `device.py` are."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """Of everything that a part makes."""

    shape: str
    """The model whose step is timed, of `workload.SHAPES`."""
    pack_tokens: int
    text_tokens: int
    """Of a row without media."""
    frames: int
    side: int
    """Of the videos, in pixels."""
    words: int
    """Of a question and of its answer, if a video has one; with several questions these share as many."""
    clips: int
    warm_up: int
    """Steps that are not timed."""
    steps: int
    """Steps that are timed."""
    kinds: tuple[tuple[str, bool, int], ...]
    """Steps to time: recomputation, whether compiled, questions a video."""
    demo_steps: int
    demo_kinds: tuple[str, ...]
    demo_score: float
    """CIDEr-D that the demo reaches at least."""
    demo_falls: float
    """Its last losses, at most this share of its first."""
    same_steps: int
    """Steps in float32 beside those of the CPU."""
    processes: int
    """Of a run on several devices; 0: as many as there are."""
    saves: int
    save_shape: str
    random_rows: int
    new_tokens: int
    kernel_rows: int
    """Of a row of attention."""
    decode_keys: int
    precision: str = "bf16"
    is_true: bool = True
    """Whether memory and time are to be held against their plans."""


MODES = ("none", "mlp", "full")
ALL_KINDS = tuple((mode, compiled, questions) for mode in MODES for compiled in (False, True) for questions in (1, 5))
LARGE = Size(
    shape="7b",
    pack_tokens=8192,
    text_tokens=4096,
    frames=16,
    side=448,
    words=250,
    clips=24,
    warm_up=5,
    steps=8,
    kinds=ALL_KINDS,
    demo_steps=200,
    demo_kinds=("killed", "compiled", "nf4", "offload", "recomputed"),
    demo_score=2.0,
    demo_falls=0.5,
    same_steps=20,
    processes=0,
    saves=50,
    save_shape="small",
    random_rows=60,
    new_tokens=64,
    kernel_rows=3000,
    decode_keys=8448,
)
QUICK = replace(
    LARGE,
    kinds=(("none", True, 1), ("none", True, 5), ("full", False, 1)),
    demo_kinds=("killed", "compiled"),
    demo_score=1.0,
    demo_steps=100,
    saves=20,
    random_rows=30,
)
TINY = Size(
    shape="tiny",
    pack_tokens=640,
    text_tokens=256,
    frames=4,
    side=56,
    words=12,
    clips=4,
    warm_up=2,
    steps=2,
    kinds=(("none", False, 1), ("mlp", False, 1), ("full", False, 3)),
    demo_steps=6,
    demo_kinds=("killed", "nf4", "offload"),
    demo_score=0.0,
    demo_falls=1.5,
    same_steps=3,
    processes=2,
    saves=4,
    save_shape="tiny",
    random_rows=4,
    new_tokens=4,
    kernel_rows=300,
    decode_keys=64,
    is_true=False,
)
SIZES = {"large": LARGE, "quick": QUICK, "tiny": TINY}
"""`tiny` is for a test of the parts themselves."""
