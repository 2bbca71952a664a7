"""Logging of a worker: one full file a rank, short lines on the console, chatty libraries quiet."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

from launcher.errors import RunDirError

_CHATTY = (
    "DeepSpeed",
    "accelerate",
    "datasets",
    "deepspeed",
    "filelock",
    "fsspec",
    "httpx",
    "transformers",
    "urllib3",
    "wandb",
)


def setup(rank: int, *, world_size: int, directory: Path, console: bool = True) -> Path:
    """Send this process' log to `directory`/rank_00000.log, and its short form to stdout; return the file."""
    path = directory / f"rank_{rank:05d}.log"
    remove()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        to_file = _ToFile(path, encoding="utf-8")
    except OSError as error:
        raise RunDirError(
            f"{path} cannot be written: {error.strerror}; free space or make it writable"
        ) from error
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(to_file)
    if console:
        root.addHandler(_ToConsole(rank))
    _send_warnings_to(to_file)
    quiet_libraries()
    to_file.handle(_first_record(rank, world_size))
    return path


def quiet_libraries() -> None:
    """Leave only warnings of chatty libraries, and only through our handlers. Call again after importing one:
    several install a handler of their own then.
    """
    for name in _CHATTY:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def remove() -> None:
    """Undo `setup`: close the file and leave warnings to Python again."""
    logging.captureWarnings(False)
    for logger in (logging.getLogger(), logging.getLogger("py.warnings")):
        for handler in [h for h in logger.handlers if isinstance(h, _ToFile | _ToConsole)]:
            logger.removeHandler(handler)
            handler.close()


class _ToFile(logging.FileHandler):
    """Full lines with time and traceback."""

    def __init__(self, path: Path, *, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))


class _ToConsole(logging.Handler):
    """One line each: rank 0 from INFO, any other rank from WARNING and with its name in front."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self._prefix = "" if rank == 0 else f"[rank {rank} {socket.gethostname()}] "

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            message = " ".join(record.getMessage().split("\n"))
            # Looked up each time: a progress bar swaps sys.stdout while it is drawn.
            print(f"{self._prefix}{level}{message}", file=sys.stdout, flush=True)
        except Exception:
            self.handleError(record)


def _first_record(rank: int, world_size: int) -> logging.LogRecord:
    message = f"rank {rank} of {world_size}, host {socket.gethostname()}, process {os.getpid()}"
    return logging.makeLogRecord(
        {"name": __name__, "levelno": logging.INFO, "levelname": "INFO", "msg": message}
    )


def _send_warnings_to(handler: logging.Handler) -> None:
    """Python's own warnings go to the file alone: on a console they hide what matters."""
    logging.captureWarnings(True)
    logger = logging.getLogger("py.warnings")
    logger.propagate = False
    logger.addHandler(handler)
