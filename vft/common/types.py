"""The data types that flow from a record of a data set to the loss. Read this file first.

    Sample        a record as its source read it
    Conversation  what a task makes of it: turns with text and media, ending with the answer
    MediaPlan     which frames of a video or picture will be decoded, at which size; fixed before decoding
    Patches       the decoded frames, cut into patches
    Document      token ids, labels and positions of one or more samples that share their media
    Batch         a pack of documents: one row without padding, ready for the model

Suffixes of tensor names, here and in all of vft:
    T tokens of a row     P vision patches     D features of a patch     M merged vision tokens
    N supervised tokens   S segments           H heads                   K width of a head
    C/H/W channels, height and width of pixels   V vocabulary            E width of the model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""

MediaKind = Literal["video", "image"]
Role = Literal["system", "user", "assistant"]


# ------------------------------------------------------------------------------------------- records and conversations

ANSWER_KEYS = ("answers", "references", "answer", "label")
"""Keys under which a record may list several right answers."""


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How a record wants one of its videos or pictures to be sampled, by the keys of qwen-vl-utils.

    None leaves it to the configuration. Pixels are of one frame, except `total_pixels`.
    """

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
    """Seconds from the first frame. Frames at the start and at the end belong to the range."""
    video_end: float | None = None
    sample_fps: float | None = None
    """Frames per second at which a list of pictures was sampled."""
    timestamps: tuple[float, ...] | None = None
    """Seconds at which the pictures of a list were taken, in ascending order."""


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A video or picture that a record names."""

    kind: MediaKind
    path: Path | tuple[Path, ...]
    """A file; for a video that is stored as pictures, the pictures in order."""
    options: MediaOptions = MediaOptions()
    field: str = ""
    """The field of the record (`videos[0]`), for messages."""
    member: str = ""
    """Name inside an archive (`shard.tar/name.mp4`), if `path` is a temporary copy of it."""
    is_folder: bool = False
    """Whether `path` is all pictures of a folder. They are sampled like the frames of a file, while pictures that a
    record names one by one are all shown."""

    @property
    def is_list(self) -> bool:
        """Whether the video is stored as pictures."""
        return isinstance(self.path, tuple)

    @property
    def file_kind(self) -> MediaKind:
        """What its files are: pictures, if the video is stored as pictures."""
        return "image" if self.is_list else self.kind

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or the pictures in order."""
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @property
    def name(self) -> str:
        """The name in predictions files and quarantine.jsonl: the file, or the first picture."""
        return self.member or str(self.files[0])

    def content(self, root: str) -> tuple[object, ...]:
        """Identifies what is shown, for a digest: file names relative to `root`, and what is sampled of them."""
        names = [self.member] if self.member else [str(file).removeprefix(f"{root}/") for file in self.files]
        return self.kind, names, self.options, self.is_folder


class PlannedText(Protocol):
    """Text that depends on which frames are sampled, such as their times. It is known when the media are planned."""

    def resolve(self, plans: Sequence[MediaPlan]) -> str:
        """The text, given the plans of all media of the conversation in reading order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message: text and media in reading order."""

    role: Role
    parts: tuple[str | MediaRef | PlannedText, ...]

    @property
    def text(self) -> str:
        """The parts that are text, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Sample:
    """A record as its source read it."""

    id: str
    turns: tuple[Turn, ...]
    origin: str
    """File and line (`train.json:12`), for messages."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the record that tasks use."""
    unread: tuple[str, ...] = ()
    """Keys of the record that nothing uses."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model reads and, in the turns of the assistant, learns to answer. A task makes it from a sample."""

    id: str
    turns: tuple[Turn, ...]
    origin: str
    options: tuple[str, ...] = ()
    """The closed set of answers to the last question, as the assistant gives them; empty if any answer is possible."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What scoring needs besides the answer: `groups` (name to value), `segments` (texts), or what the task wants."""
    spans_s: tuple[tuple[float, float], ...] = ()
    """Start and end, in seconds of the file, of the segments that the record describes. All must lie in the video."""
    source: str = ""
    """Name of the source (`vft.config.data.source_names`), by which losses and scores are told apart."""
    is_part: bool = False
    """Whether this is the beginning of another conversation, made to train on an earlier answer of it. It is not asked
    in evaluation."""
    rejected: str | None = None
    """A worse answer than the last one. Objectives of pairs learn to prefer the one to the other. With `desirable`, an
    answer to another prompt instead."""
    desirable: bool | None = None
    """Whether the last answer is one to give. None: the record does not say."""
    last_only: bool = False
    """Whether nothing is supervised before the last answer."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """All media in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, MediaRef))

    @property
    def media_key(self) -> tuple[object, ...]:
        """Equal for conversations about the same media, sampled alike."""
        return tuple((ref.kind, ref.path, ref.options, ref.is_folder) for ref in self.media)

    @property
    def branches(self) -> tuple[Conversation, ...]:
        """What becomes a suffix each: the conversation, or of a pair the one with the chosen and the one with the
        rejected answer."""
        if self.rejected is None:
            return (self,)
        chosen = replace(self, rejected=None, last_only=True)
        return chosen, replace(chosen, turns=(*self.turns[:-1], Turn("assistant", (self.rejected,))))

    def content(self, root: str) -> list[object]:
        """Identifies the conversation, for a digest: roles, texts and media (`MediaRef.content`) in reading order."""
        content: list[object] = [] if self.rejected is None else [["rejected", self.rejected]]
        if self.desirable is not None:
            content.append(["desirable", self.desirable])
        for turn in self.turns:
            content.append(turn.role)
            for is_text, parts in groupby(turn.parts, lambda part: isinstance(part, str)):
                if is_text:
                    content.append("".join(map(str, parts)))
                else:
                    content += [part.content(root) if isinstance(part, MediaRef) else part for part in parts]
        return content

    def resolved(self, plans: Sequence[MediaPlan]) -> Conversation:
        """The conversation with every `PlannedText` as text, given the plans of all its media."""
        if all(isinstance(part, str | MediaRef) for turn in self.turns for part in turn.parts):
            return self
        parts = [[p if isinstance(p, str | MediaRef) else p.resolve(plans) for p in turn.parts] for turn in self.turns]
        return replace(self, turns=tuple(Turn(t.role, tuple(p)) for t, p in zip(self.turns, parts, strict=True)))


