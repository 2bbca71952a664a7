"""Asks an engine what ranks of a planned world would hold, one after the other, without that world.

Started as `python -m launcher.verbs.verify_worker REQUEST.json`; the answers go into the file that the request names.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import strategies
from launcher.decode import decode
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def main(arguments: list[str]) -> int:
    """Inspect every rank that the request names, up to the first that an engine refuses."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")  # advice for a real start
    answers = []
    for rank in request["ranks"]:
        answers.append(ask(request, rank))
        if "error" in answers[-1]:
            break
    Path(request["results"]).write_text(json.dumps(answers), encoding="utf-8")
    return 0


def ask(request: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return what the engine tells about one rank, or what it raises."""
    started = time.monotonic()
    plan = decode(Plan, request["plan"], "plan")
    try:
        found = strategies.load(plan.strategy).inspect(
            plan,
            decode(ModelSpec, request["model"], "model"),
            decode(TrainingSpec, request["training"], "training"),
            rank=rank,
        )
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        traceback.print_exc()
        return {"rank": rank, "error": message, "ours": _is_ours(error)}
    return {"rank": rank, "seconds": time.monotonic() - started, "inspection": asdict(found)}


def _is_ours(error: Exception) -> bool:
    """Tell whether our own translation raised it, and not the engine behind it."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError)
        and Path(strategies.__file__).parent in Path(frames[-1].filename).parents
    )


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing that an engine left running may hold us back
