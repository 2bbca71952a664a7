"""One rank of `meshwright probe nccl` under one setting: times collectives whenever it is its setting's turn.

Started as `python -m launcher.verbs.tune_worker REQUEST.json SETTING`. Rank 0 takes turns from standard input, a line
each, and answers on standard output; the others wait for it in a store, so that who is not measured does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from launcher.cluster.nccl_trial import cells
from launcher.ranks import take_device
from launcher.submit.gang import FAULT
from launcher.verbs.preflight_worker import open_store, said

# Calls of one cell in one turn: many short ones, so that a turn weighs all sizes alike.
_TURN_BYTES, _MOST_CALLS = {"cpu": 2**22, "cuda": 2**28}, 20
_LINGER_S = 3600.0  # for the next turn: the launcher bounds it


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among those of its setting."""

    store: dist.Store
    rank: int
    world_size: int
    device: torch.device
    answers: TextIO

    def serve(self) -> None:
        """Take turns until there are no more."""
        turn = 0
        if self.rank == 0:
            self._answer("ready")
        while self._is_called(turn):
            seconds = [self._seconds(operation, size) for operation, size in cells(self.device.type)]
            slowest = torch.tensor(seconds, dtype=torch.float64, device=self.device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if self.rank == 0:
                self._answer(slowest.tolist())
            turn += 1

    def _answer(self, told: Any) -> None:
        print(json.dumps(told), file=self.answers, flush=True)

    def _is_called(self, turn: int) -> bool:
        key = f"turn/{turn}"
        if self.rank == 0:
            self.store.set(key, sys.stdin.readline().strip() or "end")
        self.store.wait([key], timedelta(seconds=_LINGER_S))
        return bool(self.store.get(key) == b"go")

    def _seconds(self, operation: str, size: int) -> float:
        work = self._work(operation, size)
        work()
        calls = max(1, min(_MOST_CALLS, _TURN_BYTES[self.device.type] // size))
        dist.barrier()
        self._synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        self._synchronize()
        return (time.perf_counter() - started) / calls

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _work(self, operation: str, size: int) -> Callable[[], Any]:
        part = torch.zeros(max(1, size // 4 // self.world_size), device=self.device)
        whole = part.repeat(self.world_size)
        other = torch.empty_like(whole)
        return {
            "all_reduce": lambda: dist.all_reduce(whole),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
            "all_to_all": lambda: dist.all_to_all_single(other, whole),
        }[operation]


def take_standard_output() -> TextIO:
    """Return the channel to the launcher for answers alone; what anybody else prints goes to standard error.

    NCCL writes its version, warnings and debugging there, and a pipe that nobody empties would stop it.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main(arguments: list[str]) -> int:
    """Serve as a rank of setting number `arguments[1]`; return the exit code."""
    # Collectives have newer names in some releases and only the older ones in others.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    answers = take_standard_output()
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        serve(request, int(arguments[1]), os.environ, answers=answers)
    except Exception as error:
        print(f"{FAULT}{said(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def serve(request: Mapping[str, Any], setting: int, environ: Mapping[str, str], *, answers: TextIO) -> None:
    """Open this setting's group and take its turns."""
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    device = torch.device(request["device"])
    if device.type == "cuda":
        take_device(int(environ["LOCAL_RANK"]))
        device = torch.device("cuda", int(environ["LOCAL_RANK"]))
    # All settings meet in one store, which the ranks 0 of the inherited one brings.
    shared = open_store(environ, serves=setting == rank == 0, timeout_s=request["start_s"])
    store = dist.PrefixStore(f"setting/{setting}", shared)
    # Python starts later on one node than on another, and a group is opened in the time of a turn.
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)], timedelta(seconds=request["start_s"]))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=request["turn_s"]),
    )
    Rank(store=store, rank=rank, world_size=world_size, device=device, answers=answers).serve()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a process group may wait for ranks that are gone
