"""Every noun that flows from a dataset's record to the loss.

Axes, as suffixes of tensor names everywhere in the project:
T tokens of a row, P vision patches, D features of a patch, M merged media tokens, N supervised tokens,
S segments, H heads, K width of a head, C/H/W channels, height, width of pixels, V vocabulary, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""

MediaKind = Literal["video", "image"]
Role = Literal["system", "user", "assistant"]


# ---------------------------------------------------------------------------------------------- what a source reads

ANSWER_KEYS = ("answers", "references", "answer", "label")
"""Under these a record may list several right answers; a text there is not read beside turns."""


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """What one record asks for one of its media, by qwen-vl-utils' per-video keys; None leaves it to the configuration.

    Pixels are of one frame, except `total_pixels`."""

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    video_start: float | None = None
    """Seconds from the first frame; the range is inclusive at both ends."""
    video_end: float | None = None
    sample_fps: float | None = None
    """Rate in frames per second at which a list of pictures was sampled."""
    timestamps: tuple[float, ...] | None = None
    """Seconds at which the pictures of a list were taken, one for each, none before the one ahead of it."""


@dataclass(frozen=True, slots=True)
class MediaRef:
    """One video or picture that a record points to."""

    kind: MediaKind
    path: Path | tuple[Path, ...]
    """A file, or for a video kept as pictures the pictures in order."""
    options: MediaOptions = MediaOptions()
    field: str = ""
    """Where the record named it (`videos[0]`), for messages."""
    member: str = ""
    """`shard.tar/name.mp4` where the file is a passing copy out of an archive: its name in records."""
    is_folder: bool = False
    """Whether the pictures are all those of a folder: frames of a video, sampled as those of a file. Pictures that a
    record names itself are all shown."""

    @property
    def is_list(self) -> bool:
        """Whether it is a video kept as pictures."""
        return isinstance(self.path, tuple)

    @property
    def file_kind(self) -> MediaKind:
        """What each of its files is: a video may be kept as pictures."""
        return "image" if self.is_list else self.kind

    @property
    def files(self) -> tuple[Path, ...]:
        """Its file, or its pictures in order."""
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @property
    def name(self) -> str:
        """What stands for the medium in records: its file, of a list of pictures the first."""
        return self.member or str(self.files[0])

    def content(self, root: str) -> tuple[object, ...]:
        """What is shown, wherever `root` lies: names below it, and what is taken."""
        names = [self.member] if self.member else [str(file).removeprefix(f"{root}/") for file in self.files]
        return self.kind, names, self.options, self.is_folder


class PlannedText(Protocol):
    """Text that depends on which frames of the media are seen, such as their times: settled once these are planned."""

    def settle(self, plans: Sequence[MediaPlan]) -> str:
        """The text, given the plans of all media of the conversation in reading order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: text and media in reading order."""

    role: Role
    parts: tuple[str | MediaRef | PlannedText, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Sample:
    """A record as a source read it. `origin` says where it stands (`train.json:12`), for messages."""

    id: str
    turns: tuple[Turn, ...]
    origin: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Keys of the record that its reader passed over."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model is to read and, in the assistant's turns, to say: a task makes it of a sample."""

    id: str
    turns: tuple[Turn, ...]
    origin: str
    options: tuple[str, ...] = ()
    """The closed set of answers to the last question, in the form in which the assistant gives them; scored by their
    likelihood. Empty: any answer."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What scoring needs beside the answer: `groups` (name to value), `segments` (texts), as the task has them."""
    spans_s: tuple[tuple[float, float], ...] = ()
    """Start and end, in seconds of the file, of what the record tells of parts of its video: all must lie in it."""
    is_part: bool = False
    """The beginning of another conversation, whose last answer is learnt here: it is no question of its own."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """All media in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, MediaRef))

    @property
    def media_key(self) -> tuple[object, ...]:
        """Equal for conversations about the same media, decoded alike."""
        return tuple((ref.kind, ref.path, ref.options, ref.is_folder) for ref in self.media)

    def content(self, root: str) -> list[object]:
        """What is said and shown, in reading order: roles and texts, and of media the name of the file below `root` (a
        real path) and what is taken of it."""
        said: list[object] = []
        for turn in self.turns:
            said.append(turn.role)
            for is_text, parts in groupby(turn.parts, lambda part: isinstance(part, str)):
                if is_text:
                    said.append("".join(map(str, parts)))
                else:
                    said += [part.content(root) if isinstance(part, MediaRef) else part for part in parts]
        return said

    def settled(self, plans: Sequence[MediaPlan]) -> Conversation:
        """The same with every `PlannedText` settled."""
        if all(isinstance(part, str | MediaRef) for turn in self.turns for part in turn.parts):
            return self
        parts = [[p if isinstance(p, str | MediaRef) else p.settle(plans) for p in turn.parts] for turn in self.turns]
        return replace(self, turns=tuple(Turn(t.role, tuple(p)) for t, p in zip(self.turns, parts, strict=True)))


