"""Objectives of preferences: a chosen and a rejected answer to one prompt, as two suffixes of one shared prefix; or,
with KTO, an answer that is desirable or not, and that to another prompt.

Log-probabilities are of an answer and the token that closes it, given everything before it. In the formulas c and r are
those of the chosen and the rejected answer, c0 and r0 those of the reference, nc and nr their tokens, and b is `beta`.
The reference is the same model without its adapter, or with the one that training goes on from: one more pass over the
same row, without a graph. Or it has computed before the first step (`vft.training.reference`).

TRL's trainers also count the line break that some templates write behind the closing token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vft.adapters.lora import is_adapter, without_adapters
from vft.common.types import Batch, move
from vft.config.data import source_names
from vft.config.run import Config, ModelConfig, ObjectiveConfig
from vft.distributed.process_group import local_part
from vft.models.base import Objective, VideoLanguageModel
from vft.training.losses import CrossEntropy, log_probabilities


class Pairs(NamedTuple):
    """Log-probabilities and tokens of the answers of some pairs [pairs], and of the reference (zeros without one)."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def gains(self) -> tuple[Tensor, Tensor]:
        """c - c0 and r - r0."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """c / nc and r / nr."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def dpo(pairs: Pairs, config: ObjectiveConfig) -> Tensor:
    """-log sigmoid(b m) with m = (c - c0) - (r - r0) (Rafailov et al. 2023, arXiv 2305.18290, equation 7). With label
    smoothing e, (1 - e) of it and e of -log sigmoid(-b m) (Mitchell 2023, "A note on DPO with noisy preferences")."""
    chosen, rejected = pairs.gains
    margin, smoothing = config.strength * (chosen - rejected), config.label_smoothing or 0.0
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def hinge(pairs: Pairs, config: ObjectiveConfig) -> Tensor:
    """max(0, 1 - b m) (Zhao et al. 2023, SLiC-HF, arXiv 2305.10425, with DPO's m)."""
    chosen, rejected = pairs.gains
    return F.relu(1 - config.strength * (chosen - rejected))


def ipo(pairs: Pairs, config: ObjectiveConfig) -> Tensor:
    """((c - c0) / nc - (r - r0) / nr - 1 / (2 b))^2: the following by token, as TRL has it."""
    chosen, rejected = pairs.gains
    return (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens - 0.5 / config.strength).square()


def ipo_sum(pairs: Pairs, config: ObjectiveConfig) -> Tensor:
    """(m - 1 / (2 b))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17)."""
    chosen, rejected = pairs.gains
    return (chosen - rejected - 0.5 / config.strength).square()


def simpo(pairs: Pairs, config: ObjectiveConfig) -> Tensor:
    """-log sigmoid(b (c / nc - r / nr) - gamma) (Meng et al. 2024, arXiv 2405.14734, equation 6)."""
    chosen, rejected = pairs.means
    return -F.logsigmoid(config.strength * (chosen - rejected) - (1.0 if config.gamma is None else config.gamma))


def orpo(pairs: Pairs, config: ObjectiveConfig) -> Tensor:
    """-c / nc - b log sigmoid(log odds(c / nc) - log odds(r / nr)), log odds(a) = a - log(1 - exp a) (Hong et al. 2024,
    arXiv 2403.07691, equations 6 and 7). TRL's likelihood term is of prompt and answer."""
    chosen, rejected = pairs.means
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - config.strength * F.logsigmoid(odds)


KINDS: dict[str, Callable[[Pairs, ObjectiveConfig], Tensor]] = {
    "dpo": dpo,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "simpo": simpo,
    "orpo": orpo,
}
"""The loss of each pair, by `objective.kind`."""
FIGURES = (
    "reward_chosen",
    "reward_rejected",
    "reward_accuracy",
    "likelier_chosen",
    "log_p_chosen",
    "log_p_rejected",
    "tokens_chosen",
    "tokens_rejected",
    "margin",
)
"""Means over the pairs of a step, in metrics.jsonl. A reward is b (c - c0), or what stands in its place; accuracies are
the share of pairs whose chosen answer has more of it, and of those with c > r. A tie counts half. The margin is
(c - c0) - (r - r0), as that of held-out pairs."""


