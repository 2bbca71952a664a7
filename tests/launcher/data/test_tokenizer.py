from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launcher.data.tokenizer import ByteTokenizer, check_vocabulary, open_tokenizer
from launcher.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small byte-pair tokenizer whose file also asks for truncation and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<stop>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird"] * 4, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["", "plain", "caf\u00e9 \u4e16\u754c \U0001f600\n\x00"])
def test_bytes_round_trip(text: str) -> None:
    tokenizer = open_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, 256]) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_file_round_trip_is_whole_and_in_order(folder: Path) -> None:
    tokenizer = open_tokenizer(str(folder))
    texts = ["the cat and the dog " * 20, "", "caf\u00e9"]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert len(encoded[0]) > 16 and len(encoded[1]) == 0  # neither cut nor filled
    assert all(ids.dtype == np.uint32 and (ids < tokenizer.vocab_size).all() for ids in encoded)


def test_file_and_folder_mean_the_same(folder: Path) -> None:
    by_file, by_folder = open_tokenizer(str(folder / "tokenizer.json")), open_tokenizer(str(folder))
    assert by_file.content_hash == by_folder.content_hash != ByteTokenizer.content_hash


@pytest.mark.parametrize("entry", ["<stop>", {"content": "<stop>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_end_of_document_is_what_the_folder_says(folder: Path, name: str, entry: object) -> None:
    usual = open_tokenizer(str(folder))
    (folder / name).write_text(json.dumps({"eos_token": entry}), encoding="utf-8")
    named = open_tokenizer(str(folder))
    assert (usual.eos_id, named.eos_id) == (2, 1)  # "</s>" by custom, "<stop>" by its name
    assert usual.content_hash != named.content_hash


def test_no_known_end_of_document(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("</s>", "<other>"), encoding="utf-8")
    assert open_tokenizer(str(folder)).eos_id is None


def test_end_of_document_outside_the_vocabulary(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config.json: eos_token=<none> is not in tokenizer.json"):
        open_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_tokenizer_config(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config.json cannot be read as JSON"):
        open_tokenizer(str(folder))


def test_damaged_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"data.tokenizer: \S*tokenizer.json is not a tokenizer.json \("):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["", "gpt2"])
def test_missing_tokenizer_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DataError, match=r"data.tokenizer=\S+ holds no tokenizer.json; use bytes, or a folder"
    ):
        open_tokenizer(str(tmp_path / name))


def test_vocabulary_must_fit_the_model() -> None:
    check_vocabulary(ByteTokenizer(), name="bytes", model_vocab_size=257)
    check_vocabulary(ByteTokenizer(), name="bytes", model_vocab_size=50257)
    sentence = (
        "data.tokenizer=bytes has 257 ids but model.vocab_size=256; set model.vocab_size to at least 257"
    )
    with pytest.raises(DataError, match=sentence):
        check_vocabulary(ByteTokenizer(), name="bytes", model_vocab_size=256)
