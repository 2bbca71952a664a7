"""Text to token ids and back: single bytes by default, or a local Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import DataError

if TYPE_CHECKING:  # numpy where ids are made: planning makes none, and need not wait for it
    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

# Names of the end-of-document token, for a tokenizer.json that comes without tokenizer_config.json.
_USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(ABC):
    """What the token files need to know of a tokenizer."""

    vocab_size: int  # one more than the highest id
    eos_id: int | None  # marks the end of a document; None: the vocabulary has no such token
    content_hash: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids`; ends of documents read as nothing."""

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the ids of one text."""
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255; 256 ends a document. Needs no file."""

    vocab_size = 257
    eos_id = 256
    content_hash = hashlib.sha256(b"utf-8 bytes, 256 ends a document").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the bytes of each text."""
        import numpy as np

        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text; bytes cut off inside a character become U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer.json as Hugging Face's `tokenizers` reads it."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = _load(file)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_id = _find_eos(file, vocabulary)
        self.content_hash = hashlib.sha256(file.read_bytes() + f"\neos={self.eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text; many texts are encoded in parallel."""
        import numpy as np

        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"data.tokenizer={name} holds no tokenizer.json; use bytes, or a folder with tokenizer.json "
            "(names of the Hugging Face hub are not downloaded)"
        )
    return FileTokenizer(file)


def check_vocabulary(tokenizer: Tokenizer, *, name: str, model_vocab_size: int) -> None:
    """Raise DataError when `tokenizer` has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"data.tokenizer={name} has {tokenizer.vocab_size} ids but model.vocab_size={model_vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or use this model's own tokenizer"
        )


def _load(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"data.tokenizer: {file} is not a tokenizer.json ({error}); check the file"
        ) from error
    # Both are stored in the file for inference, and would cut or fill documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _find_eos(file: Path, vocabulary: dict[str, int]) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _eos_entry(file.with_name(name))
        if token is not None:
            if token not in vocabulary:
                place = file.with_name(name)
                raise DataError(f"{place}: eos_token={token} is not in {file.name}; correct one of them")
            return vocabulary[token]
    return next((vocabulary[token] for token in _USUAL_EOS if token in vocabulary), None)


def _eos_entry(file: Path) -> str | None:
    try:
        entry = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, OSError) as error:
        raise DataError(f"data.tokenizer: {file} cannot be read as JSON ({error}); check the file") from error
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None
