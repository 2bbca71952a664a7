"""Batches as a pure function of (seed, consumed samples): the same global order for every number of ranks."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from launcher.data.tokens import Split, TokenDataset

if TYPE_CHECKING:
    from strategies.base import MicroBatch


class SequenceIndex:
    """Which sequence the n-th sample of a run is: epoch after epoch, each in an order of its own."""

    def __init__(self, num_sequences: int, *, seed: int, shuffle: bool) -> None:
        assert num_sequences > 0, "prepare() refuses a split without one sequence"
        self.num_sequences = num_sequences
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, NDArray[np.int64]] = {}

    def sequences(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequence of each sample number, in the same shape."""
        epochs, positions = np.divmod(samples, self.num_sequences)
        if not self._shuffle:
            return positions
        found = np.empty_like(samples)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = self._order(int(epoch))[positions[inside]]
        return found

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # A batch spans two epochs at most unless an epoch is tiny, so older orders are dropped.
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = _permutation(self.num_sequences, self._seed, epoch)
        return self._orders[epoch]


class BatchLoader:
    """This rank's part of every global batch, from any sample on.

    Sequence i holds the tokens [i * sequence_length, (i + 1) * sequence_length], both ends included: the last
    token of one sequence, which is only predicted there, is the first of the next. The global batch at sample
    g is the samples g to g + global_batch_size; in it micro-batches are outermost, then ranks, then rows.
    Validation is never shuffled, and starts over at its end.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        split: Split,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        num_microbatches: int,
        dp: int,
        dp_rank: int,
        seed: int,
        shuffle: bool,
        num_workers: int,
        start_sample: int = 0,
    ) -> None:
        assert micro_batch_size * num_microbatches * dp == global_batch_size, (
            "the plan does not fill the batch"
        )
        assert 0 <= dp_rank < dp, f"dp_rank={dp_rank} of dp={dp}"
        self._tokens = dataset.open(split)
        self._sequence_length = sequence_length
        num_sequences = (len(self._tokens) - 1) // sequence_length
        self._index = SequenceIndex(num_sequences, seed=seed, shuffle=shuffle and split == "train")
        self._global_batch_size = global_batch_size
        batch = np.arange(global_batch_size).reshape(num_microbatches, dp, micro_batch_size)
        self._own = batch[:, dp_rank, :]  # (num_microbatches, micro_batch_size) places in the global batch
        self._consumed = self._scheduled = start_sample
        self._num_ahead = 2 * num_workers
        self._pool = ThreadPoolExecutor(num_workers, "meshwright-data") if num_workers else None
        self._ahead: deque[Future[list[MicroBatch]]] = deque()

    @property
    def num_sequences(self) -> int:
        """Sequences in one epoch."""
        return self._index.num_sequences

    @property
    def consumed_samples(self) -> int:
        """Samples that all ranks together have been given: where to start next time."""
        return self._consumed

    def next(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step, (micro_batch_size, sequence_length + 1) each."""
        if self._pool is None:
            batches = self._read(self._schedule())
        else:
            while len(self._ahead) < self._num_ahead:
                self._ahead.append(self._pool.submit(self._read, self._schedule()))
            batches = self._ahead.popleft().result()
        self._consumed += self._global_batch_size
        return batches

    def close(self) -> None:
        """Stop reading ahead. The loader gives no more batches."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _schedule(self) -> NDArray[np.int64]:
        """Return the sequences of this rank's next unscheduled step, (num_microbatches, micro_batch_size)."""
        start = self._scheduled
        self._scheduled += self._global_batch_size
        return self._index.sequences(start + self._own)

    def _read(self, sequences: NDArray[np.int64]) -> list[MicroBatch]:
        return [np.stack([self._window(int(i)) for i in rows]) for rows in sequences]

    def _window(self, sequence: int) -> NDArray[np.int64]:
        start = sequence * self._sequence_length
        return self._tokens[start : start + self._sequence_length + 1].astype(np.int64)


def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorted raw bits rather than Generator.permutation: NumPy keeps the stream of a bit generator for good,
    # but may change what Generator makes of it (NEP 19), and a run must resume under another NumPy.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")
