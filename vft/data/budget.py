"""How many frames and pixels a medium may take: configuration, the record's own options, and the room in a row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vft.common.errors import UserError
from vft.common.types import Conversation, MediaInfo, MediaPlan, MediaRef, VisionLimits
from vft.config.data import DataConfig
from vft.data.chat import ChatEncoder
from vft.data.spans import check_spans
from vft.models.processor import VisionProcessor


@dataclass(frozen=True, slots=True)
class Bound:
    """Tokens that something may take, and what says so."""

    tokens: int
    name: str
    fix: str

    @staticmethod
    def of_row(config: DataConfig) -> Bound:
        """A row of training."""
        return Bound(config.pack_tokens, f"data.pack_tokens = {config.pack_tokens}", "raise it or shorten the text")

    @staticmethod
    def of_context(processor: VisionProcessor, new_tokens: int) -> Bound:
        """The model's context, of which `new_tokens` are kept for an answer that is yet to come."""
        if processor.context_tokens is None:
            return Bound(sys.maxsize, "", "")
        kept = f" less {new_tokens} for the answer" if new_tokens else ""
        longer = "or a shorter answer" if new_tokens else "or set model.rope_factor"
        name = f"the model's context of {processor.context_tokens}{kept}"
        return Bound(processor.context_tokens - new_tokens, name, f"take a shorter text, fewer frames, {longer}")


ROW = Bound(sys.maxsize, "data.pack_tokens", "raise it or shorten the text")


def fit(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    config: DataConfig,
    info: Callable[[MediaRef], MediaInfo],
    answer_next: bool = False,
    together: int = 1,
    new_tokens: int = 0,
) -> tuple[tuple[MediaPlan, ...], int]:
    """Plans of the media that some conversations have in common, such that any `together` of them fit `pack_tokens`,
    and each fits the model's context with `new_tokens` more.

    Several share one copy of the media and of the text up to it. Also the tokens that the media were planned to fit
    into: with them `plan_within` gives the same plans. Text that depends on the plans (times of frames, subtitles) is
    counted as it will be. UserError where nothing fits.
    """
    row, context = Bound.of_row(config), Bound.of_context(encoder.processor, new_tokens)

    def planned(room: int) -> tuple[tuple[MediaPlan, ...], int, Bound]:
        """Plans for this room, and by how many tokens they and their text are too long for which bound."""
        plans = plan_within(room, conversations[0], encoder.processor, config, info, tightest()[1])
        vision = sum(len(encoder.media_tokens(plan)[0]) for plan in plans)
        room_left, bound = tightest(plans)
        return plans, vision - room_left, bound

    def tightest(plans: Sequence[MediaPlan] | None = None) -> tuple[int, Bound]:
        """Room that the texts leave: that of the longest `together` in a row, or of the longest in the context."""
        encoded = [encoder.encode(one, answer_next, plans) for one in conversations]
        shared = encoded[0].prefix_tokens if together > 1 else 0
        texts = sorted(one.text_tokens for one in encoded)
        in_row = row.tokens - shared - sum(text - shared for text in texts[-together:])
        in_context = context.tokens - texts[-1]
        return (in_row, row) if in_row <= in_context else (in_context, context)

    high, _ = tightest()
    plans, over, bound = planned(high)
    if over <= 0:
        return plans, high
    # Fewer frames have less text of their own, by how much nobody knows: search for the most room that fits.
    low, found = 0, None
    while low < high:
        room = (low + high) // 2
        try:
            plans, over_now, bound = planned(room)
        except UserError:  # less than the smallest size of these media
            low = room + 1
            continue
        if over_now > 0:
            high, over = room, over_now
        else:
            low, found = room + 1, (plans, room)
    if found is None:
        raise UserError(
            f"{conversations[0].origin}: {bound.tokens + over} tokens with the fewest and smallest frames, more than "
            f"{bound.name}; {bound.fix}"
        )
    return found


def plan_within(
    room: int,
    conversation: Conversation,
    processor: VisionProcessor,
    config: DataConfig,
    info: Callable[[MediaRef], MediaInfo],
    bound: Bound | None = None,
) -> tuple[MediaPlan, ...]:
    """Plans of a conversation's media that together take at most `room` tokens, what `bound` leaves of its own (by
    default that of a row); UserError where they can't, and where the conversation tells of parts that its video doesn't
    have."""
    bound = bound or Bound.of_row(config)
    if room < 0:
        text = bound.tokens - room
        raise UserError(f"{conversation.origin}: {text} tokens of text, more than {bound.name}; {bound.fix}")
    check_spans(conversation, info)
    media = [(ref, info(ref), limits_of(ref, config)) for ref in conversation.media]
    return plan_media(media, processor, room, conversation.origin, bound)


