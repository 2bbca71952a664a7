"""The verdict on each node, and why, in a sentence a check; pure, from what was gathered."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.config import PreflightConfig
from launcher.preflight import gpus
from launcher.preflight.gathered import Gathered
from launcher.preflight.look import NodeFacts, Port

Mark = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question about one node, and the answer in a sentence."""

    name: str
    mark: Mark
    sentence: str


@dataclass(frozen=True, kw_only=True)
class NodeVerdict:
    """All answers about one node."""

    host: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Tell whether a run may start here."""
        return all(check.mark != "fail" for check in self.checks)

    @property
    def faults(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.mark == "fail")


def judge(
    gathered: Gathered, *, cluster: ClusterSpec, bounds: PreflightConfig, hosts: Sequence[str] = ()
) -> tuple[NodeVerdict, ...]:
    """Return a verdict for each node of the cluster; `hosts` names those that never told their name."""
    told = {node: gathered.facts(node) for node in range(gathered.num_nodes)}
    names = {
        node: facts.host if facts else hosts[node] if node < len(hosts) else f"node {node}"
        for node, facts in told.items()
    }
    bench = _Bench(gathered=gathered, cluster=cluster, bounds=bounds, names=names)
    return tuple(
        NodeVerdict(host=names[node], checks=tuple(_checks(bench, node, facts)))
        for node, facts in told.items()
    )


@dataclass(frozen=True, kw_only=True)
class _Bench:
    gathered: Gathered
    cluster: ClusterSpec
    bounds: PreflightConfig
    names: Mapping[int, str]


def _checks(bench: _Bench, node: int, facts: NodeFacts | None) -> Iterator[Check]:
    expected, come = bench.cluster.gpus_per_node, len(bench.gathered.of_node(node))
    if facts is None or come < expected:
        within = f"within preflight.nodes_timeout_s={bench.bounds.nodes_timeout_s:g}"
        who = "it" if come == 0 else f"{expected - come} of its {expected} ranks"
        yield Check(name="answer", mark="fail", sentence=f"{who} gave no answer {within}")
    if facts is not None:
        yield _of(facts, "gpus", "gpu_names", lambda: _gpus(facts, bench))
        yield _of(facts, "health", "gpu_readings", lambda: _health(facts, bench))
        yield _of(facts, "versions", "versions", lambda: _versions(bench, node))
        yield _of(facts, "memory", "memory_gib", lambda: _memory(facts, bench))
        yield _of(facts, "disk", "volumes", lambda: _disk(facts, bench.bounds))
        yield _of(facts, "network", "ports", lambda: _network(facts, bench))
    if come:
        yield _clock(bench, node)
        yield _product(bench, node)
        yield _inside(bench, node)
        yield _pairs(bench, node)


def _of(facts: NodeFacts, name: str, look: str, ask: Callable[[], tuple[Mark, str]]) -> Check:
    if look in facts.silent:
        return Check(name=name, mark="fail", sentence=f"{look} cannot be told: {facts.silent[look]}")
    mark, sentence = ask()
    return Check(name=name, mark=mark, sentence=sentence)


_NO_GPU: tuple[Mark, str] = ("not applicable", "no GPU is planned")
# Whether devices work without one, as AMD's do, the product tells.
_NO_DRIVER: tuple[Mark, str] = ("not applicable", "no NVIDIA driver answers")


# ---- one node alone -----------------------------------------------------------------------------------------------


def _gpus(facts: NodeFacts, bench: _Bench) -> tuple[Mark, str]:
    wanted, found = bench.cluster, facts.gpu_names or ()
    if wanted.gpu.device == "cpu":
        return _NO_GPU
    if not found and "driver" not in (facts.versions or {}):
        return _NO_DRIVER
    if len(found) < wanted.gpus_per_node:
        return (
            "fail",
            f"{len(found)} GPUs answer, {wanted.gpus_per_node} are planned; look for Xid 79 in its log",
        )
    others = {name: count for name, count in _kinds(bench).items() if name != _kind(found)}
    if others and max(others.values()) > _kinds(bench)[_kind(found)]:
        return "fail", f"it has {_kind(found)}, most nodes have {max(others, key=lambda name: others[name])}"
    return "pass", f"{len(found)} x {_kind(found)}"


def _kind(names: Sequence[str]) -> str:
    return " and ".join(sorted(set(names)))


def _kinds(bench: _Bench) -> Counter[str]:
    told = (bench.gathered.facts(node) for node in bench.names)
    return Counter(_kind(facts.gpu_names) for facts in told if facts is not None and facts.gpu_names)


def _health(facts: NodeFacts, bench: _Bench) -> tuple[Mark, str]:
    if bench.cluster.gpu.device == "cpu":
        return _NO_GPU
    readings = facts.gpu_readings or ()
    if not readings:
        return _NO_DRIVER
    for reading in readings:
        wrong = gpus.fault(reading, bench.bounds)
        if wrong is not None:
            return "fail", f"GPU {reading['index']:.0f}: {wrong}"
    return "pass", "no uncorrected memory error, no row to be replaced, no slowdown"


def _memory(facts: NodeFacts, bench: _Bench) -> tuple[Mark, str]:
    planned, free = bench.cluster.host_memory_gib, facts.memory_gib or 0.0
    told = f"{free:.1f} of {planned:.1f} GiB of host memory are free"
    if free < bench.bounds.min_memory * planned:
        return "fail", f"{told}, preflight.min_memory={bench.bounds.min_memory:g} of them are wanted"
    return "pass", told


def _disk(facts: NodeFacts, bounds: PreflightConfig) -> tuple[Mark, str]:
    volumes = facts.volumes or ()
    for volume in volumes:
        where = f"{volume.use} ({volume.path})"
        if volume.fault is not None:
            return "fail", f"{where} cannot be written: {volume.fault}"
        if volume.free_gib < bounds.min_disk_gib:
            wanted = f"preflight.min_disk_gib={bounds.min_disk_gib:g} are wanted"
            return "fail", f"{where} has {volume.free_gib:.1f} GiB left, {wanted}"
        if volume.free_inodes is not None and volume.free_inodes < bounds.min_inodes:
            return "fail", (
                f"{where} has room for {volume.free_inodes} files, preflight.min_inodes={bounds.min_inodes} are wanted"
            )
    return "pass", ", ".join(f"{volume.use} has {volume.free_gib:.0f} GiB left" for volume in volumes)


# ---- one node beside the others -----------------------------------------------------------------------------------


def _versions(bench: _Bench, node: int) -> tuple[Mark, str]:
    mine = _versions_of(bench, node)
    all_of_them = [_versions_of(bench, other) for other in bench.names if bench.gathered.facts(other)]
    for name, value in mine.items():
        # The first one to have most: where two nodes differ, one of them has to be named.
        usual, count = Counter(told.get(name, "none") for told in all_of_them).most_common(1)[0]
        if value != usual:
            return "fail", f"{name} is {value}, and {usual} on {count} of {len(all_of_them)} nodes"
    return "pass", ", ".join(f"{name} {value}" for name, value in mine.items())


def _versions_of(bench: _Bench, node: int) -> dict[str, str]:
    facts = bench.gathered.facts(node)
    found = dict(facts.versions or {}) if facts is not None else {}
    for rank in bench.gathered.of_node(node):
        found |= rank.versions
    return found


def _network(facts: NodeFacts, bench: _Bench) -> tuple[Mark, str]:
    """A port that works on most nodes has to work on this one; one that nobody has cabled is nobody's fault."""
    told = [bench.gathered.facts(node) for node in bench.names]
    by_node = [{port.name: port for port in facts.ports or ()} for facts in told if facts is not None]
    mine = {port.name: port for port in facts.ports or ()}
    for name in sorted({name for ports in by_node for name in ports}):
        working = [ports[name] for ports in by_node if name in ports and ports[name].state == "ACTIVE"]
        # An active link behind a port that is not up yet (no subnet manager) is a fault on a single node, too.
        broken = _broken(mine.get(name), working, num_nodes=len(by_node))
        if broken:
            return "fail", f"port {name} {broken}"
    active = [port for port in mine.values() if port.state == "ACTIVE"]
    if not active and bench.cluster.fabric in ("infiniband", "roce"):
        return "fail", f"no port is active, and cluster.fabric={bench.cluster.fabric}"
    if not mine:
        return "not applicable", "it has no InfiniBand or RoCE card"
    return "pass", f"{len(active)} of {len(mine)} ports are active"


