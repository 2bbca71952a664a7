"""What a verb prints: text for a person, or one JSON document; and streams that may be closed or leave early."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, TextIO

from launcher.errors import LauncherError


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go: text for a person, or one JSON document and nothing else on stdout."""

    as_json: bool

    def say(self, text: str) -> None:
        """Tell a person; with --json that is stderr's business."""
        print_line(text, sys.stderr if self.as_json else sys.stdout)

    def result(self, data: dict[str, Any], text: str | None = None) -> None:
        """Print the result of a verb."""
        if self.as_json:
            print_line(json.dumps(_finite(data), allow_nan=False), sys.stdout)
        elif text:
            print_line(text, sys.stdout)


def print_line(text: str, stream: TextIO) -> None:
    """Print; a reader that left (`| head`) is no fault, any other failure is one sentence."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # The reader left (`| head`): nobody is to be told, and a training run goes on all the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as error:
        raise LauncherError(f"the output cannot be written: {error.strerror}") from error


def _finite(data: Any) -> Any:
    """NaN and infinity are no JSON; they become null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def open_standard_streams() -> None:
    """Give closed streams (`>&-`) somewhere to go, or the next file we open would take their place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is the closed one; the workers inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path outside the locale is no reason to fail
