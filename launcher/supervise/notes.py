"""What the launchers of a run on several hosts tell each other: small files in the run directory, kept fresh."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Generic, Literal, TypeVar

from launcher.decode import decode, encode
from launcher.errors import ConfigError
from launcher.files import write_whole
from launcher.run_dir import RunDir

BEAT_S = 1.0  # a note is written again so often: silence means that its writer is gone
Act = Literal["gather", "run", "examine", "stop", "end"]
State = Literal["waiting", "gathered", "running", "examined", "ended"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the first host wants of all others."""

    start: int  # which start of the workers it is about; grows, over launchers as well
    act: Act
    exit_code: int = 0  # of the run, with `end`
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Death:
    """A rank, or torchrun itself (None), that a signal ended."""

    rank: int | None
    signal: int
    host: str
    log: str
    out_of_memory: bool = False  # by the kernel


@dataclass(frozen=True, kw_only=True)
class Report:
    """How another host is getting on with the last order."""

    host: str
    pid: int
    start: int = 0
    state: State = "waiting"
    reaches: bool = False  # the first host, over the network
    devices: int | None = None  # sound ones; None where nobody can tell
    code: int | None = None  # of its torchrun, once that has ended
    deaths: tuple[Death, ...] = ()
    stopped: tuple[int, ...] = ()  # ranks whose processes are stopped, when examined
    busy: Mapping[str, str] = field(default_factory=dict)  # rank -> line of code, outside of PyTorch
    count: int = 0


Note = TypeVar("Note", bound=Order | Report)


def order_file(run: RunDir) -> Path:
    """Where the first host writes what it wants."""
    return run.hosts / "order.json"


def report_file(run: RunDir, node: int) -> Path:
    """Where host number `node` writes how it is getting on."""
    return run.hosts / f"host_{node:05d}.json"


class Post(Generic[Note]):
    """One note, written whole whenever it changes, and again and again with a new count while we live."""

    def __init__(self, path: Path, note: Note) -> None:
        self._path = path
        self.note: Note = note
        self._lock, self._closed = threading.Lock(), threading.Event()
        path.parent.mkdir(exist_ok=True)
        self.put(note)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def put(self, note: Note) -> None:
        """Say something else."""
        self._write(note)

    def _write(self, note: Note | None) -> None:
        with self._lock:
            self.note = replace(note or self.note, count=self.note.count + 1)
            with suppress(OSError):  # a full disk; whoever reads takes us for silent
                write_whole(self._path, json.dumps(encode(self.note)))

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._write(None)

    def __enter__(self) -> Post[Note]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()


class Reader(Generic[Note]):
    """Somebody else's note. Only changes count, so neither what an earlier launcher left nor a clock misleads."""

    def __init__(self, path: Path, kind: type[Note], *, now: float) -> None:
        self._path = path
        self._kind: type[Note] = kind
        self._last: Note | None = self._read()
        self.note: Note | None = None
        self.changed = now

    def look(self, now: float) -> Note | None:
        """Read it again; return the last fresh note."""
        found = self._read()
        if found is not None and found != self._last:
            self._last = self.note = found
            self.changed = now
        return self.note

    def last_start(self) -> int:
        """Return the start that the note is about, also one of an earlier launcher."""
        return 0 if self._last is None else self._last.start

    def _read(self) -> Note | None:
        with suppress(OSError, ValueError, ConfigError):  # absent, or replaced at this moment
            return decode(self._kind, json.loads(self._path.read_text(encoding="utf-8")))
        return None
