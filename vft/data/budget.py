"""How many frames and pixels a medium may take: the configuration, the record's own options, and the tokens that fit.

Media are planned without a limit on their tokens first. Where a row or the model's context is too short for them and
the text, they are planned again with fewer frames, then with a lower resolution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vft.common.errors import UserError
from vft.common.types import Conversation, MediaInfo, MediaPlan, MediaRef, VisionLimits
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder, Encoded
from vft.models.processor import VisionProcessor


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """Tokens that something may take, with the name of the setting behind it and what to do about it, for messages."""

    tokens: int
    name: str
    fix: str


ROW = TokenLimit(sys.maxsize, "data.pack_tokens", "raise it or shorten the text")

SLACK_S = 0.5
"""Seconds by which an end may exceed the video (or one frame, if that is longer): annotations are rounded."""


@dataclass(frozen=True, slots=True)
class PlannedMedia:
    """Plans of the media of one sample, and the limits from which `VisionProcessor.plan` makes them."""

    plans: tuple[MediaPlan, ...]
    limits: tuple[VisionLimits, ...]
    is_shortened: bool = False
    """Whether there are fewer frames or pixels than the configuration and the record allow."""

    @property
    def num_tokens(self) -> int:
        """Vision tokens of all media."""
        return sum(plan.num_tokens for plan in self.plans)


@dataclass(frozen=True, slots=True)
class Fit:
    """Conversations that see the same media, the media shrunk until they fit, and the texts with them."""

    conversations: tuple[Conversation, ...]
    media: PlannedMedia
    encoded: tuple[tuple[Encoded, ...], ...]
    """Those of the branches of each conversation."""


def fit(
    conversations: Sequence[Conversation],
    media: PlannedMedia,
    encoder: ChatEncoder,
    config: DataConfig,
    together: int = 1,
    new_tokens: int = 0,
    answer_next: bool = False,
) -> Fit:
    """Shrink the `media` that some conversations share until any `together` of these fit a row of `pack_tokens`, and
    each of them the model's context with `new_tokens` more. With `answer_next` the conversations end in a question.

    Conversations in one row share one copy of the media and of the text up to them. Raises UserError if nothing fits.
    """
    processor, origin = encoder.processor, conversations[0].origin
    row = replace(ROW, tokens=config.pack_tokens, name=f"{ROW.name} = {config.pack_tokens}")
    context = _context_limit(processor, new_tokens)

    def encode(plans: Sequence[MediaPlan] | None) -> list[tuple[Encoded, ...]]:
        return [tuple(encoder.encode(each, answer_next, plans) for each in one.branches) for one in conversations]

    def tokens_left(texts: Sequence[Sequence[Encoded]]) -> tuple[int, TokenLimit]:
        """Tokens that the texts leave for media, and which of the two limits says so."""
        shared = texts[0][0].prefix_tokens if together * len(texts[0]) > 1 else 0
        suffixes = sorted(sum(text.text_tokens - shared for text in branches) for branches in texts)
        in_row = row.tokens - shared - sum(suffixes[-together:])
        in_context = context.tokens - max(text.text_tokens for branches in texts for text in branches)
        return (in_row, row) if in_row <= in_context else (in_context, context)

    budget, first_limit = tokens_left(encode(None))
    if budget < 0:
        text = first_limit.tokens - budget
        raise UserError(f"{origin}: {text} tokens of text, more than {first_limit.name}; {first_limit.fix}")

    def attempt(token_budget: int) -> tuple[Fit, int, TokenLimit]:
        """Media of at most so many vision tokens; by how many tokens they and all text exceed which limit."""
        smaller = shrink(media, processor, token_budget, origin, first_limit)
        texts = encode(smaller.plans)
        left, limit = tokens_left(texts)
        excess = sum(map(encoder.media_length, smaller.plans)) - left
        return Fit(tuple(conversations), smaller, tuple(texts)), excess, limit

    best, excess, limit = attempt(budget)
    if excess <= 0:
        return best
    # Text that depends on the plans gets shorter with fewer frames, so the largest budget that fits is searched for.
    low, high, fits = 0, budget, False
    while low < high:
        middle = (low + high) // 2
        try:
            tried, excess_now, limit = attempt(middle)
        except UserError:  # less than the smallest size of these media
            low = middle + 1
            continue
        if excess_now > 0:
            high, excess = middle, excess_now
        else:
            low, best, fits = middle + 1, tried, True
    if not fits:
        raise UserError(
            f"{origin}: {limit.tokens + excess} tokens with the fewest and smallest frames, more than {limit.name}; "
            f"{limit.fix}"
        )
    return best


def _context_limit(processor: VisionProcessor, new_tokens: int) -> TokenLimit:
    """The model's context, less `new_tokens` for an answer that is still to be generated."""
    if processor.context_tokens is None:
        return TokenLimit(sys.maxsize, "", "")
    reserved = f" less {new_tokens} for the answer" if new_tokens else ""
    longer = "or a shorter answer" if new_tokens else "or set model.rope_factor"
    name = f"the model's context of {processor.context_tokens}{reserved}"
    return TokenLimit(processor.context_tokens - new_tokens, name, f"take a shorter text, fewer frames, {longer}")


