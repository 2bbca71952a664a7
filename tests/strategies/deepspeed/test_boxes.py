"""Blocks that a flat slice fills: together they are the slice, in its order, whatever the shape."""

from __future__ import annotations

import math

import numpy as np
import pytest

from strategies.deepspeed.boxes import Box, cut

SHAPES = [(7,), (3, 4), (1, 5), (2, 3, 4), (4, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_slice_is_its_boxes(shape: tuple[int, ...]) -> None:
    elements = np.arange(math.prod(shape)).reshape(shape)
    for start in range(elements.size + 1):
        for stop in range(start, elements.size + 1):
            boxes = list(cut(shape, start, stop))
            found = [int(number) for box in boxes for number in elements[index_of(box)].ravel()]
            assert found == list(range(start, stop))
            assert len(boxes) <= 2 * len(shape) - 1


def test_a_single_number_is_one_box() -> None:
    assert list(cut((), 0, 1)) == [Box(offsets=(), sizes=())]


def test_whole_rows_stay_together() -> None:
    assert list(cut((6, 4), 4, 20)) == [Box(offsets=(1, 0), sizes=(4, 4))]


def test_a_box_moves_with_its_tensor() -> None:
    box = Box(offsets=(1, 0), sizes=(2, 4)).moved((3, 5))
    assert (box.offsets, box.ends, box.numel) == ((4, 5), (6, 9), 8)


def index_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in zip(box.offsets, box.ends, strict=True))
