from __future__ import annotations

import gzip
import json
import socket
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from launcher.data import corpus
from launcher.data.config import DataConfig, Source
from launcher.data.corpus import find_files, hash_files, read_documents
from launcher.errors import DataError


def config(source: Source, *paths: Path | str, **options: Any) -> DataConfig:
    return DataConfig(source=source, paths=tuple(str(path) for path in paths), **options)


def read(data: DataConfig, scratch: Path) -> list[str]:
    return list(read_documents(data, find_files(data), scratch=scratch))


def write_jsonl(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_stdlib_is_sorted_whole_and_without_tests(scratch: Path) -> None:
    data = config("stdlib")
    files = find_files(data)
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in files]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert names == sorted(names) and len(names) > 400
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    documents = read(data, scratch)
    assert (root / "os.py").read_text(encoding="utf-8") in documents
    assert sum(map(len, documents)) > 5_000_000


def test_stdlib_without_sources_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"finds no \*.py file .* use data.source=text"):
        find_files(config("stdlib"))


def test_text_folder_file_and_glob(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {
        "b.txt": "two",
        "a.txt": "\ufeffone",
        "sub/c.txt": "three",
        "d.md": "four",
        "e.txt": "",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read(config("text", tmp_path), scratch) == ["one", "two", "three"]
    assert read(config("text", tmp_path / "d.md"), scratch) == ["four"]
    assert read(config("text", tmp_path / "*.md", tmp_path / "**" / "c.txt"), scratch) == ["four", "three"]


def test_a_file_named_twice_is_read_once(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    assert read(config("text", tmp_path / "a.txt", tmp_path, tmp_path / "*.txt"), scratch) == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "odd[1] *.jsonl"])
def test_jsonl_documents_keep_their_characters(name: str, tmp_path: Path, scratch: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": "line\u2028separator\x85 and \x0c feed"},
        {"text": None},
        {"text": "a\nb", "id": 1},
        {"text": "late \u00e9", "id": "changed type", "more": [1]},
    ]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    packed = gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode()
    (tmp_path / name).write_bytes(packed)
    expected = ["line\u2028separator\x85 and \x0c feed", "a\nb", "late \u00e9"]
    assert read(config("jsonl", tmp_path / name), scratch) == expected


def test_jsonl_half_a_surrogate_pair_is_replaced(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n', encoding="utf-8")
    assert read(config("jsonl", tmp_path), scratch) == ["x?y"]


def test_parquet_reads_the_named_column(tmp_path: Path, scratch: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["one", None, "two"], "n": [1, 2, 3]})
    write_parquet(tmp_path / "b.parquet", {"other": [[1]], "body": ["three"]})
    assert read(config("parquet", tmp_path, text_field="body"), scratch) == ["one", "two", "three"]


def test_datasets_leaves_nothing_outside_scratch(tmp_path: Path, scratch: Path) -> None:
    import datasets

    before = (
        datasets.config.HF_HUB_OFFLINE,
        datasets.logging.get_verbosity(),
        datasets.are_progress_bars_disabled(),
    )
    write_jsonl(tmp_path / "a.jsonl", {"text": "one"})
    write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    read(config("jsonl", tmp_path), scratch)
    read(config("parquet", tmp_path), scratch)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl", "a.parquet", "scratch"}
    after = (
        datasets.config.HF_HUB_OFFLINE,
        datasets.logging.get_verbosity(),
        datasets.are_progress_bars_disabled(),
    )
    assert before == after


@pytest.mark.parametrize("max_bytes", [1, 4, 5, 6, 7, 100])
def test_max_bytes_cuts_at_a_character(max_bytes: int, tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\u00e9f", encoding="utf-8")
    whole = "".join(read(config("text", tmp_path, max_bytes=max_bytes), scratch))
    assert whole == "abcd\u00e9f".encode()[:max_bytes].decode(errors="ignore")


def test_hash_follows_content_and_not_names(tmp_path: Path) -> None:
    first, second, other = tmp_path / "1.txt", tmp_path / "2.txt", tmp_path / "3.txt"
    first.write_text("same", encoding="utf-8")
    second.write_text("same", encoding="utf-8")
    other.write_text("Same", encoding="utf-8")
    assert hash_files([first, other]) == hash_files([second, other])
    assert hash_files([first, other]) != hash_files([other, first])
    assert hash_files([first]) != hash_files([other])


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data.paths=\S*nowhere does not exist; give files, folders or globs"
    ):
        find_files(config("text", tmp_path / "nowhere"))


def test_glob_without_match(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.paths=\S*\*.txt matches no file"):
        find_files(config("text", tmp_path / "*.txt"))


def test_folder_without_match(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"a folder without \*.jsonl, \*.jsonl.gz, \*.jsonl.zst; name the files"
    ):
        find_files(config("jsonl", tmp_path))


def test_jsonl_missing_field_lists_the_others(tmp_path: Path, scratch: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"title": "x", "body": "y"})
    with pytest.raises(
        DataError, match=r"data.text_field=text is not in \S*a.jsonl, line 2; .* body, title$"
    ):
        read(config("jsonl", tmp_path), scratch)


def test_parquet_missing_field_lists_the_others(tmp_path: Path, scratch: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"title": ["x"], "body": ["y"]})
    with pytest.raises(DataError, match=r"data.text_field=text is not in \S*a.parquet; .* body, title$"):
        read(config("parquet", tmp_path), scratch)


def test_field_that_is_no_text(tmp_path: Path, scratch: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": 3})
    write_parquet(tmp_path / "a.parquet", {"text": [3]})
    for source, place in (("jsonl", "a.jsonl, line 1"), ("parquet", "a.parquet, row 1")):
        with pytest.raises(DataError, match=f"data.text_field=text holds int in .*{place}"):
            read(config(source, tmp_path), scratch)  # type: ignore[arg-type]


def test_malformed_json_names_file_and_line(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl, line 3 is not JSON .*column 13\)"):
        read(config("jsonl", tmp_path), scratch)


def test_json_that_is_no_object(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["x"]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1 is a JSON list; data.source=jsonl needs one object a line"):
        read(config("jsonl", tmp_path), scratch)


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_undecodable_text_names_the_byte(source: Source, tmp_path: Path, scratch: Path) -> None:
    file = tmp_path / "bad"
    file.write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"bad is not UTF-8 text \(byte 0xff: invalid start byte\)"):
        read(config(source, file), scratch)


@pytest.mark.parametrize(
    ("source", "name", "content"),
    [
        ("parquet", "a.parquet", b"no parquet at all"),
        ("jsonl", "a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:20]),
    ],
)
def test_damaged_file_is_one_sentence(
    source: Source, name: str, content: bytes, tmp_path: Path, scratch: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read \\(.+\\); check the file$") as caught:
        read(config(source, tmp_path), scratch)
    assert "\n" not in str(caught.value)