def limits_of(ref: MediaRef, config: DataConfig) -> VisionLimits:
    """The configuration's limits, overridden by the record's own options."""
    options, video = ref.options, config.video
    pixels = video if ref.kind == "video" else config.image
    # Pictures that a record names are all shown, unless the record limits them. If it does not give their own rate,
    # `fps` is taken for that (`join_scans`) and asks for nothing.
    show_all = ref.is_list and not (ref.is_folder or video.sample_lists)
    sets_rate = options.fps is not None and (not show_all or bool(options.sample_fps or options.timestamps))
    sets_count = options.nframes is not None
    min_frames = options.min_frames or video.min_frames
    # A record's own minimum overrides the configuration's maximum, and the other way round.
    max_frames = options.max_frames or (
        sys.maxsize if show_all else max(video.max_frames, min_frames if options.min_frames else 0)
    )
    min_pixels = options.min_pixels or min(pixels.min_pixels, options.max_pixels or pixels.max_pixels)
    return VisionLimits(
        fps=options.fps if sets_rate else None if sets_count or show_all else video.fps,
        # Exactly this many. The last frame of an odd number is shown twice; qwen-vl-utils makes the number even.
        frames=options.nframes if sets_count else None if sets_rate or show_all else video.frames,
        min_frames=min(min_frames, max_frames),
        max_frames=max_frames,
        min_pixels=min_pixels,
        max_pixels=options.max_pixels or max(pixels.max_pixels, min_pixels),
        total_pixels=options.total_pixels or (video.total_pixels if ref.kind == "video" else None),
        resized_height=options.resized_height,
        resized_width=options.resized_width,
        start_s=options.video_start,
        end_s=options.video_end,
    )


def plan_conversation(
    conversation: Conversation, processor: VisionProcessor, config: DataConfig, info: Callable[[MediaRef], MediaInfo]
) -> PlannedMedia:
    """Plan the media of a conversation without a limit on their tokens.

    Raises UserError if a medium cannot be planned within its own limits. What the record says about times in its video
    is to be checked before (`check_spans`).
    """
    media = [(ref, info(ref), limits_of(ref, config)) for ref in conversation.media]
    return plan_media(media, processor, conversation.origin)


def plan_media(
    media: Sequence[tuple[MediaRef, MediaInfo, VisionLimits]], processor: VisionProcessor, origin: str
) -> PlannedMedia:
    """Plan media within their own limits. UserError names the sample's `origin` and the medium whose limits cannot be
    met."""
    plans = []
    for ref, info, limits in media:
        try:
            plans.append(processor.plan(ref, info, limits))
        except UserError as error:
            raise UserError(f"{origin}: {ref.name}: {error}") from None
    return PlannedMedia(tuple(plans), tuple(limits for _, _, limits in media))


