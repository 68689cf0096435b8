"""`[data]` of a configuration: which records are read, how their media are sampled, how rows are packed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vft.config.fields import (
    Count,
    Folder,
    Name,
    Positive,
    PositiveFloat,
    Section,
    Tuple,
    check_order,
    contradiction,
    expand,
)
from vft.config.toml import show

OPTIONAL_SETTINGS = ("media", "stream", "columns", "subtitles")
"""Settings of a source that only some formats have."""


def _check_take(text: str) -> str:
    if not re.fullmatch(r"all|(first|random):[1-9][0-9]*", text):
        raise ValueError('must be "all", "first:N" or "random:N" with N from 1')
    return text


class SourceConfig(Section):
    """One entry of `data.sources` or `eval.sources`."""

    format: Name
    """How the records are laid out: a module of `vft/data/formats/`, or `module:Class` of your own. `messages` also
    reads ShareGPT and LLaVA records."""
    path: Name
    """A file or folder, relative to `data.root`."""
    repeats: Annotated[float, Field(ge=0.001)] | None = None
    """How often its records come in an epoch: 2.0 twice, 0.5 every second epoch, half of them in each; none: once."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Its fraction of the samples that are trained on, as `interleave_probs` elsewhere. All sources have one then, and
    they sum to 1; needs `train.max_steps`, because there is no end of an epoch to reach."""
    weight: PositiveFloat | None = None
    """Of older files: `repeats` of records, and of a source with `stream = true` its share of the rows beside those of
    the others' weights. Give one of the two above instead."""
    take: Annotated[str, AfterValidator(_check_take)] = "all"
    """`all`, `first:N` or `random:N` records; the choice depends on `seed`."""
    media: str = ""
    """Folder of the videos or pictures, relative to `data.root`; empty: where the format's publishers put it. For
    formats whose records hold bare names."""
    stream: bool = False
    """Read tar archives in sequence, unpacking nothing: for sets that don't fit the disk. Then no index is made, epochs
    have no length, and each of the `train.packs_per_step` rows of a step has a stream of its own."""
    columns: dict[str, Name] = Field(default_factory=dict)
    """What keys are called in these records, by their name here: `{ video = "path", question = "q", answer = "a" }`
    (`messages`, `story`). Columns of a table in CSV, TSV or Parquet, or keys of JSON. The usual names need none."""
    subtitles: bool = False
    """Put the subtitles that overlap the sampled frames into the prompt (`video_mme`)."""

    @property
    def times(self) -> float:
        """How often its records come in an epoch where nothing has a share."""
        return self.repeats or self.weight or 1.0

    @property
    def of_rows(self) -> float:
        """How many rows a step takes out of it, relative to the others, where there are streams."""
        return self.share or self.weight or 1.0

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = {name: value for name in ("repeats", "share", "weight") if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            told = " and ".join(f"{name} = {value:g}" for name, value in given.items())
            raise ValueError(f"{told} contradict each other; keep one")
        if self.stream and self.repeats is not None:
            raise ValueError(
                f"repeats = {self.repeats:g} counts in epochs, and stream = true has none; give every source a share"
            )
        if self.stream and self.take != "all":
            raise ValueError(f"stream = true and take = {show(self.take)} contradict each other; take one out")
        for check in _source_checks:
            check(self)
        return self


_source_checks: list[Callable[[SourceConfig], None]] = []


def register_source_check(check: Callable[[SourceConfig], None]) -> None:
    """From now on `check` sees every source; it raises ValueError. `vft.data.formats` checks so what a format takes,
    since this folder, which is below it, knows none."""
    _source_checks.append(check)


def check_shares(sources: Sequence[SourceConfig]) -> None:
    """ValueError where `share` of some sources contradicts what the others have."""
    shares = [source.share for source in sources if source.share is not None]
    if shares and len(shares) < len(sources):
        path = next(source.path for source in sources if source.share is None)
        raise ValueError(
            f"sources: {len(shares)} of {len(sources)} have a share, and {show(path)} has none; give each one, or none"
        )
    if shares and abs(sum(shares) - 1) > 1e-6:
        told = " + ".join(f"{share:g}" for share in shares)
        raise ValueError(f"sources: their shares, {told}, sum to {sum(shares):g}; they must sum to 1")
    if (weighed := [s for s in sources if s.weight is not None]) and (counted := [s for s in sources if s.repeats]):
        told = f"weight = {weighed[0].weight:g} of {show(weighed[0].path)} and repeats = {counted[0].repeats:g} of "
        raise ValueError(f"sources: {told}{show(counted[0].path)} contradict each other; give repeats to both")


class VideoConfig(Section):
    """`[data.video]`: what one video may take. A record's own keys go before these."""

    fps: PositiveFloat | None = None
    """Frames sampled a second; 2.0 where neither `fps` nor `frames` is given."""
    frames: Positive | None = None
    """A fixed number of frames instead of a rate."""
    min_frames: Positive = 4
    """Fewest frames that `fps` may come to."""
    max_frames: Positive = 32
    """Most frames that `fps` may come to; longer videos are sampled more sparsely. `frames` is not bounded by it."""
    min_pixels: Positive = 4 * 28 * 28
    """Height x width of a frame after resizing, at least. The default is the model's own."""
    max_pixels: Positive = 128 * 28 * 28
    """Height x width of a frame after resizing, at most; 28 x 28 pixels are one token of two frames. Of Qwen2.5-VL:
    LLaVA-NeXT-Video's frames are 336 x 336 whatever the limits of pixels, and 144 tokens each."""
    total_pixels: Positive | None = None
    """Frames / 2 x height x width of a video, at most (as qwen-vl-utils counts); none: `max_pixels` alone limits."""
    sample_lists: bool = False
    """Sample lists of pictures by these limits, as if they were files. Else every picture that a record names is shown,
    but for what the record itself asks and `data.pack_tokens` has no room for; folders of frames are always sampled."""
    timestamps: bool = False
    """Say before each video how long it is and at which seconds its frames were taken."""

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("fps") is None and table.get("frames") is None:
            return {**table, "fps": 2.0}
        return table

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.fps is not None and self.frames is not None:
            raise contradiction("fps", self.fps, "frames", self.frames, "data.video")
        check_order("min_frames", self.min_frames, "max_frames", self.max_frames)
        check_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        if self.total_pixels is not None:
            check_order("min_pixels", self.min_pixels, "total_pixels", self.total_pixels)
        return self


class ImageConfig(Section):
    """`[data.image]`: what one picture may take."""

    min_pixels: Positive = 4 * 28 * 28
    """Height x width after resizing, at least."""
    max_pixels: Positive = 1280 * 28 * 28
    """Height x width after resizing, at most; 28 x 28 pixels are one token. For LLaVA-NeXT-Video: of the resolutions
    that tiles of 336 x 336 make; 14 x 14 pixels are one token."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        check_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        return self


class DataConfig(Section):
    """`[data]`: what is read, and how it is packed into rows."""

    root: Folder = Path(".")
    """Folder of the sources and their media, relative to the current directory."""
    sources: Tuple[SourceConfig] = ()
    """Records to train on."""
    pack_tokens: Positive = 8192
    """Tokens of a row, at most."""
    max_samples_per_pack: Count = 0
    """Samples in a row, at most; 0: as many as fit."""
    prompt: str = ""
    """What is asked where records hold no question (labels, captions, stories); empty: the task's own words."""
    learn_reasoning: bool = True
    """Also learn what stands between `<think>` and `</think>` before an answer; false: only the answer behind it."""
    segment_questions: bool = True
    """Where records describe segments of their video, also train on a question about each (`summarize`, `story`)."""
    index: Literal["scan", "header"] = "scan"
    """How frames are counted: by reading every file once, or from the container's header where it is complete. Headers
    are quick and sometimes wrong; a clip that then turns out shorter is left out when its turn comes."""
    share_videos: bool = True
    """Lay the questions of one video behind a single copy of it. Loss and gradients stay those of separate samples, and
    so do the frames that each of them sees: where `pack_tokens` leaves them different ones, they don't share."""
    frames_for_sharing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a video's tokens that may be given up, frames first, so that all questions about it fit in one row
    behind a single copy: 0.25 is at most a quarter. 0: none; the model sees the same with `share_videos` on or off."""
    workers: Count = 4
    """Processes that decode, for each training process; 0: the training process decodes, without a deadline."""
    decode_timeout_s: PositiveFloat = 60.0
    """Seconds that one clip may take to decode before it is given up."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of clips that may fail before the run stops."""
    cache_dir: str = ""
    """Folder of index and frames; empty: the environment's `VFT_CACHE`, else `~/.cache/vft`. See `cache_path`."""
    cache: Literal["none", "frames"] = "none"
    """`frames`: keep the decoded and resized frames of videos below `cache_dir`, so that a clip is decoded once for all
    epochs, evaluations and runs with the same limits. Not those of pictures, nor of sources with `stream = true`."""
    cache_gib: PositiveFloat = 100.0
    """GiB (2^30 bytes) of frames, at most, of all runs that share the folder; then no more are added, and none is
    removed. A video takes frames x height x width x 3 bytes."""
    prefetch_packs: Positive = 8
    """Rows that are prepared ahead of the training step, for each training process."""
    video: VideoConfig = VideoConfig()
    """Limits of one video."""
    image: ImageConfig = ImageConfig()
    """Limits of one picture."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        check_shares(self.sources)
        return self

    @property
    def indexed(self) -> tuple[SourceConfig, ...]:
        """The sources that are read before training, all but streams."""
        return tuple(source for source in self.sources if not source.stream)

    @property
    def streamed(self) -> tuple[SourceConfig, ...]:
        """The sources with `stream = true`."""
        return tuple(source for source in self.sources if source.stream)

    @property
    def cache_path(self) -> Path:
        """Folder of the caches: `cache_dir`, else `VFT_CACHE` of the environment, else `vft` in the user's cache."""
        chosen = self.cache_dir or os.environ.get("VFT_CACHE", "")
        if chosen:
            return expand(Path(chosen))
        return expand(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "vft"
