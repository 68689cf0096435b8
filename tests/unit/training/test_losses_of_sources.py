"""The loss of each source, also on rows that belong to none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.tiny import CPU, Tiny, load_model
from vft.config.data import DataConfig
from vft.preparation.synthetic import filled_row
from vft.training.losses import CrossEntropy, cross_entropy


def test_a_row_that_only_tries_memory(tiny: Tiny) -> None:
    """Before the first step such rows are run with the objective of the run."""
    model = load_model(str(tiny.path), None, torch.float32, CPU).model
    data = DataConfig(pack_tokens=256, video={"frames": 4, "max_pixels": 3136})
    row, last = filled_row(model.processor, data), model.config.vocab_size - 1
    row = replace(row, input_ids_T=row.input_ids_T.clamp(max=last), target_ids_N=row.target_ids_N.clamp(max=last))
    found = CrossEntropy(("a", "b"))(model, row)
    assert float(found[0]) == pytest.approx(float(cross_entropy(model, row)), rel=1e-6)
    assert len(found) == 5