def limits_of(ref: MediaRef, config: DataConfig) -> VisionLimits:
    """The configuration's limits with the record's own options laid over them."""
    options, video = ref.options, config.video
    pixels = video if ref.kind == "video" else config.image
    # Pictures that a record names are all shown, unless it asks for less itself. Of pictures whose rate isn't given
    # `fps` is the rate that they have (`video.join_pictures`), and asks for nothing.
    whole = ref.is_list and not (ref.is_folder or video.sample_lists)
    asks_rate = options.fps is not None and (not whole or bool(options.sample_fps or options.timestamps))
    asks_count = options.nframes is not None
    least = options.min_frames or video.min_frames
    # A record's own minimum goes before the configuration's maximum, and the other way round.
    most = options.max_frames or (sys.maxsize if whole else max(video.max_frames, least if options.min_frames else 0))
    smallest = options.min_pixels or min(pixels.min_pixels, options.max_pixels or pixels.max_pixels)
    return VisionLimits(
        fps=options.fps if asks_rate else None if asks_count or whole else video.fps,
        # As many as are asked for: of an odd number the last is shown twice. (qwen-vl-utils makes it even.)
        frames=options.nframes if asks_count else None if asks_rate or whole else video.frames,
        min_frames=min(least, most),
        max_frames=most,
        min_pixels=smallest,
        max_pixels=options.max_pixels or max(pixels.max_pixels, smallest),
        total_pixels=options.total_pixels or (video.total_pixels if ref.kind == "video" else None),
        resized_height=options.resized_height,
        resized_width=options.resized_width,
        start_s=options.video_start,
        end_s=options.video_end,
    )


def plan_media(
    media: Sequence[tuple[MediaRef, MediaInfo, VisionLimits]],
    processor: VisionProcessor,
    room_tokens: int,
    origin: str,
    bound: Bound = ROW,
) -> tuple[MediaPlan, ...]:
    """Plans of a sample's media that together take at most `room_tokens`.

    Too long a sample loses frames, evenly over its videos and down to `min_frames`, then resolution. It never loses
    vision tokens or text. UserError names the sample where even the smallest pictures don't fit.
    """
    limits = [limit for _, _, limit in media]
    plans = []
    for ref, info, limit in media:
        try:
            plans.append(processor.plan(ref, info, limit))
        except UserError as error:  # of what is asked of this medium
            raise UserError(f"{origin}: {ref.name}: {error}") from None
    while (total := sum(plan.num_tokens for plan in plans)) > room_tokens:
        share = max(room_tokens, 0) / total
        shorter = [_fewer_frames(plan, limit, share) for plan, limit in zip(plans, limits, strict=True)]
        if shorter == limits:
            shorter = [_smaller_frames(plan, limit, share) for plan, limit in zip(plans, limits, strict=True)]
        smaller = [processor.plan(plan.ref, plan.info, limit) for plan, limit in zip(plans, shorter, strict=True)]
        if shorter == limits or sum(plan.num_tokens for plan in smaller) >= total:
            raise UserError(
                f"{origin}: {total} tokens of video and pictures at the smallest size, but {bound.name} leaves room "
                f"for {max(room_tokens, 0)}; {bound.fix}"
            )
        plans, limits = smaller, shorter
    return tuple(plans)


def _fewer_frames(plan: MediaPlan, limits: VisionLimits, share: float) -> VisionLimits:
    frames = len(plan.frame_indices)
    wanted = max(int(frames * share) // 2 * 2, min(limits.min_frames, frames), 1)
    if plan.ref.kind == "image" or wanted >= frames:
        return limits
    return replace(limits, fps=None, frames=wanted)


def _smaller_frames(plan: MediaPlan, limits: VisionLimits, share: float) -> VisionLimits:
    area = plan.height * plan.width
    wanted = max(1, min(area - 1, int(area * share)))
    return replace(
        limits,
        min_pixels=min(limits.min_pixels, wanted),
        max_pixels=wanted,
        total_pixels=None,
        resized_height=None,
        resized_width=None,
    )