# -------------------------------------------------------------------------------------------------- media, planned


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a scan found in a file, without decoding it."""

    kind: MediaKind
    height: int
    """Pixels, after rotation."""
    width: int
    num_frames: int = 1
    """Counted in the stream: containers may claim a wrong number."""
    fps: float = 0.0
    """Average rate in frames per second, as the container says; 0 for a picture."""
    stream_index: int = 0
    duration_s: float = 0.0
    times_s: tuple[float, ...] | None = None
    """Presentation times, counted from the first frame, if the rate varies. None: frame i is at i / fps."""

    def time_of(self, index: int) -> float:
        """Presentation time of a frame in seconds from the first frame."""
        if self.times_s is not None:
            return self.times_s[index]
        return index / self.fps if self.fps > 0 else 0.0


@dataclass(frozen=True, slots=True)
class VisionLimits:
    """Frames and pixels that a video or picture may take: the configuration, overridden by the record's options."""

    fps: float | None
    """Frames per second to sample."""
    frames: int | None
    """Number of frames to sample. If `fps` is None too: every frame, up to `max_frames`."""
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
    """A window on a frame: the frame is resized to `height` x `width`, then cut from `top`, `left` on.

    The window has the size of its MediaPlan; outside of the frame it is zero.
    """

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class MediaPlan:
    """Exactly what will be decoded of a video or picture, and how many tokens it becomes. Fixed before decoding."""

    ref: MediaRef
    info: MediaInfo
    frame_indices: tuple[int, ...]
    """In presentation order; one for a picture."""
    height: int
    """Pixels after resizing."""
    width: int
    grid_thw: tuple[int, int, int]
    """Patches in time, height and width."""
    num_tokens: int
    seconds_per_grid: float = 0.0
    """Seconds that a temporal patch covers; 0 for a picture."""
    views: tuple[View, ...] = ()
    """Windows on each frame, in the order of their patches. Empty: the whole frame, stretched to the size."""

    @property
    def num_pictures(self) -> int:
        """Windows of all frames."""
        return len(self.frame_indices) * max(1, len(self.views))

    @property
    def frame_times_s(self) -> tuple[float, ...]:
        """Presentation times of the sampled frames."""
        return tuple(self.info.time_of(i) for i in self.frame_indices)


@dataclass(frozen=True, slots=True)
class Patches:
    """A video or picture, resized and cut into patches, not yet normalised."""

    pixels_PD: Tensor
    """uint8."""
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float


# ------------------------------------------------------------------------------------------------ attention, packed


@dataclass(frozen=True, slots=True)
class Segment:
    """`q_length` rows from `q_start` on, which attend `prefix_length` keys from `prefix_start` on, then themselves."""

    q_start: int
    q_length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def k_length(self) -> int:
        """Keys that the last row attends."""
        return self.prefix_length + self.q_length


@dataclass(eq=False)
class AttentionPlan:
    """Who attends whom in a packed row (`vft.models.attention`). It is built once a batch and used by every layer.

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
    recurrence: Any = None
    """Set on first use by models with recurrent layers: `vft.models.delta_rule.Recurrence`."""


@dataclass(eq=False)
class VisionLayout:
    """How the patches of a batch lie in the vision encoder. A model family's subclass adds what its encoder needs."""

    plans: dict[str, AttentionPlan]
    """By the name of each kind of attention, such as windows and full frames."""
    projector_rows: int
    """Rows that pass through the projector."""