def shrink(
    media: PlannedMedia, processor: VisionProcessor, token_budget: int, origin: str, limit: TokenLimit = ROW
) -> PlannedMedia:
    """Plan media again so that together they take at most `token_budget` tokens, which is what `limit` leaves them.

    Frames go first, evenly over the videos and down to `min_frames`, then resolution; never vision tokens or text.
    Raises UserError with the sample's `origin` if even the smallest pictures do not fit.
    """
    while (total := media.num_tokens) > token_budget:
        share = max(token_budget, 0) / total
        pairs = list(zip(media.plans, media.limits, strict=True))
        limits = tuple(_fewer_frames(plan, own, share) for plan, own in pairs)
        if limits == media.limits:
            limits = tuple(_smaller_frames(plan, own, share) for plan, own in pairs)
        plans = (processor.plan(plan.ref, plan.info, own) for plan, own in zip(media.plans, limits, strict=True))
        smaller = PlannedMedia(tuple(plans), limits, is_shortened=True)
        if limits == media.limits or smaller.num_tokens >= total:
            raise UserError(
                f"{origin}: {total} tokens of video and pictures at the smallest size, but {limit.name} leaves room "
                f"for {max(token_budget, 0)}; {limit.fix}"
            )
        media = smaller
    return media


def _fewer_frames(plan: MediaPlan, limits: VisionLimits, share: float) -> VisionLimits:
    frames = len(plan.frame_indices)
    fewer = max(int(frames * share) // 2 * 2, min(limits.min_frames, frames), 1)
    if plan.ref.kind == "image" or fewer >= frames:
        return limits
    return replace(limits, fps=None, frames=fewer)


def _smaller_frames(plan: MediaPlan, limits: VisionLimits, share: float) -> VisionLimits:
    area = plan.height * plan.width
    smaller = max(1, min(area - 1, int(area * share)))
    return replace(
        limits,
        min_pixels=min(limits.min_pixels, smaller),
        max_pixels=smaller,
        total_pixels=None,
        resized_height=None,
        resized_width=None,
    )


# ------------------------------------------------------------------------------------------------ times in records


def check_spans(conversation: Conversation, info: Callable[[MediaRef], MediaInfo]) -> None:
    """Raise UserError with both lengths if a trim, or a segment that the record describes, is not in the video.

    Raises:
        MediaError: the medium cannot be used.
    """
    for ref in conversation.media:
        start_s, end_s = ref.options.video_start, ref.options.video_end
        is_trimmed = start_s is not None or end_s is not None
        if ref.kind == "image" or not (is_trimmed or conversation.spans_s):
            continue
        video = info(ref)
        problems = [fault(start_s, end_s, video)] if is_trimmed else []
        for number, (first_s, last_s) in enumerate(conversation.spans_s, 1):
            if problem := fault(first_s, last_s, video, end_s):
                problems.append(f"segment {number}: {problem}")
        for problem in filter(None, problems):
            raise UserError(f"{conversation.origin}: {ref.field or ref.name}: {problem}")


def fault(start_s: float | None, end_s: float | None, info: MediaInfo, shown_s: float | None = None) -> str:
    """What is wrong with the range from `start_s` to `end_s` seconds of a video; empty if nothing is, or if the length
    of the video is unknown. `shown_s` is where the video is cut off, if it is."""
    length_s = info.duration_s
    if length_s <= 0:
        return ""
    if shown_s is not None:
        length_s = min(length_s, shown_s)
    first_s, last_s = start_s or 0.0, length_s if end_s is None else end_s
    span = f"{first_s:g} to {last_s:g} s" if end_s is not None else f"from {first_s:g} s on"
    if first_s < 0 or last_s <= first_s < length_s:
        return f"{span}: must begin at 0 or later and end after it begins"
    if first_s < length_s and last_s <= length_s + slack_s(info):
        return ""
    cut = f", shown up to {shown_s:g} s" if shown_s is not None and shown_s < info.duration_s else ""
    unit = _unit(first_s, last_s if end_s is not None else first_s, info)
    looks = f"they look like {unit}; " if unit else ""
    length = f"{info.num_frames} frames in {info.duration_s:.2f} s{cut}"
    return f"{span} is outside the video, which has {length}; {looks}give seconds from the beginning of the file"


def slack_s(info: MediaInfo) -> float:
    """Seconds by which a range may exceed the video."""
    return max(SLACK_S, 1 / info.fps if info.fps > 0 else 0.0)


def _unit(first: float, last: float, info: MediaInfo) -> str:
    """The unit that times far beyond the end of a video look like; empty if they look like none that we know."""
    if last < 2 * info.duration_s:
        return ""
    if first == int(first) and last == int(last) and last <= info.num_frames:
        return "frame numbers"
    return "milliseconds" if last >= 1000 and last / 1000 <= info.duration_s + slack_s(info) else ""
