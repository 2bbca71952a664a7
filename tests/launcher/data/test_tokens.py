from __future__ import annotations

import json
import multiprocessing
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import tokens
from launcher.data.config import DataConfig
from launcher.data.tokenizer import ByteTokenizer
from launcher.data.tokens import TokenDataset, prepare
from launcher.decode import decode, encode
from launcher.errors import DataError

DOCUMENTS = [f"document {number} " + "abcdefghij" * (number % 7 + 1) for number in range(50)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "text").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / "text" / f"{number:03}.txt").write_text(document, encoding="utf-8")
    return DataConfig(
        source="text",
        paths=(str(tmp_path / "text"),),
        validation_fraction=0.1,
        cache_dir=str(tmp_path / "cache"),
    )


def make(config: DataConfig, sequence_length: int = 16) -> TokenDataset:
    return prepare(config, model_vocab_size=257, sequence_length=sequence_length)


def documents_of(dataset: TokenDataset, split: tokens.Split) -> list[str]:
    ids = dataset.open(split)
    assert ids[-1] == 256
    return [ByteTokenizer().decode(part) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


def inodes(dataset: TokenDataset) -> set[int]:
    return {file.stat().st_ino for file in Path(dataset.directory).iterdir()}


def test_documents_are_split_evenly_and_kept_whole(config: DataConfig) -> None:
    dataset = make(config)
    assert documents_of(dataset, "validation") == DOCUMENTS[9::10]
    assert documents_of(dataset, "train") == [d for i, d in enumerate(DOCUMENTS) if i % 10 != 9]
    total = sum(len(document) + 1 for document in DOCUMENTS)
    assert dataset.num_train_tokens + dataset.num_validation_tokens == total
    assert (dataset.dtype, dataset.vocab_size, dataset.eos_id) == ("uint16", 257, 256)


def test_second_time_takes_the_same_files(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(config)
    monkeypatch.setattr(tokens, "read_documents", lambda *_, **__: pytest.fail("the corpus was read again"))
    assert make(config) == first
    assert make(replace(config, shuffle=False, num_workers=3), sequence_length=32) == first


def test_moved_cache_is_found_where_it_is(config: DataConfig, tmp_path: Path) -> None:
    first = make(config)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    moved = make(replace(config, cache_dir=str(tmp_path / "elsewhere")))
    assert Path(moved.directory).parent == tmp_path / "elsewhere"
    assert moved == replace(first, directory=moved.directory)


@pytest.mark.parametrize("change", [{"validation_fraction": 0.2}, {"max_bytes": 2000}])
def test_options_that_shape_the_files_make_others(config: DataConfig, change: dict[str, Any]) -> None:
    assert make(config).content_hash != make(replace(config, **change)).content_hash


def test_changed_text_makes_other_files(config: DataConfig) -> None:
    first = make(config)
    (Path(config.paths[0]) / "003.txt").write_text("changed", encoding="utf-8")
    second = make(config)
    assert second.directory != first.directory
    assert "changed" in documents_of(second, "train")


def test_survives_json(config: DataConfig) -> None:
    dataset = make(config)
    assert decode(TokenDataset, json.loads(json.dumps(encode(dataset)))) == dataset


def truncate(folder: Path) -> None:
    os.truncate(folder / "train.bin", 10)


def remove_a_split(folder: Path) -> None:
    (folder / "validation.bin").unlink()


def remove_the_meta_file(folder: Path) -> None:
    (folder / "meta.json").unlink()


def cut_the_meta_file(folder: Path) -> None:
    os.truncate(folder / "meta.json", 20)


def forget_a_field(folder: Path) -> None:
    fields = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    del fields["dtype"]
    (folder / "meta.json").write_text(json.dumps(fields), encoding="utf-8")


def belong_to_another(folder: Path) -> None:
    fields = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({**fields, "content_hash": "0" * 64}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        remove_a_split,
        remove_the_meta_file,
        cut_the_meta_file,
        forget_a_field,
        belong_to_another,
    ],
)
def test_damaged_cache_is_made_again(config: DataConfig, damage: Any, tmp_path: Path) -> None:
    first = make(config)
    train = first.path("train").read_bytes()
    damage(Path(first.directory))
    assert make(config) == first
    assert first.path("train").read_bytes() == train
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [Path(first.directory).name]


def test_open_refuses_a_file_that_changed_length(config: DataConfig) -> None:
    dataset = make(config)
    os.truncate(dataset.path("train"), 10)
    with pytest.raises(DataError, match=r"train.bin has 10 bytes instead of \d+; start the run again"):
        dataset.open("train")
    dataset.path("train").unlink()
    with pytest.raises(DataError, match=r"train.bin cannot be read: No such file"):
        dataset.open("train")


def test_processes_at_once_agree(config: DataConfig, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=spawn) as pool:
        datasets = list(pool.map(make, [config] * 8))
    assert len(set(datasets)) == 1
    assert documents_of(datasets[0], "validation") == DOCUMENTS[9::10]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [Path(datasets[0].directory).name]


def test_a_slower_builder_keeps_the_first_result(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write_meta = tokens._write_meta
    first: list[TokenDataset] = []
    kept: set[int] = set()

    def write_after_another_process(folder: Path, dataset: TokenDataset) -> None:
        write_meta(folder, dataset)
        monkeypatch.setattr(tokens, "_write_meta", write_meta)
        first.append(make(config))
        kept.update(inodes(first[0]))

    monkeypatch.setattr(tokens, "_write_meta", write_after_another_process)
    assert make(config) == first[0]
    assert inodes(first[0]) == kept


def test_few_documents_give_the_end_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 100, encoding="utf-8")
    config = DataConfig(source="text", paths=(str(tmp_path),), cache_dir=str(tmp_path / "cache"))
    dataset = make(replace(config, validation_fraction=0.05))
    train, validation = dataset.open("train"), dataset.open("validation")
    assert len(validation) == 50
    assert ByteTokenizer().decode(np.concatenate([train, validation])) == "0123456789" * 100


def test_large_vocabulary_needs_four_bytes(config: DataConfig, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {**{f"w{i}": i for i in range(65537)}, "document": 65537}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    dataset = prepare(replace(config, tokenizer=str(tmp_path)), model_vocab_size=65538, sequence_length=4)
    assert (dataset.dtype, dataset.vocab_size, dataset.eos_id) == ("uint32", 65538, None)
    # Three words a document, and no end-of-document id to join them with.
    assert dataset.open("validation").tolist() == [65537, 0, 0] * 5


def test_vocabulary_is_checked_before_anything_is_written(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.tokenizer=bytes has 257 ids but model.vocab_size=200"):
        prepare(config, model_vocab_size=200, sequence_length=16)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_empty_corpus(source: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("", encoding="utf-8")
    config = DataConfig(source=source, paths=(str(tmp_path / "empty"),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"data.paths=\S*empty holds no text"):
        make(config)
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_few_tokens_says_how_many(config: DataConfig) -> None:
    dataset = make(config)
    train, validation = dataset.num_train_tokens, dataset.num_validation_tokens
    assert make(config, sequence_length=validation - 1) == dataset
    with pytest.raises(DataError) as caught:
        make(config, sequence_length=validation)
    assert str(caught.value) == (
        f"the validation split has {validation} of {train + validation} tokens, but training.sequence_length="
        f"{validation} needs at least {validation + 1} there; use a larger data.validation_fraction, more text "
        "or shorter sequences"
    )
    with pytest.raises(
        DataError, match=f"the train split has {train} of .* needs at least {train + 1} there; use more"
    ):
        make(config, sequence_length=train)


def test_cache_folder_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"data.cache_dir=\S*inside cannot hold the token files: Not a directory"
    ):
        make(replace(config, cache_dir=str(tmp_path / "file" / "inside")))


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_full_disk_is_one_sentence_and_leaves_nothing(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"cannot hold the token files: .*; free space there, or set data.cache_dir"
    ):
        make(config)
    assert list((tmp_path / "cache").iterdir()) == []


def test_stdlib_is_prepared_and_found_again(tmp_path: Path) -> None:
    config = DataConfig(source="stdlib", cache_dir=str(tmp_path), max_bytes=300_000)
    dataset = make(config, sequence_length=512)
    assert 300_000 < dataset.num_train_tokens + dataset.num_validation_tokens < 301_000
    assert make(config, sequence_length=512) == dataset
