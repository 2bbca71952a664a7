"""Schedules: the order of Megatron's stages, no overlaps, every dependency kept, and the bubble of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from launcher.planner.price.schedule import Block, Work, order, schedule

SHAPES = [(1, 3, 1), (2, 1, 1), (4, 8, 1), (4, 2, 1), (8, 8, 1), (2, 4, 2), (4, 8, 2), (4, 4, 3), (8, 32, 4)]


def equal(stages: int, num_microbatches: int, chunks: int) -> tuple[Block, ...]:
    return schedule(
        forward_s=[1.0] * stages,
        backward_s=[2.0] * stages,
        num_microbatches=num_microbatches,
        chunks=chunks,
    )


def text(work: Sequence[Work]) -> str:
    return " ".join(f"{'B' if item.backward else 'F'}{item.micro_batch}{'ab'[item.chunk]}" for item in work)


def test_the_order_is_that_of_one_forward_one_backward() -> None:
    orders = [text(order(stage, stages=3, num_microbatches=4)) for stage in range(3)]
    assert orders == [
        "F0a F1a F2a B0a F3a B1a B2a B3a",
        "F0a F1a B0a F2a B1a F3a B2a B3a",
        "F0a B0a F1a B1a F2a B2a F3a B3a",
    ]


def test_the_interleaved_order_takes_as_many_micro_batches_as_stages_through_each_chunk() -> None:
    first, last = (text(order(stage, stages=2, num_microbatches=4, chunks=2)) for stage in (0, 1))
    assert first == "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a"
    assert last == "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"


@pytest.mark.parametrize(("stages", "num_microbatches", "chunks"), SHAPES)
def test_every_pass_runs_once_and_no_two_overlap(stages: int, num_microbatches: int, chunks: int) -> None:
    blocks = equal(stages, num_microbatches, chunks)
    assert len(blocks) == len({(block.stage, block.work) for block in blocks})
    assert len(blocks) == 2 * stages * num_microbatches * chunks
    for stage in range(stages):
        row = [block for block in blocks if block.stage == stage]
        assert row == sorted(row, key=lambda block: block.start_s)
        assert all(one.end_s <= two.start_s for one, two in pairwise(row))


@pytest.mark.parametrize(("stages", "num_microbatches", "chunks"), SHAPES)
def test_nothing_starts_before_what_it_reads(stages: int, num_microbatches: int, chunks: int) -> None:
    blocks = {(block.stage, block.work): block for block in equal(stages, num_microbatches, chunks)}
    for index in range(num_microbatches):
        path = [(stage, chunk, False) for chunk in range(chunks) for stage in range(stages)]
        path += [(stage, chunk, True) for stage, chunk, _ in reversed(path)]
        visits = [
            blocks[stage, Work(micro_batch=index, chunk=chunk, backward=backward)]
            for stage, chunk, backward in path
        ]
        assert all(one.end_s <= two.start_s for one, two in pairwise(visits))


@pytest.mark.parametrize(("stages", "num_microbatches", "chunks"), [s for s in SHAPES if s[1] >= s[0]])
def test_the_bubble_is_that_of_narayanan(stages: int, num_microbatches: int, chunks: int) -> None:
    """(p - 1)(f + b) / v over the m(f + b) of work, where f + b is a whole stage: 3 * chunks here."""
    end = max(block.end_s for block in equal(stages, num_microbatches, chunks))
    assert end == pytest.approx(3.0 * (num_microbatches * chunks + stages - 1))


def test_the_slowest_stage_sets_the_pace_and_messages_take_time() -> None:
    forward, backward = [1.0, 3.0, 1.0], [2.0, 6.0, 2.0]
    blocks = schedule(forward_s=forward, backward_s=backward, num_microbatches=16)
    end = max(block.end_s for block in blocks)
    assert 16 * 9 < end < 18 * 9
    slow = schedule(forward_s=forward, backward_s=backward, num_microbatches=16, message_s=0.5)
    assert max(block.end_s for block in slow) >= end + 4 * 0.5