# ------------------------------------------------------------------------------------------------- media, planned


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a scan of a file found, without decoding it."""

    kind: MediaKind
    height: int
    """Pixels, after rotation."""
    width: int
    num_frames: int = 1
    """Frames counted in the stream, not the container's claim."""
    fps: float = 0.0
    """The container's average rate in frames per second (pictures: 0)."""
    stream_index: int = 0
    duration_s: float = 0.0
    times_s: tuple[float, ...] | None = None
    """Presentation times from the first frame on, where the rate varies; None: frame i is at i / fps."""

    def time_of(self, index: int) -> float:
        """Presentation time of frame `index` in seconds from the first frame."""
        if self.times_s is not None:
            return self.times_s[index]
        return index / self.fps if self.fps > 0 else 0.0


@dataclass(frozen=True, slots=True)
class VisionLimits:
    """Frames and pixels that one medium may take: the configuration with the record's own options laid over it."""

    fps: float | None
    """Frames per second to sample."""
    frames: int | None
    """How many to sample. Neither of both: every frame, up to `max_frames`."""
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    total_pixels: int | None
    resized_height: int | None = None
    resized_width: int | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """A window on a frame: resize it to `height` x `width`, then take what begins at `top`, `left`, zero outside of it.

    The window's own size is the plan's."""

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class MediaPlan:
    """Exactly what will be decoded of one medium and how many tokens it becomes. Fixed before any decoding."""

    ref: MediaRef
    info: MediaInfo
    frame_indices: tuple[int, ...]
    """Positions in presentation order; one for a picture."""
    height: int
    """Pixels after resizing."""
    width: int
    grid_thw: tuple[int, int, int]
    """Patches in time, height and width."""
    num_tokens: int
    seconds_per_grid: float = 0.0
    """Seconds that one temporal patch stands for; 0 for a picture."""
    views: tuple[View, ...] = ()
    """Windows on each frame, cut into patches one behind another; none: the whole frame, stretched to the size."""

    @property
    def num_pictures(self) -> int:
        """Views of all frames."""
        return len(self.frame_indices) * max(1, len(self.views))

    @property
    def frame_times_s(self) -> tuple[float, ...]:
        """Presentation times of the sampled frames."""
        return tuple(self.info.time_of(i) for i in self.frame_indices)


@dataclass(frozen=True, slots=True)
class Patches:
    """One medium, resized and cut into patches, not yet normalised."""

    pixels_PD: Tensor
    """uint8."""
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float


# ------------------------------------------------------------------------------------------------ attention, packed


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `q_start : q_start + q_length` attend the keys `prefix_start : + prefix_length`, then their own rows."""

    q_start: int
    q_length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def k_length(self) -> int:
        """Keys that the segment's last row attends."""
        return self.prefix_length + self.q_length


