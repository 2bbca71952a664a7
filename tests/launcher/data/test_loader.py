from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from launcher.data.loader import BatchLoader, SequenceIndex
from launcher.data.tokens import TokenDataset

LENGTH = 4
NUM_SEQUENCES = 22
GLOBAL_BATCH = 12
# dp, micro_batch_size, num_microbatches of the same global batch
LAYOUTS = [(1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3), (6, 2, 1), (12, 1, 1)]


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    """Tokens that are their own position, three too few for one more sequence; validation counts down."""
    train = np.arange(NUM_SEQUENCES * LENGTH + LENGTH, dtype=np.uint16)
    validation = np.arange(5 * LENGTH + 1, dtype=np.uint16)[::-1]
    train.tofile(tmp_path / "train.bin")
    validation.tofile(tmp_path / "validation.bin")
    return TokenDataset(
        directory=str(tmp_path),
        content_hash="",
        tokenizer_hash="",
        num_train_tokens=len(train),
        num_validation_tokens=len(validation),
        vocab_size=1000,
        dtype="uint16",
    )


def make(dataset: TokenDataset, **options: Any) -> BatchLoader:
    defaults: dict[str, Any] = {
        "split": "train",
        "sequence_length": LENGTH,
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": GLOBAL_BATCH,
        "num_microbatches": 1,
        "dp": 1,
        "dp_rank": 0,
        "seed": 7,
        "shuffle": True,
        "num_workers": 0,
    }
    return BatchLoader(dataset, **(defaults | options))


def first_tokens(
    dataset: TokenDataset, num_steps: int, layout: tuple[int, int, int], **options: Any
) -> list[int]:
    """The first token of every sample, in the global order that all ranks' batches make together."""
    dp, micro_batch_size, num_microbatches = layout
    sizes = {"dp": dp, "micro_batch_size": micro_batch_size, "num_microbatches": num_microbatches}
    loaders = [make(dataset, dp_rank=rank, **sizes, **options) for rank in range(dp)]
    seen: list[int] = []
    for _ in range(num_steps):
        parts: list[list[NDArray[np.int64]]] = [loader.next() for loader in loaders]
        assert {part.shape for rank in parts for part in rank} == {(micro_batch_size, LENGTH + 1)}
        seen += [int(row[0]) for m in range(num_microbatches) for rank in parts for row in rank[m]]
    for loader in loaders:
        loader.close()
    return seen


def test_a_sample_is_a_window_of_the_text(dataset: TokenDataset) -> None:
    (batch,) = make(dataset).next()
    assert batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()  # consecutive tokens
    assert (batch[:, 0] % LENGTH == 0).all()  # at multiples of the sequence length


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_all_ranks_together_read_one_global_order(
    dataset: TokenDataset, layout: tuple[int, int, int], shuffle: bool
) -> None:
    alone = first_tokens(dataset, 5, LAYOUTS[0], shuffle=shuffle)
    assert first_tokens(dataset, 5, layout, shuffle=shuffle) == alone


def test_every_epoch_holds_every_sequence_once(dataset: TokenDataset) -> None:
    num_epochs = 6  # 132 samples are 11 whole steps, so 5 epochs end inside a batch
    seen = first_tokens(dataset, num_epochs * NUM_SEQUENCES // GLOBAL_BATCH, (3, 2, 2))
    epochs = np.array(seen).reshape(num_epochs, NUM_SEQUENCES)
    assert (np.sort(epochs) == np.arange(NUM_SEQUENCES) * LENGTH).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == num_epochs


def test_without_shuffling_the_text_is_read_in_order(dataset: TokenDataset) -> None:
    seen = first_tokens(dataset, 4, LAYOUTS[0], shuffle=False)
    assert seen == [sample % NUM_SEQUENCES * LENGTH for sample in range(48)]


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", [(1, 12, 1), (4, 1, 3)])
def test_resumes_exactly_at_another_number_of_ranks(
    dataset: TokenDataset, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    straight = first_tokens(dataset, 7, LAYOUTS[0])
    resumed = first_tokens(dataset, 3, before) + first_tokens(
        dataset, 4, after, start_sample=3 * GLOBAL_BATCH
    )
    assert resumed == straight


def test_resumes_at_another_batch_size(dataset: TokenDataset) -> None:
    straight = first_tokens(dataset, 6, LAYOUTS[0])
    wide = {"global_batch_size": 24, "start_sample": 24}
    assert straight == first_tokens(dataset, 2, LAYOUTS[0]) + first_tokens(dataset, 2, (2, 12, 1), **wide)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_reading_ahead_changes_nothing(dataset: TokenDataset, num_workers: int) -> None:
    with (
        make(dataset, start_sample=12) as plain,
        make(dataset, start_sample=12, num_workers=num_workers) as ahead,
    ):
        for _ in range(9):
            (expected,), (found,) = plain.next(), ahead.next()
            assert np.array_equal(expected, found)
            assert plain.consumed_samples == ahead.consumed_samples


def test_consumed_samples_count_what_was_given(dataset: TokenDataset) -> None:
    with make(dataset, start_sample=24, num_workers=2) as loader:
        assert loader.consumed_samples == 24
        loader.next()
        assert loader.consumed_samples == 36


def test_closing_ends_the_threads(dataset: TokenDataset) -> None:
    before = set(threading.enumerate())
    with make(dataset, num_workers=2) as loader:
        loader.next()
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    loader.close()  # a second time does no harm


def test_seed_decides_the_order(dataset: TokenDataset) -> None:
    order = first_tokens(dataset, 1, LAYOUTS[0], seed=7)
    assert first_tokens(dataset, 1, LAYOUTS[0], seed=8) != order
    assert first_tokens(dataset, 1, LAYOUTS[0], seed=7) == order


def test_order_is_the_same_on_every_machine() -> None:
    # Recorded: a run that resumes under another NumPy must go on in this order.
    index = SequenceIndex(8, seed=3, shuffle=True)
    assert index.sequences(np.arange(16)).tolist() == [0, 4, 7, 1, 5, 6, 3, 2, 0, 6, 2, 1, 3, 7, 4, 5]


def test_index_keeps_shape_and_crosses_epochs_in_any_order() -> None:
    index = SequenceIndex(5, seed=0, shuffle=True)
    samples = np.arange(20)
    forward = index.sequences(samples)
    assert np.array_equal(index.sequences(samples[::-1]), forward[::-1])
    assert np.array_equal(index.sequences(samples.reshape(4, 5)), forward.reshape(4, 5))


@pytest.mark.parametrize("shuffle", [True, False])
def test_validation_starts_at_the_beginning_and_wraps(dataset: TokenDataset, shuffle: bool) -> None:
    options = {"shuffle": shuffle, "global_batch_size": 4}
    seen = first_tokens(dataset, 2, (2, 1, 2), **options, split="validation")
    # Five sequences, counting down from token 20.
    assert seen == [20, 16, 12, 8, 4, 20, 16, 12]


def test_validation_reaches_every_rank_when_it_is_smaller_than_a_batch(dataset: TokenDataset) -> None:
    seen = first_tokens(dataset, 1, (12, 1, 1), split="validation")
    assert len(seen) == 12 and set(seen) == {20, 16, 12, 8, 4}


@pytest.mark.parametrize(
    "options",
    [{"micro_batch_size": 5}, {"dp": 2, "micro_batch_size": 6, "dp_rank": 2}, {"num_microbatches": 2}],
)
def test_sizes_that_do_not_fit_are_our_own_fault(dataset: TokenDataset, options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        make(dataset, **options)