def _broken(port: Port | None, working: Sequence[Port], *, num_nodes: int) -> str | None:
    rates = Counter(_gb_per_s(other) for other in working)
    # Of two nodes that differ the slower one is broken.
    usual = max(rates, key=lambda rate: (rates[rate], rate), default=0.0)
    if port is None or port.state != "ACTIVE":
        if len(working) * 2 >= num_nodes:
            state = "is not there" if port is None else f"is {port.state} ({port.physical})"
            return f"{state}, it is active on {len(working)} of {num_nodes} nodes"
        return f"is {port.state}, though its link is up" if port and port.physical == "LinkUp" else None
    return f"runs at {port.rate}, others at {usual:g} Gb/sec" if _gb_per_s(port) < usual else None


def _gb_per_s(port: Port) -> float:
    """Read `400 Gb/sec (4X NDR)`; 0 where the kernel names no rate."""
    try:
        return float(port.rate.partition(" ")[0])
    except ValueError:
        return 0.0


def _clock(bench: _Bench, node: int) -> Check:
    clocks = bench.gathered.clocks_s
    if str(node) not in clocks or len(clocks) < 2:
        return Check(name="clock", mark="not applicable", sentence="there is no other clock to compare with")
    off = clocks[str(node)] - statistics.median(clocks.values())
    told = f"its clock is {off:+.3f} s off the median node's"
    if abs(off) > bench.bounds.max_clock_skew_s:
        allowed = f"preflight.max_clock_skew_s={bench.bounds.max_clock_skew_s:g} are allowed"
        return Check(name="clock", mark="fail", sentence=f"{told}, {allowed}; look at its time service")
    return Check(name="clock", mark="pass", sentence=told)


