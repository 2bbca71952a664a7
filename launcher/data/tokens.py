"""Token files: a corpus tokenised once into a cache folder, memory-mapped by every rank afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal
from uuid import uuid4

from launcher.data.config import DataConfig
from launcher.data.corpus import find_files, hash_files, read_documents
from launcher.data.tokenizer import Tokenizer, check_vocabulary, open_tokenizer
from launcher.decode import decode, encode
from launcher.errors import DataError

if TYPE_CHECKING:  # where tokens are touched it is imported: planning reads none, and need not wait for it
    from numpy.typing import NDArray

FORMAT = 1
Split = Literal["train", "validation"]
_META = "meta.json"
_ITEM_BYTES = {"uint16": 2, "uint32": 4}
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY)
_BATCH_CHARACTERS = 4 << 20  # per call of the tokenizer, which may spread a batch over threads
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """One tokenised corpus on disk: `train.bin` and `validation.bin`, bare ids. Holds plain fields only."""

    directory: str
    content_hash: str  # of the source text, the tokenizer and the options that shape the files
    tokenizer_hash: str
    num_train_tokens: int
    num_validation_tokens: int
    vocab_size: int  # of the tokenizer
    dtype: Literal["uint16", "uint32"]
    eos_id: int | None = None
    format: int = FORMAT

    def num_tokens(self, split: Split) -> int:
        """Return the number of tokens of one split."""
        return self.num_train_tokens if split == "train" else self.num_validation_tokens

    def path(self, split: Split) -> Path:
        """Return the file of one split."""
        return Path(self.directory) / f"{split}.bin"

    def is_whole(self) -> bool:
        """Tell whether both files are there and as long as recorded."""
        try:
            return all(self.path(split).stat().st_size == self._num_bytes(split) for split in _SPLITS)
        except OSError:
            return False

    def open(self, split: Split) -> NDArray[Any]:
        """Map the tokens of one split into memory, read-only."""
        path, expected = self.path(split), self._num_bytes(split)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}; start the run again to rebuild it"
            ) from error
        if found != expected:
            raise DataError(
                f"{path} has {found} bytes instead of {expected}; start the run again to rebuild it"
            )
        import numpy as np

        return np.memmap(path, dtype=self.dtype, mode="r")

    def _num_bytes(self, split: Split) -> int:
        return self.num_tokens(split) * _ITEM_BYTES[self.dtype]


_SPLITS: tuple[Split, Split] = ("train", "validation")


def prepare(config: DataConfig, *, model_vocab_size: int, sequence_length: int) -> TokenDataset:
    """Return the token files of `config`: the cached ones where they still fit, newly made ones otherwise."""
    tokenizer = open_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, name=config.tokenizer, model_vocab_size=model_vocab_size)
    files = find_files(config)
    key = _content_hash(config, files, tokenizer)
    directory = config.cache_path.absolute() / key[:16]
    try:
        dataset = _open_cached(directory, key) or _build(config, files, tokenizer, key, directory)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={config.cache_path} cannot hold the token files: {error.strerror or error}; "
            "free space there, or set data.cache_dir to a folder that can be written"
        ) from error
    _check_length(dataset, sequence_length)
    return dataset


def _content_hash(config: DataConfig, files: list[Path], tokenizer: Tokenizer) -> str:
    facts: dict[str, Any] = {
        "format": FORMAT,
        "files": hash_files(files),
        "tokenizer": tokenizer.content_hash,
        "source": "text" if config.source == "stdlib" else config.source,
        "text_field": config.text_field if config.source in ("jsonl", "parquet") else None,
        "validation_fraction": config.validation_fraction,
        "max_bytes": config.max_bytes,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _open_cached(directory: Path, key: str) -> TokenDataset | None:
    """Return the dataset in `directory`, or None where it is absent, damaged or of another corpus."""
    try:
        fields = json.loads((directory / _META).read_text(encoding="utf-8"))
        dataset = decode(TokenDataset, {**fields, "directory": str(directory)})
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return dataset if dataset.content_hash == key and dataset.is_whole() else None


def _build(
    config: DataConfig, files: list[Path], tokenizer: Tokenizer, key: str, directory: Path
) -> TokenDataset:
    """Write the token files under a temporary name, then give them their own in one rename."""
    _log.info("tokenising %d files into %s", len(files), directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = _aside(directory)
    building.mkdir()
    try:
        with tempfile.TemporaryDirectory(dir=building) as scratch:
            documents = read_documents(config, files, scratch=Path(scratch))
            dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
            counts = _write_tokens(building, documents, tokenizer, dtype, config.validation_fraction)
        if not any(counts.values()):
            raise DataError(f"{_corpus(config)} holds no text; check data.paths and data.text_field")
        dataset = TokenDataset(
            directory=str(directory),
            content_hash=key,
            tokenizer_hash=tokenizer.content_hash,
            num_train_tokens=counts["train"],
            num_validation_tokens=counts["validation"],
            vocab_size=tokenizer.vocab_size,
            dtype=dtype,
            eos_id=tokenizer.eos_id,
        )
        _write_meta(building, dataset)
        return _publish(building, directory, dataset)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_tokens(
    folder: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: str, validation_fraction: float
) -> dict[Split, int]:
    """Write both splits, whole documents each; return their numbers of tokens."""
    counts: dict[Split, int] = {"train": 0, "validation": 0}
    with (folder / "train.bin").open("w+b") as train, (folder / "validation.bin").open("wb") as validation:
        for number, ids in enumerate(_encode(documents, tokenizer, dtype)):
            split = _split_of(number, validation_fraction)
            (train if split == "train" else validation).write(ids.data)
            counts[split] += len(ids)
        if counts["train"] and not counts["validation"]:
            # Too few documents to spare one: the end of the text is kept out instead.
            moved = max(1, int(counts["train"] * validation_fraction))
            _move_tail(train, validation, moved * _ITEM_BYTES[dtype])
            counts = {"train": counts["train"] - moved, "validation": moved}
        for stream in (train, validation):
            _sync(stream)
    return counts


def _split_of(number: int, validation_fraction: float) -> Split:
    # Evenly spread, so that a corpus sorted by topic or date is validated on all of it.
    takes = int((number + 1) * validation_fraction) > int(number * validation_fraction)
    return "validation" if takes else "train"


def _encode(documents: Iterable[str], tokenizer: Tokenizer, dtype: str) -> Iterator[NDArray[Any]]:
    """Yield the ids of each document, its end-of-document id last."""
    import numpy as np

    ending = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for batch in _batches(documents):
        for ids in tokenizer.encode_batch(batch):
            yield np.concatenate([ids, np.asarray(ending, np.uint32)]).astype(dtype)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _move_tail(source: IO[bytes], target: IO[bytes], num_bytes: int) -> None:
    start = source.seek(-num_bytes, os.SEEK_END)
    shutil.copyfileobj(source, target)
    source.truncate(start)


def _write_meta(folder: Path, dataset: TokenDataset) -> None:
    fields = {name: value for name, value in encode(dataset).items() if name != "directory"}
    with (folder / _META).open("wb") as stream:
        stream.write(json.dumps(fields, indent=2).encode() + b"\n")
        _sync(stream)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _publish(building: Path, directory: Path, dataset: TokenDataset) -> TokenDataset:
    """Rename `building` to `directory`; keep what is there where another process was first and did well."""
    while True:
        try:
            building.rename(directory)
            return dataset
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        cached = _open_cached(directory, dataset.content_hash)
        if cached:
            return cached
        _discard(directory)


def _discard(directory: Path) -> None:
    """Move a damaged folder out of the way at once, then delete it."""
    grave = _aside(directory)
    try:
        directory.rename(grave)
    except FileNotFoundError:
        return  # another process was quicker
    shutil.rmtree(grave, ignore_errors=True)


def _aside(directory: Path) -> Path:
    # Not tempfile.mkdtemp: that shuts out everybody else, and a cache may be shared.
    return directory.with_name(f".{directory.name}-{uuid4().hex[:8]}")


def _check_length(dataset: TokenDataset, sequence_length: int) -> None:
    needed = sequence_length + 1
    for split in _SPLITS:
        found = dataset.num_tokens(split)
        total = dataset.num_train_tokens + dataset.num_validation_tokens
        if found < needed:
            remedy = "a larger data.validation_fraction, " if split == "validation" else ""
            raise DataError(
                f"the {split} split has {found} of {total} tokens, but "
                f"training.sequence_length={sequence_length} needs at least {needed} there; "
                f"use {remedy}more text or shorter sequences"
            )


def _corpus(config: DataConfig) -> str:
    return f"data.paths={', '.join(config.paths)}" if config.paths else f"data.source={config.source}"