class Preference(Objective):
    """The objective of pairs that a configuration names."""

    figures: tuple[str, ...] = FIGURES

    def __init__(self, config: ObjectiveConfig, known: Callable[[Batch], Tensor] | None = None) -> None:
        """With `known` no step has a pass of the reference: that has the log-probability of each suffix [suffixes]."""
        self.config, self.known = config, known
        self._start: list[tuple[Tensor, Tensor]] = []

    def needs_start(self, base: ModelConfig) -> bool:
        """Whether the reference is an adapter that training goes on from, and not the model without any."""
        return bool(base.adapter) and self.config.needs_reference and self.config.reference != "base"

    def remember(self, model: VideoLanguageModel) -> None:
        """From now on the reference is the model with its adapters as they are, not the one without them."""
        local = [local_part(p.detach()) for name, p in model.named_parameters() if is_adapter(name)]
        self._start = [(one, one.clone()) for one in local]

    def reference(self, model: VideoLanguageModel) -> AbstractContextManager[None]:
        """In it the model is the reference."""
        return as_at_start(model, self._start) if self._start else without_adapters(model)

    def weight(self, batch: Batch) -> int:
        """Pairs of a pack: a step's loss is the mean over its pairs."""
        return batch.num_suffixes // 2

    def __call__(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """Sums over the pairs of a pack: of the loss, and of FIGURES without a graph."""
        config, reference_S = self.config, None
        if config.needs_reference:
            batch, reference_S = self.of_reference(model, batch)
        pairs = _pairs(by_suffix(model, batch), reference_S, batch)
        losses = KINDS[config.kind](pairs, config)
        if config.rpo_alpha:  # Pang et al. 2024, arXiv 2404.19733, equation 1
            losses = losses - config.rpo_alpha * pairs.means[0]
        with torch.no_grad():
            rewards = pairs.means if config.kind == "simpo" else pairs.gains
            chosen, rejected = (config.strength * one for one in rewards)
            shares = (_won(chosen, rejected), _won(pairs.chosen, pairs.rejected))
            tokens = pairs.chosen_tokens, pairs.rejected_tokens
            gained, lost = pairs.gains
            figures = [chosen, rejected, *shares, pairs.chosen, pairs.rejected, *tokens, gained - lost]
        return torch.stack([losses.sum(), *(one.sum() for one in figures)])

    def of_reference(self, model: VideoLanguageModel, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch for the next pass, and the reference's log-probability of each suffix [suffixes], without a
        graph."""
        if self.known is not None and not self.looks_ahead:
            return batch, self.known(batch)
        batch = model.with_embeddings(batch)
        if self.known is not None:
            return batch, self.known(batch)
        with torch.no_grad(), self.reference(model):
            return batch, by_suffix(model, batch)


class KTO(Preference):
    """With g = c - c0 of an answer, a desirable one costs wd (1 - sigmoid(b (g - z))), another wu (1 - sigmoid(b (z -
    g))), where z is the mean of g over the answers to other prompts in the whole step, or 0 if that is negative
    (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8 and section 4.1).
    """

    figures = (
        "desirable",
        "kl",
        *(f"{name}_{kind}" for name in ("reward", "log_p", "tokens") for kind in ("chosen", "rejected")),
    )
    """`desirable` is the share of such answers, `kl` is z; the others are means over desirable (chosen) and undesirable
    (rejected) answers, of what they are of pairs."""
    looks_ahead = True

    def __init__(self, config: ObjectiveConfig, known: Callable[[Batch], Tensor] | None = None) -> None:
        super().__init__(config, known)
        self._kl = torch.zeros(())
        self._looked: deque[tuple[Batch, Tensor]] = deque()
        """What `of_reference` gave for the packs ahead."""

    @torch.no_grad()
    def look(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """Sum and number of g of the answers to other prompts [2]."""
        batch, reference_S = self.of_reference(model, batch)
        self._looked.append((batch, reference_S))
        gains = (by_suffix(model, batch) - reference_S)[1::2]
        return torch.stack([gains.sum(), gains.new_tensor(len(gains))])

    def set_ahead(self, total: Tensor) -> None:
        """Take z."""
        self._kl = (total[0] / total[1].clamp(min=1)).clamp(min=0)

    def __call__(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """Sums over the answers of a pack: of the loss, and of the figures without a graph."""
        config = self.config
        batch, reference_S = self._looked.popleft() if self._looked else self.of_reference(model, batch)
        pairs = _pairs(by_suffix(model, batch), reference_S, batch)
        labels = [label is not False for document in batch.documents for label in document.desirable]
        is_desirable = move(torch.tensor(labels, dtype=pairs.chosen.dtype), pairs.chosen.device)
        sign = 2 * is_desirable - 1
        weights = is_desirable * config.weights[0] + (1 - is_desirable) * config.weights[1]
        gain = pairs.gains[0]
        losses = weights * torch.sigmoid(-sign * config.strength * (gain - self._kl.to(gain)))
        with torch.no_grad():
            own = config.strength * gain, pairs.chosen, pairs.chosen_tokens
            figures = [is_desirable, self._kl.to(gain).expand_as(gain)]
            figures += [part * one for one in own for part in (is_desirable, 1 - is_desirable)]
        return torch.stack([losses.sum(), *(one.sum() for one in figures)])

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """The figures of a step by name; nan for the mean over no answer."""
        share, kl, *parts = means
        of_sort = [part / of if of else math.nan for part, of in zip(parts, [share, 1 - share] * 3, strict=True)]
        return super().named([share, kl, *of_sort])


def nothing_known(batch: Batch) -> Tensor:
    """In place of log-probabilities that a row made for planning does not have, zero for each suffix [suffixes]."""
    return torch.zeros(batch.num_suffixes, device=batch.input_ids_T.device)


def _won(chosen: Tensor, rejected: Tensor) -> Tensor:
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def by_suffix(model: VideoLanguageModel, batch: Batch) -> Tensor:
    """Summed log-probability of each suffix's supervised tokens [suffixes]."""
    log_p_N = log_probabilities(model, batch)
    return log_p_N.new_zeros(batch.num_suffixes).index_add(0, batch.target_suffix_N, log_p_N)


def _pairs(policy_S: Tensor, reference_S: Tensor | None, batch: Batch) -> Pairs:
    """Suffixes come in pairs, the chosen first."""
    ones_N = torch.ones_like(batch.target_suffix_N, dtype=policy_S.dtype)
    tokens_S = torch.zeros_like(policy_S).index_add(0, batch.target_suffix_N, ones_N)
    reference_S = torch.zeros_like(policy_S) if reference_S is None else reference_S
    columns = [x.detach() if x is tokens_S else x for x in (policy_S, reference_S, tokens_S)]
    return Pairs(*(part for x in columns for part in (x[0::2], x[1::2])))


@contextmanager
def as_at_start(model: VideoLanguageModel, start: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """In it the first of each pair of tensors, which are the model's own, have the values of the second, and nothing is
    dropped out."""
    now, was_training = [own.clone() for own, _ in start], model.training
    model.eval()
    for own, then in start:
        own.copy_(then)
    try:
        yield
    finally:
        model.train(was_training)
        for (own, _), value in zip(start, now, strict=True):
            own.copy_(value)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # else what is gathered for longer than a pass would stay as it was
                module.reshard()


def objective_of(config: Config) -> Objective:
    """The objective that a configuration names."""
    if config.objective is None:
        sources = tuple(source_names(config.data.sources).values())
        return CrossEntropy(sources if len(sources) > 1 else ())
    kind = KTO if config.objective.kind == "kto" else Preference
    return kind(config.objective, nothing_known if config.reference_once else None)
