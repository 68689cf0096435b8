"""Settings of torch's allocators."""

from __future__ import annotations

import pytest
import torch

from vft.distributed.process_group import ALLOCATOR_VARIABLES, set_allocator

BOTH = "expandable_segments:True,pinned_max_round_threshold_mb:1"


@pytest.mark.parametrize("knows_pinned", [True, False])
def test_memory_is_not_cut_up_nor_rounded_up(knows_pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that lacks the setting for pinned memory still gets the other."""
    taken = []

    def take(settings: str) -> None:
        if "pinned" in settings and not knows_pinned:
            raise ValueError("Unrecognized key")
        taken.append(settings)

    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", take)
    set_allocator()
    assert taken == [BOTH if knows_pinned else "expandable_segments:True"]


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_environment_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda settings: pytest.fail(settings))
    set_allocator()


def test_this_torch_knows_both() -> None:
    torch._C._accelerator_setAllocatorSettings(BOTH)
