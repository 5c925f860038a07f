"""Memory comes back when nothing looks at it and not before."""

from __future__ import annotations

import gc

import torch

from consumers.assemble import Buffers


def test_memory_comes_back_when_the_last_tensor_is_gone() -> None:
    buffers = Buffers(pin_memory=False)
    first = buffers.take(1000)
    place = first.data_ptr()
    kept = first.view(torch.bfloat16)[100:200].view(10, 10)
    del first
    gc.collect()
    assert buffers.take(1000).data_ptr() != place  # a slice of it lives
    kept.fill_(1.0)
    del kept
    again = [buffers.take(1000) for _ in range(2)]
    assert place in [one.data_ptr() for one in again]
    assert again[0].data_ptr() != again[1].data_ptr()


def test_other_sizes_do_not_pile_up() -> None:
    buffers = Buffers(pin_memory=False)
    for size in range(1, 40):
        buffers.take(size * (8 << 20))
    assert len(buffers._free) <= 5
    small = buffers.take(10)
    assert len(buffers._free) <= 5  # a small tensor does not hold a large buffer
    assert small.untyped_storage().nbytes() == 10
