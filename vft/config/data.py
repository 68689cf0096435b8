"""The `[data]` table: which records are read, how their media are sampled, how rows are packed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vft.common.event_times import EventForm
from vft.config.toml import (
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
    matching,
    show,
)

OPTIONAL_SETTINGS = ("media", "stream", "columns", "subtitles")
"""Settings of a source that only some formats have."""


def _no_formats(_: object) -> object:
    raise RuntimeError("import vft.data.formats before a source is checked: it knows the formats")


source_checks: dict[str, Callable[[Any], object]] = {"format": _no_formats, "source": _no_formats}
"""Checks of the name of a source's format, and of a whole source; both raise ValueError.

`vft.data.formats` puts its own here: this folder is below it and knows no format.
"""


def _check_format(name: str) -> str:
    source_checks["format"](name)
    return name


class SourceConfig(Section):
    """One entry of `data.sources` or `eval.sources`."""

    format: Annotated[Name, AfterValidator(_check_format)]
    """How the records are laid out: a module of `vft/data/formats/`, or `module:Class` of your own. `messages` also
    reads ShareGPT and LLaVA records."""
    path: Name
    """A file or folder, relative to `data.root`."""
    repeats: Annotated[float, Field(ge=0.001)] | None = None
    """How often the records come in an epoch: 2.0 is twice; 0.5 is half of them in each epoch. None: once."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the training samples that come from this source, from 0 to 1 (elsewhere: `interleave_probs`). Either
    all sources have one or none, and they sum to 1. Needs `train.max_steps`, because there are no epochs."""
    weight: PositiveFloat | None = None
    """In files of earlier versions: `repeats`, or for a source with `stream = true` its share of the rows relative to
    the other weights. Use one of the two settings above instead."""
    take: Annotated[
        str, matching(r"all|(first|random):[1-9][0-9]*", 'be "all", "first:N" or "random:N" with N from 1')
    ] = "all"
    """`all`, `first:N` or `random:N` records. The random choice depends on `seed`."""
    media: str = ""
    """Folder of the videos or pictures, relative to `data.root`. Empty: where the data set's publishers put it. For
    formats whose records hold bare file names."""
    stream: bool = False
    """Read tar archives in sequence without unpacking them, for data sets that do not fit on the disk. Then there is no
    index, epochs have no length, and each of the `train.packs_per_step` rows of a step has its own stream."""
    columns: dict[str, Name] = Field(default_factory=dict)
    """Names of the records' keys, if they are not the usual ones: `{ video = "path", question = "q", answer = "a" }`
    (`messages`, `story`). These are columns of CSV, TSV or Parquet, or keys of JSON."""
    subtitles: bool = False
    """Add the subtitles that overlap the sampled frames to the prompt (`video_mme`)."""

    @property
    def times(self) -> float:
        """How often the records come in an epoch, if sources have no shares."""
        return self.repeats or self.weight or 1.0

    @property
    def of_rows(self) -> float:
        """How many rows of a step come from this source, relative to the others, if there are streams."""
        return self.share or self.weight or 1.0

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = {name: value for name in ("repeats", "share", "weight") if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            settings = " and ".join(f"{name} = {value:g}" for name, value in given.items())
            raise ValueError(f"{settings} contradict each other; keep one")
        if self.stream and self.repeats is not None:
            raise ValueError(
                f"repeats = {self.repeats:g} counts in epochs, and stream = true has none; give every source a share"
            )
        if self.stream and self.take != "all":
            raise ValueError(f"stream = true and take = {show(self.take)} contradict each other; take one out")
        source_checks["source"](self)
        return self


def source_names(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """A name for each different path: its last part without suffix, or if several have that, the whole path with `:` in
    place of `/`."""
    paths = dict.fromkeys(source.path for source in sources)
    stems = Counter(PurePath(path).stem for path in paths)
    return {path: stem if stems[stem := PurePath(path).stem] == 1 else path.replace("/", ":") for path in paths}


def check_shares(sources: Sequence[SourceConfig]) -> None:
    """Raise ValueError if `share`, `weight` and `repeats` of the sources do not fit together."""
    shares = [source.share for source in sources if source.share is not None]
    if shares and len(shares) < len(sources):
        path = next(source.path for source in sources if source.share is None)
        raise ValueError(
            f"sources: {len(shares)} of {len(sources)} have a share, and {show(path)} has none; give each one, or none"
        )
    if shares and abs(sum(shares) - 1) > 1e-6:
        sum_text = " + ".join(f"{share:g}" for share in shares)
        raise ValueError(f"sources: their shares, {sum_text}, sum to {sum(shares):g}; they must sum to 1")
    if (weighed := [s for s in sources if s.weight is not None]) and (counted := [s for s in sources if s.repeats]):
        weights = f"weight = {weighed[0].weight:g} of {show(weighed[0].path)} and repeats = {counted[0].repeats:g} of "
        raise ValueError(f"sources: {weights}{show(counted[0].path)} contradict each other; give repeats to both")


class VideoConfig(Section):
    """`[data.video]`: limits of a video. Keys of the record take precedence."""

    fps: PositiveFloat | None = None
    """Frames to sample per second; 2.0 if neither `fps` nor `frames` is given."""
    frames: Positive | None = None
    """Number of frames to sample, instead of a rate."""
    min_frames: Positive = 4
    """Fewest frames that `fps` may give."""
    max_frames: Positive = 32
    """Most frames that `fps` may give; longer videos are sampled more sparsely. Does not limit `frames`."""
    min_pixels: Positive = 4 * 28 * 28
    """Least height x width of a frame after resizing. The default is the model's own."""
    max_pixels: Positive = 128 * 28 * 28
    """Largest height x width of a frame after resizing. For Qwen2.5-VL 28 x 28 pixels of two frames are one token. The
    frames of LLaVA-NeXT-Video always have 336 x 336 pixels and 144 tokens."""
    total_pixels: Positive | None = None
    """Largest frames / 2 x height x width of a video (as qwen-vl-utils counts). None: only `max_pixels` limits it."""
    sample_lists: bool = False
    """Sample lists of pictures by these limits, like video files. Otherwise all pictures that a record names are shown,
    unless the record asks for fewer or they do not fit in `data.pack_tokens`. Folders of frames are always sampled."""
    timestamps: bool = False
    """Begin each video with a text: its length, and the seconds at which its frames were taken."""
    keep_outer_pair: bool = False
    """Keep the chat template's `<|vision_start|>` and `<|vision_end|>` around a whole video, as transformers from 5.10
    and vLLM beside it do. false: without, as the release was trained. Only for Qwen3-VL and Qwen3.5."""

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
    """`[data.image]`: limits of a picture."""

    min_pixels: Positive = 4 * 28 * 28
    """Least height x width after resizing."""
    max_pixels: Positive = 1280 * 28 * 28
    """Largest height x width after resizing; 28 x 28 pixels are one token. For LLaVA-NeXT-Video it limits the
    resolutions made of 336 x 336 tiles; 14 x 14 pixels are one token."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        check_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        return self


class DataConfig(Section):
    """`[data]`: the records, and how they are packed into rows."""

    root: Folder = Path(".")
    """Folder of the sources and their media, relative to the current directory."""
    sources: Tuple[SourceConfig] = ()
    """Records to train on."""
    pack_tokens: Positive = 8192
    """Most tokens of a row."""
    max_samples_per_pack: Count = 0
    """Most samples in a row; 0: as many as fit."""
    prompt: str = ""
    """The question for records that have none (labels, captions, stories). Empty: the task's own."""
    learn_reasoning: bool = True
    """Also train on the text between `<think>` and `</think>` before an answer; false: only on the answer after it."""
    learn_thought_tags: bool = False
    """Also train on the tags of thoughts that the prompt has when the model is asked: an empty thought before an answer
    without reasoning, the opening tag before reasoning. LLaMA-Factory does so."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Keywords for the model's chat template, in training and wherever the model is asked: `{enable_thinking = true}`.
    One that the template does not read is refused. Empty: as the template does by itself."""
    segment_questions: bool = True
    """If records describe segments of their video, also train on a question about each one (`summarize`, `story`,
    `ground`: when it happens)."""
    event_form: EventForm | None = None
    """How `ground` writes times. `qwen2_5_vl`: a moment as a sentence, all events of a video as a JSON list;
    `qwen3_vl`: these as a JSON object; `seconds`: `1.0 to 2.5 s` for a moment, or a line for each event. None: as the
    cookbooks of the model's family show."""
    index: Literal["scan", "header"] = "scan"
    """How frames are counted: by reading every file once (`scan`), or from the container's header if it is complete
    (`header`), which is fast but sometimes wrong. A clip that turns out to be shorter is then left out."""
    share_videos: bool = True
    """Let the questions about one video share a single copy of it. Loss and gradients are those of separate samples,
    and so are the frames: questions that `pack_tokens` leaves different frames do not share."""
    frames_for_sharing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of a video's tokens, from 0 to below 1, that may be dropped (frames first) so that all questions about
    it fit in one row. 0: none; then the model sees the same frames whether `share_videos` is on or off."""
    workers: Count = 4
    """Decoding processes for each training process; 0: the training process decodes, without a timeout."""
    decode_timeout_s: PositiveFloat = 60.0
    """Seconds that decoding a clip may take before it is given up."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Fraction of the clips, from 0 to 1, that may fail before the run stops."""
    cache_dir: str = ""
    """Folder of the index, of plans of large data sets, of cached frames and of what references have computed. Empty:
    the environment variable `VFT_CACHE`, or `~/.cache/vft`."""
    cache: Literal["none", "frames"] = "none"
    """`frames`: store the decoded and resized frames of videos below `cache_dir`, so that a clip is decoded once for
    all epochs, evaluations and runs with the same limits. Not for pictures, nor for sources with `stream = true`."""
    cache_gib: PositiveFloat = 100.0
    """GiB (2^30 bytes) that the frames of all runs in the folder may take. Then no more are added; none are removed.
    A video takes frames x height x width x 3 bytes."""
    prefetch_packs: Positive = 8
    """Rows that each training process prepares ahead."""
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
        """The sources that are indexed before training: all but streams."""
        return tuple(source for source in self.sources if not source.stream)

    @property
    def streamed(self) -> tuple[SourceConfig, ...]:
        """The sources with `stream = true`."""
        return tuple(source for source in self.sources if source.stream)

    @property
    def cache_path(self) -> Path:
        """Folder of the caches: `cache_dir`, or else `VFT_CACHE` of the environment, or `vft` in the user's cache."""
        chosen = self.cache_dir or os.environ.get("VFT_CACHE", "")
        if chosen:
            return expand(Path(chosen))
        return expand(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "vft"