@dataclass(eq=False)
class AttentionPlan:
    """Who attends whom in a packed row (`vft.models.attention_plan`). It is built once a batch and used by every layer.

    With `causal`, row i of a segment attends its first `k_length - q_length + i + 1` keys (aligned lower right).
    """

    segments: tuple[Segment, ...]
    causal: bool
    cu_seqlens_q_S: Tensor
    """int32, [segments + 1]."""
    cu_seqlens_k_S: Tensor
    k_index: Tensor | None
    """Rows of the keys of all segments, in order; None if they are the row itself."""
    max_q: int
    max_k: int
    past: int = 0
    """Rows of keys of earlier passes, which come before the row's own. Prefixes lie among them."""
    groups: list[tuple[Any, Any, int, int, int, Tensor | None]] | None = None
    """For SDPA, set on first use: rows of queries and of keys (slice or index), number of segments, q and k length,
    mask [Q, K]."""
    restore_T: Tensor | None = None
    """Set with `groups`: index of each row in the groups' joined outputs; None if they are in order."""


@dataclass(eq=False)
class VisionLayout:
    """How the patches of a batch lie in the vision encoder. A family's own has more, for its encoder alone."""

    plans: dict[str, AttentionPlan]
    """Who attends whom, by a name of each kind of attention."""
    projector_rows: int
    """Rows that pass through what lies between encoder and language model."""


@dataclass(eq=False, slots=True)
class Document:
    """A trunk (system text, video) and its branches (each a question with its answer), one behind another.

    A branch sees the trunk and itself; its positions go on where the trunk ends."""

    sample_ids: tuple[str, ...]
    """One for each branch."""
    ids_T: Tensor
    labels_T: Tensor
    """The token itself where it is supervised, else IGNORE_INDEX. Not shifted."""
    positions_3T: Tensor
    prefix_length: int
    suffix_lengths: tuple[int, ...]
    media: tuple[MediaPlan, ...]
    media_mask_T: Tensor
    """True where a token is replaced by a vision embedding."""

    @property
    def num_tokens(self) -> int:
        """Rows that the document takes."""
        return self.ids_T.numel()

    @property
    def suffix_rows(self) -> list[slice]:
        """Rows of each branch."""
        ends = accumulate(self.suffix_lengths, initial=self.prefix_length)
        return [slice(start, end) for start, end in pairwise(ends)]

    @staticmethod
    def blank() -> Document:
        """One token without a label: what a process without work runs while others have some."""
        ids_T = torch.zeros(1, dtype=torch.long)
        return Document(("",), ids_T, ids_T + IGNORE_INDEX, ids_T.expand(3, 1), 0, (1,), (), ids_T.bool())


@dataclass(eq=False)
class Batch:
    """One pack: a row of documents, ready for the model. Nothing in it is padding."""

    input_ids_T: Tensor
    positions_3T: Tensor
    plan: AttentionPlan
    target_index_N: Tensor
    """Rows whose hidden state predicts a supervised token."""
    target_ids_N: Tensor
    media_index_M: Tensor
    """Rows that hold vision embeddings, in media order."""
    pixels_PD: Tensor
    """uint8."""
    layout: VisionLayout | None = None
    """None where there are no media."""
    documents: tuple[Document, ...] = ()
    continues: bool = False
    """Goes on from a pass before, in every process: none has media now."""

    @property
    def labels_T(self) -> Tensor:
        """Those of the documents; none where there is no document."""
        return torch.cat([self.input_ids_T.new_empty(0), *(document.labels_T for document in self.documents)])

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Patches of the media in time, height and width."""
        return tuple(plan.grid_thw for document in self.documents for plan in document.media)

    @property
    def num_targets(self) -> int:
        """Supervised tokens."""
        return self.target_index_N.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Samples in row order."""
        return tuple(i for document in self.documents for i in document.sample_ids)

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        return move(self, device)


def move(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`; what an attention plan made for another device is dropped."""
    if isinstance(value, Tensor):
        pin = device.type == "cuda" and value.device.type == "cpu"  # a copy from other memory would be waited for
        return (value.pin_memory() if pin else value).to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, Batch | VisionLayout | AttentionPlan):
        moved = {f.name: move(getattr(value, f.name), device) for f in fields(value)}
        if isinstance(value, AttentionPlan) and device != value.cu_seqlens_q_S.device:
            moved["groups"] = None
        return replace(value, **moved)
    return value
