"""A pipeline's schedule, block by block: 1F1B and its interleaved form, as the engines order them. Pure.

Orders: PipeDream-Flush / 1F1B (Narayanan et al. 2021, figure 4, top) and interleaved 1F1B (the same, bottom), with
Megatron-core's warm-up counts. The bubble is (p - 1) * (f + b) / v for equal stages that take f and b per micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Work:
    """One forward or backward pass of one micro-batch through one chunk of a stage."""

    micro_batch: int
    chunk: int
    backward: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """Work with its place and time."""

    stage: int
    work: Work
    start_s: float
    end_s: float


def order(stage: int, *, stages: int, num_microbatches: int, chunks: int = 1) -> list[Work]:
    """Return what one stage does, in its order: warm-up forwards, one forward one backward, the rest."""
    rounds = _rounds(stages if chunks > 1 else num_microbatches, num_microbatches, chunks)
    forwards = [Work(micro_batch=index, chunk=chunk, backward=False) for index, chunk in rounds]
    backwards = [Work(micro_batch=index, chunk=chunks - 1 - chunk, backward=True) for index, chunk in rounds]
    behind = stages - stage - 1
    # Megatron-core, pipeline_parallel/schedules.py: later stages start their backward passes earlier.
    warm_up = min(2 * behind + (chunks - 1) * stages if chunks > 1 else behind, len(forwards))
    done = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        done += [forward, backward]
    return done + backwards[len(forwards) - warm_up :]


def schedule(
    *,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    num_microbatches: int,
    chunks: int = 1,
    message_s: float = 0.0,
) -> tuple[Block, ...]:
    """Return every block of one step, by stage and then by time.

    `forward_s` and `backward_s` are seconds of one micro-batch through one chunk, for each stage; `message_s` is what
    passes between the end of a block and the start of the one that waits for it on another stage.
    """
    stages = len(forward_s)
    assert stages == len(backward_s), "one forward and one backward time for each stage"
    queues = [
        order(stage, stages=stages, num_microbatches=num_microbatches, chunks=chunks)
        for stage in range(stages)
    ]
    ends: dict[tuple[int, Work], float] = {}
    rows: list[list[Block]] = [[] for _ in queues]
    while any(len(row) < len(queue) for row, queue in zip(rows, queues, strict=True)):
        before = len(ends)
        for stage, (row, queue) in enumerate(zip(rows, queues, strict=True)):
            while len(row) < len(queue):
                work = queue[len(row)]
                ready = _ready_s(
                    work, stage, ends, last_stage=stages - 1, last_chunk=chunks - 1, message_s=message_s
                )
                if ready is None:
                    break
                start = max(ready, row[-1].end_s if row else 0.0)
                end = start + (backward_s if work.backward else forward_s)[stage]
                row.append(Block(stage=stage, work=work, start_s=start, end_s=end))
                ends[stage, work] = end
        assert len(ends) > before, "every stage waits for another one"
    return tuple(block for row in rows for block in row)


def _ready_s(
    work: Work,
    stage: int,
    ends: dict[tuple[int, Work], float],
    *,
    last_stage: int,
    last_chunk: int,
    message_s: float,
) -> float | None:
    """Return when what the work waits for has arrived; None: not known yet."""
    before = _before(work, stage, last_stage=last_stage, last_chunk=last_chunk)
    if before is None:
        return 0.0
    end = ends.get(before)
    return end if end is None or before[0] == stage else end + message_s


def _before(work: Work, stage: int, *, last_stage: int, last_chunk: int) -> tuple[int, Work] | None:
    """Return the stage and work whose output this one reads; None at the start of the model."""
    step = 1 if work.backward else -1
    beside, chunk = stage + step, work.chunk
    if not 0 <= beside <= last_stage:
        beside, chunk = (0, chunk + 1) if work.backward else (last_stage, chunk - 1)
    if chunk < 0:
        return None
    if chunk > last_chunk:  # the loss: its backward pass follows its own forward pass
        return stage, replace(work, backward=False)
    return beside, replace(work, chunk=chunk)


def _rounds(group: int, num_microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk) in forward order: `group` micro-batches through each chunk in turn."""
    return [
        (index, chunk)
        for first in range(0, num_microbatches, group)
        for chunk in range(chunks)
        for index in range(first, min(first + group, num_microbatches))
    ]
