"""Processes of `meshwright probe preflight`: ranks that measure, and beside rank 0 the one that collects.

Started as `python -m launcher.verbs.preflight_worker REQUEST.json [collect]`. They meet in a store only; groups of
ranks are opened for one node or one pair of them, so that a node that dies or hangs spoils its own figures and nobody
else's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.decode import decode, encode
from launcher.errors import LauncherError
from launcher.files import write_whole
from launcher.preflight.gathered import Exchange, Gathered, RankFacts, pairs, rounds_of
from launcher.preflight.look import NodeFacts
from launcher.ranks import take_device
from launcher.submit.gang import FAULT

_LINGER_S = 3600.0  # that a rank waits for the next round: the collector bounds it
_FAREWELL_S = 5.0
_CLOCK_READINGS = 5
_REPEATS = 5
_SIDES = {"cpu": 1024, "cuda": 8192}
_MESSAGE_BYTES = {"cpu": 2**23, "cuda": 2**28}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all processes of a preflight are told; `facts` only the ranks that speak for their node."""

    device: str
    ranks_per_node: int
    world_size: int
    rounds: int
    nodes_timeout_s: float
    exchange_timeout_s: float
    results: str
    facts: NodeFacts | None = None


def main(arguments: list[str]) -> int:
    """Serve as a rank, or collect; return the exit code."""
    request = decode(Request, json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    collects = "collect" in arguments
    try:
        # A collective that hangs is to raise, and not to take the process with it.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        store = open_store(os.environ, serves=collects, timeout_s=request.nodes_timeout_s)
        if collects:
            gathered = Collector(store=store, request=request).collect()
            write_whole(Path(request.results), json.dumps(encode(gathered)))
        else:
            Rank(store=store, request=request, rank=int(os.environ["RANK"])).serve()
    except Exception as error:
        print(f"{FAULT}{said(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def open_store(environ: Mapping[str, str], *, serves: bool, timeout_s: float) -> dist.Store:
    """Return the store at MASTER_ADDR and MASTER_PORT; `serves`: this process is its server unless torchrun is."""
    return dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=serves and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def said(error: Exception) -> str:
    """Return the first line of a fault; what is not ours with its type."""
    kind = "" if isinstance(error, LauncherError) else f"{type(error).__name__}: "
    return kind + (str(error).splitlines() or [""])[0]


# ---- a rank -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank: what it measures alone, on its node, and with the ranks of another node."""

    store: dist.Store
    request: Request
    rank: int

    @property
    def node(self) -> int:
        return self.rank // self.request.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.request.ranks_per_node

    def serve(self) -> None:
        """Measure alone and report, then take part in rounds until there are no more."""
        self._tell(f"rank/{self.rank}", self._alone())
        if self.request.facts is not None:
            self._tell_the_time()
        number = 0
        while met := json.loads(self._hear(f"round/{number}")):
            mine = next((pair for pair in met if self.node in pair), None)
            if mine is not None:
                self._tell(f"round/{number}/{self.rank}", self._exchange(number, mine))
            number += 1
        self.store.set(f"done/{self.rank}", "true")

    def _tell(self, key: str, facts: Any) -> None:
        self.store.set(key, json.dumps(encode(facts)))

    def _hear(self, key: str) -> str:
        self.store.wait([key], timedelta(seconds=_LINGER_S))
        return str(self.store.get(key).decode())

    def _tell_the_time(self) -> None:
        for number in range(_CLOCK_READINGS):
            self._hear(f"clock/{self.node}/{number}/asked")
            self.store.set(f"clock/{self.node}/{number}/told", repr(time.time()))

    def _alone(self) -> RankFacts:
        found = RankFacts(rank=self.rank, node=self.node, facts=self.request.facts, versions=versions())
        try:
            device = self._device()
            precision, side = _precision(device), _SIDES[device.type]
            speed = product_tflops(device, precision=precision, side=side)
            found = replace(found, precision=precision, side=side, product_tflops=speed)
            if self.request.ranks_per_node > 1:
                name = f"inside/{self.node}"
                with self._group(name, rank=self.local_rank, size=self.request.ranks_per_node):
                    found = replace(found, inside_gb_per_s=self._inside(device))
        except Exception as error:
            return replace(found, fault=said(error))
        return found

    def _device(self) -> torch.device:
        if self.request.device != "cuda":
            return torch.device("cpu")
        take_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def _group(self, name: str, *, rank: int, size: int) -> Iterator[None]:
        """Open the default group for some ranks; a member that does not come is a fault in bounded time."""
        dist.init_process_group(
            "nccl" if self.request.device == "cuda" else "gloo",
            store=dist.PrefixStore(name, self.store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=self.request.exchange_timeout_s),
        )
        try:
            yield
        finally:
            dist.destroy_process_group()

    def _inside(self, device: torch.device) -> float:
        """Bytes that each rank of a ring all-reduce sends, a second (Thakur et al. 2005, section 4)."""
        num_bytes, size = _MESSAGE_BYTES[device.type], self.request.ranks_per_node
        message = torch.zeros(num_bytes // 4, device=device)
        seconds = best_seconds(lambda: dist.all_reduce(message), device)
        return 2 * (size - 1) / size * num_bytes / seconds / 1e9

    def _exchange(self, number: int, pair: list[int]) -> dict[str, Any]:
        per_node, place = self.request.ranks_per_node, pair.index(self.node)
        mine = place * per_node + self.local_rank
        partner = (1 - place) * per_node + self.local_rank
        try:
            with self._group(f"pair/{number}/{pair[0]}-{pair[1]}", rank=mine, size=2 * per_node):
                return {"gb_per_s": self._forth_and_back(partner, first=place == 0)}
        except Exception as error:
            return {"fault": said(error)}

    def _forth_and_back(self, partner: int, *, first: bool) -> float:
        device = self._device()
        num_bytes = _MESSAGE_BYTES[device.type]
        message = torch.zeros(num_bytes // 4, device=device)
        calls = (dist.send, dist.recv) if first else (dist.recv, dist.send)

        def exchange() -> None:
            for call in calls:
                call(message, partner)

        return 2 * num_bytes / best_seconds(exchange, device) / 1e9


def _precision(device: torch.device) -> str:
    """What a device trains in."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest call: what else the node does is no fault of the device."""
    found = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])  # the first one opens connections and workspaces


def product_tflops(device: torch.device, *, precision: str, side: int) -> float:
    """Rate of a square product on one device."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    factor = torch.rand(side, side, device=device).to(kind)
    return float(2 * side**3 / best_seconds(lambda: factor @ factor, device) / 1e12)


def versions() -> dict[str, str]:
    """What has to be equal on all nodes, as torch tells."""
    found = {"torch": str(torch.__version__)}
    if torch.version.cuda is not None:
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


# ---- the collector ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Serves the store, waits for everybody in bounded time, and calls the rounds; takes part in none."""

    store: dist.Store
    request: Request

    def collect(self) -> Gathered:
        """Return what came in time."""
        request = self.request
        ranks = [decode(RankFacts, told) for told in self._told_by_ranks()]
        come = Gathered(
            world_size=request.world_size,
            num_nodes=request.world_size // request.ranks_per_node,
            ranks=tuple(ranks),
        )
        whole = [
            node
            for node in range(come.num_nodes)
            if come.facts(node) is not None
            and len(come.of_node(node)) == request.ranks_per_node
            and not any(rank.fault for rank in come.of_node(node))
        ]
        # Whoever speaks for a node waits to be asked, also where its other ranks are missing or broken.
        heard = [node for node in range(come.num_nodes) if come.facts(node) is not None]
        clocks = {str(node): offset for node in heard if (offset := self._clock(node)) is not None}
        found = replace(come, clocks_s=clocks, exchanges=tuple(self._exchanges(whole)))
        deadline = time.monotonic() + _FAREWELL_S
        for rank in ranks:  # the store ends with us
            self._hear(f"done/{rank.rank}", deadline=deadline)
        return found

    def _told_by_ranks(self) -> Iterator[Any]:
        deadline = time.monotonic() + self.request.nodes_timeout_s
        for rank in range(self.request.world_size):
            told = self._hear(f"rank/{rank}", deadline=deadline)
            if told is not None:
                yield told

    def _hear(self, key: str, *, deadline: float) -> Any:
        """Return what somebody tells until the deadline, else None; what is there already is always heard."""
        left = max(0.05, deadline - time.monotonic())
        try:
            self.store.wait([key], timedelta(seconds=left))
        except dist.DistStoreError:
            return None
        return json.loads(self.store.get(key).decode())

    def _clock(self, node: int) -> float | None:
        """Seconds that a node's clock is ahead of ours, by the quickest of some answers (Cristian 1989)."""
        readings = []
        for number in range(_CLOCK_READINGS):
            asked = time.time()
            self.store.set(f"clock/{node}/{number}/asked", "")
            deadline = time.monotonic() + self.request.exchange_timeout_s
            told = self._hear(f"clock/{node}/{number}/told", deadline=deadline)
            if told is None:
                return None
            heard = time.time()
            readings.append((heard - asked, float(told) - (asked + heard) / 2))
        return min(readings)[1]

    def _exchanges(self, nodes: list[int]) -> Iterator[Exchange]:
        """Call round after round; a node that does not come back from one is left out of the next."""
        number = turn = 0
        while number < self.request.rounds and len(nodes) > 1 and turn < rounds_of(len(nodes)):
            met = pairs(nodes, number=turn)
            self.store.set(f"round/{number}", json.dumps(met))
            # Opening a group and each of its calls may take as long.
            deadline = time.monotonic() + 2 * self.request.exchange_timeout_s
            told = {node: self._told_by_node(number, node, deadline) for pair in met for node in pair}
            yield from (_outcome(pair, told) for pair in met)
            left = [node for node in nodes if told.get(node) is not None or node not in told]
            # Fewer nodes are another circle, gone through from its start: who met nobody but the lost one still may.
            turn = turn + 1 if left == nodes else 0
            nodes, number = left, number + 1
        self.store.set(f"round/{number}", "[]")

    def _told_by_node(self, number: int, node: int, deadline: float) -> list[Any] | None:
        per_node = self.request.ranks_per_node
        ranks = range(node * per_node, (node + 1) * per_node)
        told = [self._hear(f"round/{number}/{rank}", deadline=deadline) for rank in ranks]
        return None if None in told else told


def _outcome(pair: tuple[int, int], told: Mapping[int, list[Any] | None]) -> Exchange:
    a, b = pair
    both = [told[a], told[b]]
    answers = [answer for answer in both if answer is not None]
    if len(answers) < len(both):
        missing = " and ".join(str(node) for node in pair if told[node] is None)
        return Exchange(a=a, b=b, fault=f"node {missing} did not come back from it")
    found = [fact for answer in answers for fact in answer]
    fault = next((fact["fault"] for fact in found if "fault" in fact), None)
    if fault is not None:
        return Exchange(a=a, b=b, fault=fault)
    return Exchange(a=a, b=b, gb_per_s=min(fact["gb_per_s"] for fact in found))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a process group may wait for ranks that are gone