# ------------------------------------------------------------------------------------------- documents and batches


@dataclass(eq=False, slots=True)
class Document:
    """A shared prefix (system text, video), then suffixes (each a question with its answer). Also trunk and branches.

    A suffix attends the prefix and itself, not the other suffixes. Its positions continue those of the prefix.
    """

    sample_ids: tuple[str, ...]
    """One for each suffix, or of pairs for each two."""
    ids_T: Tensor
    labels_T: Tensor
    """The token itself if it is supervised, else IGNORE_INDEX. Not shifted."""
    positions_3T: Tensor
    prefix_length: int
    suffix_lengths: tuple[int, ...]
    media: tuple[MediaPlan, ...]
    media_mask_T: Tensor
    """True for tokens that vision embeddings replace."""
    rejected: tuple[bool, ...] = ()
    """Which suffix is the rejected answer of a pair, whose chosen one is before it. Empty: none."""
    desirable: tuple[bool | None, ...] = ()
    """`Conversation.desirable` of each sample."""
    conversations: tuple[Conversation, ...] = ()
    """What it was made of."""
    number: int | None = None
    """In the index of the data, if it comes from there to be trained on."""

    @property
    def num_tokens(self) -> int:
        """Rows of the document."""
        return self.ids_T.numel()

    @property
    def suffix_rows(self) -> list[slice]:
        """Rows of each suffix."""
        ends = accumulate(self.suffix_lengths, initial=self.prefix_length)
        return [slice(start, end) for start, end in pairwise(ends)]

    @staticmethod
    def blank() -> Document:
        """One token without a label, for a process that has no work while others have."""
        ids_T = torch.zeros(1, dtype=torch.long)
        return Document(("",), ids_T, ids_T + IGNORE_INDEX, ids_T.expand(3, 1), 0, (1,), (), ids_T.bool())


@dataclass(eq=False)
class Batch:
    """A pack: documents in one row, ready for the model. It has no padding."""

    input_ids_T: Tensor
    positions_3T: Tensor
    plan: AttentionPlan
    target_index_N: Tensor
    """Rows whose hidden states predict the supervised tokens."""
    target_ids_N: Tensor
    media_index_M: Tensor
    """Rows that vision embeddings replace, in the order of the media."""
    pixels_PD: Tensor
    """uint8."""
    layout: VisionLayout | None = None
    """None if there are no media."""
    documents: tuple[Document, ...] = ()
    target_suffix_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Which suffix of the row each supervised token belongs to, in a row to train on."""
    continues: bool = False
    """Whether this pass uses the keys of an earlier one, in every process. It then has no media."""
    embeddings: tuple[Tensor, ...] | None = None
    """What `encode_media` makes of the pixels, if that is known already."""

    @property
    def labels_T(self) -> Tensor:
        """The labels of all documents."""
        return torch.cat([self.input_ids_T.new_empty(0), *(document.labels_T for document in self.documents)])

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Patches of each medium in time, height and width."""
        return tuple(plan.grid_thw for document in self.documents for plan in document.media)

    @property
    def num_targets(self) -> int:
        """Number of supervised tokens."""
        return self.target_index_N.numel()

    @property
    def num_suffixes(self) -> int:
        """Suffixes of all documents."""
        return sum(len(document.suffix_lengths) for document in self.documents)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the documents."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of the samples in row order."""
        return tuple(i for document in self.documents for i in document.sample_ids)

    def to(self, device: torch.device) -> Batch:
        """The same batch with all tensors on `device`."""
        return move(self, device)


Movable = TypeVar("Movable")


def move(value: Movable, device: torch.device) -> Movable:
    """`value` with all tensors in it on `device`. What an attention plan has prepared for another device is dropped."""

    def moved(tensor: Tensor) -> Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu":  # a copy from pageable memory would block
            tensor = tensor.contiguous().pin_memory()  # which keeps strides, and cannot with several rows in one place
        return tensor.to(device, non_blocking=True)

    return cast(Movable, _mapped(value, moved))


def each_tensor(value: Movable, visit: Callable[[Tensor], object]) -> None:
    """Call `visit` for all tensors that `move` would move."""

    def visited(tensor: Tensor) -> Tensor:
        visit(tensor)
        return tensor

    _mapped(value, visited)


def _mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, Batch | VisionLayout | AttentionPlan):
        changes: dict[str, Any] = {f.name: _mapped(getattr(value, f.name), change) for f in fields(value)}
        if isinstance(value, AttentionPlan) and changes["cu_seqlens_q_S"].device != value.cu_seqlens_q_S.device:
            changes["groups"] = changes["recurrence"] = None
        return replace(value, **changes)
    return value