# ---- speed --------------------------------------------------------------------------------------------------------


def assumed_product_tflops(gpu: GpuSpec, *, precision: str, side: int) -> float | None:
    """What the cost model gives a square product (`Efficiency`); None where the peak is a guess or unknown."""
    named = next((key for key in gpu.peak_tflops if key == precision), None)
    if gpu.peak_is_nominal or named is None:
        return None
    flops, efficiency = 2.0 * side**3, gpu.efficiency
    rate = gpu.peak_tflops[named] * 1e12 * efficiency.matmul_share(named)
    seconds = flops / rate * (1 + efficiency.matmul_half_size * 3 / side) + efficiency.matmul_us * 1e-6
    return flops / seconds / 1e12


def _product(bench: _Bench, node: int) -> Check:
    ranks = bench.gathered.of_node(node)
    failed = next((rank for rank in ranks if rank.fault is not None), None)
    if failed is not None:
        return Check(name="product", mark="fail", sentence=f"rank {failed.rank}: {failed.fault}")
    slowest = min(ranks, key=lambda rank: rank.product_tflops or 0.0)
    speed = slowest.product_tflops or 0.0
    everybody = [rank.product_tflops for rank in bench.gathered.ranks if rank.product_tflops]
    assumed = assumed_product_tflops(bench.cluster.gpu, precision=slowest.precision, side=slowest.side)
    told = f"a {slowest.precision} product runs at {speed:.3g} TFLOP/s on its slowest rank, {slowest.rank}"
    return _speed("product", speed, told, assumed, everybody, key="min_product", bounds=bench.bounds)


def _inside(bench: _Bench, node: int) -> Check:
    ranks = bench.gathered.of_node(node)
    reached = [rank.inside_gb_per_s for rank in ranks if rank.inside_gb_per_s is not None]
    if not reached:
        alone = bench.cluster.gpus_per_node == 1
        why = "one rank alone has nobody to send to" if alone else "not all of its ranks could measure"
        return Check(name="inside", mark="not applicable", sentence=why)
    everybody = [rank.inside_gb_per_s for rank in bench.gathered.ranks if rank.inside_gb_per_s]
    link = bench.cluster.link_for(bench.cluster.gpus_per_node)
    told = f"an all-reduce on the node moves {min(reached):.3g} GB/s"
    assumed = _assumed(bench.cluster, link)
    return _speed("inside", min(reached), told, assumed, everybody, key="min_bandwidth", bounds=bench.bounds)


def _pairs(bench: _Bench, node: int) -> Check:
    """The best of its pairs counts: beside a slow partner nobody is fast, and a slow node is fast beside nobody."""
    mine = [pair for pair in bench.gathered.exchanges if node in (pair.a, pair.b)]
    if not mine:
        return Check(name="pairs", mark="not applicable", sentence="there was no node to exchange with")
    best = _best(bench, node)
    if best is None:
        partner = mine[0].b if mine[0].a == node else mine[0].a
        with_whom = f"with {bench.names[partner]}" + (" and others" if len(mine) > 1 else "")
        return Check(
            name="pairs", mark="fail", sentence=f"no exchange {with_whom} came to an end: {mine[0].fault}"
        )
    others = [speed for other in bench.names if (speed := _best(bench, other)) is not None]
    told = f"{best:.3g} GB/s a rank and direction in the best of {len(mine)} exchanges with other nodes"
    assumed = _assumed(bench.cluster, bench.cluster.link_for(bench.cluster.world_size))
    found = _speed("pairs", best, told, assumed, others, key="min_bandwidth", bounds=bench.bounds)
    if found.mark == "fail" and len(bench.names) == 2:
        return Check(
            name="pairs", mark="fail", sentence=f"{found.sentence}; one pair does not tell which of the two"
        )
    return found


def _best(bench: _Bench, node: int) -> float | None:
    mine = (pair for pair in bench.gathered.exchanges if node in (pair.a, pair.b))
    return max((pair.gb_per_s for pair in mine if pair.gb_per_s is not None), default=None)


def _assumed(cluster: ClusterSpec, link: Link) -> float | None:
    """What a rank gets of `link` in a large message; None where that is a guess."""
    guessed = cluster.gpu.peak_is_nominal and cluster.measured is None
    return None if guessed else link.gb_per_s * link.efficiency


def _speed(
    name: str,
    speed: float,
    told: str,
    assumed: float | None,
    everybody: Sequence[float],
    *,
    key: str,
    bounds: PreflightConfig,
) -> Check:
    """Compare with what the planner assumes where it knows, and with the median of all."""
    share = getattr(bounds, key)
    median = statistics.median(everybody) if everybody else 0.0
    for reference, what in ((assumed or 0.0, "assumed by the planner"), (median, "the median")):
        if speed < share * reference:
            wanted = f"preflight.{key}={share:g} of the {reference:.3g} that are {what}"
            return Check(name=name, mark="fail", sentence=f"{told}, less than {wanted}")
    beside = f", {speed / assumed:.0%} of what the planner assumes" if assumed else ""
    return Check(name=name, mark="pass", sentence=f"{told}{beside}")
