"""Ranks and the collector over a real store, in threads and as processes: who dies, hangs or is slow is named."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from launcher.preflight.gathered import Gathered
from launcher.preflight.look import NodeFacts
from launcher.verbs import preflight_worker
from launcher.verbs.preflight_worker import (
    Collector,
    Rank,
    Request,
    best_seconds,
    product_tflops,
    said,
    versions,
)

REQUEST = Request(
    device="cpu",
    ranks_per_node=1,
    world_size=3,
    rounds=1,
    nodes_timeout_s=20.0,
    exchange_timeout_s=5.0,
    results="",
)


@pytest.fixture
def store() -> dist.TCPStore:
    """A store of this process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_worker, "_SIDES", {"cpu": 64})
    monkeypatch.setattr(preflight_worker, "_FAREWELL_S", 0.1)


def request(*, rank: int, **changes: float) -> Request:
    return replace(REQUEST, facts=NodeFacts(host=f"n{rank}"), **changes)


def collect(store: dist.TCPStore, **changes: float) -> tuple[threading.Thread, list[Gathered]]:
    found: list[Gathered] = []
    # A client of its own, as in a process of its own: one that waits lets nobody else speak.
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    collector = Collector(store=client, request=request(rank=0, **changes))
    thread = threading.Thread(target=lambda: found.append(collector.collect()), daemon=True)
    thread.start()
    return thread, found


def test_who_never_comes_is_missing_and_nobody_waits_for_ever(store: dist.TCPStore) -> None:
    thread, found = collect(store, nodes_timeout_s=1.0, rounds=0, world_size=2)
    Rank(store=store, request=request(rank=1, world_size=2), rank=1).serve()
    thread.join(30)
    assert [rank.rank for rank in found[0].ranks] == [1]
    assert found[0].ranks[0].product_tflops is not None and found[0].ranks[0].versions["torch"]
    assert found[0].facts(0) is None and found[0].exchanges == ()
    assert list(found[0].clocks_s) == ["1"] and abs(found[0].clocks_s["1"]) < 1.0


def test_a_partner_that_does_not_come_back_is_named(store: dist.TCPStore) -> None:
    for node in (0, 1):
        told = {"rank": node, "node": node, "facts": {"host": f"n{node}"}}
        Rank(store=store, request=REQUEST, rank=node)._tell(f"rank/{node}", told)
        for number in range(5):
            store.set(f"clock/{node}/{number}/told", "0.0")
    store.set("round/0/0", '{"gb_per_s": 1.5}')
    thread, found = collect(store, world_size=2, exchange_timeout_s=0.2)
    thread.join(30)
    [met] = found[0].exchanges
    assert (met.a, met.b, met.fault) == (0, 1, "node 1 did not come back from it")


def test_who_met_only_a_lost_partner_meets_another(store: dist.TCPStore) -> None:
    for node in range(3):
        told = {"rank": node, "node": node, "facts": {"host": f"n{node}"}}
        store.set(f"rank/{node}", json.dumps(told))
        for number in range(5):
            store.set(f"clock/{node}/{number}/told", "0.0")
    for key in ("0/1", "1/0", "1/1"):  # of round 0 node 2 does not come back
        store.set(f"round/{key}", '{"gb_per_s": 1.5}')
    thread, found = collect(store, exchange_timeout_s=0.2, rounds=4)
    thread.join(30)
    assert [(met.a, met.b, met.gb_per_s) for met in found[0].exchanges] == [(1, 2, None), (0, 1, 1.5)]
    assert store.get("round/2") == b"[]"


def test_who_speaks_for_a_broken_node_comes_to_an_end(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> float:
        raise RuntimeError("CUDA error: uncorrectable ECC error")

    monkeypatch.setattr(preflight_worker, "product_tflops", fail)
    monkeypatch.setattr(preflight_worker, "_LINGER_S", 10.0)
    thread, found = collect(store, world_size=1)
    Rank(store=store, request=request(rank=0, world_size=1), rank=0).serve()
    thread.join(30)
    assert found[0].ranks[0].fault and list(found[0].clocks_s) == ["0"]


def test_a_rank_that_cannot_measure_says_why(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> float:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setattr(preflight_worker, "product_tflops", fail)
    alone = Rank(store=store, request=request(rank=0), rank=0)._alone()
    assert alone.fault == "RuntimeError: CUDA error: uncorrectable ECC error"
    assert alone.facts == NodeFacts(host="n0")


def test_the_fastest_call_counts() -> None:
    cpu = torch.device("cpu")
    left = iter([9.0, *[0.0] * 9])

    def work() -> None:
        time.sleep(next(left) / 100)

    assert best_seconds(work, cpu) < 0.05
    assert product_tflops(cpu, precision="fp32", side=64) > 0
    assert versions()["torch"] == torch.__version__
    assert said(KeyError("x")) == "KeyError: 'x'"


def test_waiting_is_bounded_by_the_store(store: dist.TCPStore) -> None:
    with pytest.raises(dist.DistStoreError):
        store.wait(["never"], timedelta(seconds=0.1))
