"""The documents of a corpus: which files hold them, what they contain, and a hash of it all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.data.config import DataConfig
from launcher.errors import DataError

# What a folder in data.paths stands for.
SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
}
# Parts of an installation that differ from machine to machine, or that distributions leave out.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BLOCK_BYTES = 1 << 20


def find_files(config: DataConfig) -> list[Path]:
    """Return the files that hold the documents, each once, in an order that every machine agrees on."""
    if config.source == "stdlib":
        return _stdlib_files()
    found: dict[Path, None] = {}
    for entry in config.paths:
        found.update(dict.fromkeys(_match(entry, SUFFIXES[config.source])))
    return list(found)


def hash_files(files: Iterable[Path]) -> str:
    """Return one SHA-256 over the files' contents in order; names and places do not count."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(_hash_file(file))
    return whole.hexdigest()


def read_documents(config: DataConfig, files: Iterable[Path], *, scratch: Path) -> Iterator[str]:
    """Yield the non-empty documents, up to `data.max_bytes`; `scratch` takes the lock files of `datasets`."""
    left = config.max_bytes
    for file in files:
        for document in _read(config, file, scratch):
            if left is not None:
                encoded = document.encode()[:left]
                left -= len(encoded)
                document = encoded.decode(errors="ignore")  # the cut may fall inside a character
            if document:
                yield document
            if left == 0:
                return


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    chosen: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]  # not entered at all
        chosen += [Path(folder, name) for name in names if name.endswith(".py")]
    if not chosen:
        raise DataError(
            f"data.source=stdlib finds no *.py file in {root}, as this Python comes without sources; "
            "use data.source=text"
        )
    return sorted(chosen, key=Path.as_posix)


def _match(entry: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        matches = [file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file()]
        if not matches:
            endings = ", ".join(f"*{suffix}" for suffix in suffixes)
            raise DataError(f"data.paths={entry} is a folder without {endings}; name the files with a glob")
        return sorted(matches)
    if path.exists():
        return [path]
    if not glob.has_magic(entry):
        raise DataError(
            f"data.paths={entry} does not exist; give files, folders or globs seen from {Path.cwd()}"
        )
    matches = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not matches:
        raise DataError(f"data.paths={entry} matches no file; check the pattern (** descends into folders)")
    return sorted(matches)


def _hash_file(file: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise _unreadable(file, error) from error
    return digest.digest()


def _read(config: DataConfig, file: Path, scratch: Path) -> Iterator[str]:
    if config.source == "jsonl":
        return _read_jsonl(file, config.text_field, scratch)
    if config.source == "parquet":
        return _read_parquet(file, config.text_field, scratch)
    return _read_text(file, config.max_bytes)


def _read_text(file: Path, max_bytes: int | None) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            yield stream.read(-1 if max_bytes is None else max_bytes)
    except UnicodeDecodeError as error:
        raise _undecodable(file, error) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_jsonl(file: Path, field: str, scratch: Path) -> Iterator[str]:
    # Lines are decoded here and not by the "json" builder: that one fixes the set of fields by the first
    # 10 MB and fails on a record with one more, and its errors name no line.
    for number, row in enumerate(_stream("text", file, scratch, encoding="utf-8-sig"), start=1):
        line = row["text"]
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place} is not JSON ({error.msg}, column {error.colno}); "
                "data.source=jsonl needs one object a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{place} is a JSON {type(record).__name__}; data.source=jsonl needs one object a line"
            )
        yield _text_of(record, field, place)


def _read_parquet(file: Path, field: str, scratch: Path) -> Iterator[str]:
    with _reading(file) as datasets:
        names = _open(datasets, "parquet", file, scratch).column_names
    if field not in names:
        raise _no_field(field, str(file), names)
    for number, row in enumerate(_stream("parquet", file, scratch, columns=[field]), start=1):
        yield _text_of(row, field, f"{file}, row {number}")


def _text_of(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise _no_field(field, place, list(record))
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"data.text_field={field} holds {type(text).__name__} in {place}; it must hold text")
    return text.encode(errors="replace").decode()  # JSON can spell half of a surrogate pair


def _stream(builder: str, file: Path, scratch: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of one local file through Hugging Face `datasets`, compressed files included."""
    with _reading(file) as datasets:
        yield from _open(datasets, builder, file, scratch, **options)


def _open(datasets: Any, builder: str, file: Path, scratch: Path, **options: Any) -> Any:
    # Escaped, since `datasets` takes names for patterns and reads nothing where they match nothing.
    name = glob.escape(str(file.absolute()))
    return datasets.load_dataset(
        builder, data_files=[name], split="train", streaming=True, cache_dir=str(scratch), **options
    )


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """Lend `datasets` with network, progress bars and log lines off, and put its faults in our words."""
    import datasets

    offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    bars_off = datasets.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except UnicodeDecodeError as error:
        raise _undecodable(file, error) from error
    except Exception as error:  # decompressors and Arrow each raise their own kinds
        raise DataError(f"{file} cannot be read ({_first_line(error)}); check the file") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(verbosity)
        if not bars_off:
            datasets.enable_progress_bars()


def _no_field(field: str, place: str, names: list[str]) -> DataError:
    listed = ", ".join(sorted(names)) or "none"
    return DataError(f"data.text_field={field} is not in {place}; the fields there are: {listed}")


def _undecodable(file: Path, error: UnicodeDecodeError) -> DataError:
    # The error's position is that in a chunk, not in the file.
    what = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
    return DataError(f"{file} is not UTF-8 text ({what}); convert it, or leave it out")


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file} cannot be read: {error.strerror or error}; check data.paths and permissions")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
