"""Whether a preflight names the slow node of several: hosts are network namespaces, one of them behind a token bucket.

As root, on Linux with iproute2. Run: python -m benchmarks.slow_node --rates 100,400,1000 --record
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import record

PREFIX, NETWORK = "mwslow", "10.231.77"
# The hosts share one machine's processors: how fast products are on them says nothing.
WORDS = (
    "cluster.gpus_per_node=1",
    "cluster.gpu.device=cpu",
    "preflight.min_product=0",
    "preflight.min_bandwidth=0.5",
)
CUT = 0  # as a rate: the link is down


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    rates = [int(word) for word in options.rates.split(",")]
    with hosts(options.hosts) as names:
        rows = [case(names, slow=1, mbit_per_s=rate) for rate in [*rates, CUT]]
    figures = summary(rows, num_hosts=options.hosts)
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("slow_node", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='slow_node').name}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument(
        "--rates", default="100,400,1000", help="Mbit/s of the slow host's link, one case each"
    )
    parser.add_argument("--record", action="store_true")
    return parser.parse_args(arguments)


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Join `count` namespaces by a bridge; yield their addresses."""
    try:
        _do("ip", "link", "add", f"{PREFIX}br", "type", "bridge")
        _do("ip", "link", "set", f"{PREFIX}br", "up")
        for index in range(count):
            name = f"{PREFIX}{index}"
            _do("ip", "netns", "add", name)
            _do(*f"ip link add {PREFIX}v{index} type veth peer name eth0 netns {name}".split())
            _do("ip", "link", "set", f"{PREFIX}v{index}", "master", f"{PREFIX}br", "up")
            _do(*f"ip -n {name} addr add {NETWORK}.{10 + index}/24 dev eth0".split())
            _do("ip", "-n", name, "link", "set", "eth0", "up")
            _do("ip", "-n", name, "link", "set", "lo", "up")
        yield [f"{NETWORK}.{10 + index}" for index in range(count)]
    finally:
        for index in range(count):
            subprocess.run(["ip", "netns", "del", f"{PREFIX}{index}"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", f"{PREFIX}br"], check=False, stderr=subprocess.DEVNULL)


def case(names: Sequence[str], *, slow: int, mbit_per_s: int) -> dict[str, Any]:
    """Run a preflight on all hosts while the link of one carries so much."""
    bucket = f"tbf rate {max(1, mbit_per_s)}mbit burst 256kb latency 50ms".split()
    _do("ip", "netns", "exec", f"{PREFIX}{slow}", "tc", "qdisc", "replace", "dev", "eth0", "root", *bucket)
    _do("tc", "qdisc", "replace", "dev", f"{PREFIX}v{slow}", "root", *bucket)
    _do("ip", "link", "set", f"{PREFIX}v{slow}", "down" if mbit_per_s == CUT else "up")
    with tempfile.TemporaryDirectory() as folder:
        started = [_start(index, names, Path(folder)) for index in range(len(names))]
        told = [process.communicate() for process in started]
    report = json.loads(told[0][0])
    return {"mbit_per_s": mbit_per_s, "slow": names[slow], **_outcome(report, slow)}


def _start(index: int, names: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start what srun would on one host."""
    count = str(len(names))
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": count, "SLURM_STEP_NUM_TASKS": count}
    slurm |= {"SLURM_STEP_NODELIST": ",".join(names), "SLURMD_NODENAME": names[index], "SLURM_JOB_ID": "1"}
    words = [*WORDS, f"cluster.num_nodes={count}", "preflight.nodes_timeout_s=60", "--json"]
    return subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            f"{PREFIX}{index}",
            sys.executable,
            "-m",
            "launcher",
            "probe",
            "preflight",
            *words,
        ],
        env={
            **os.environ,
            **slurm,
            **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(record.REPOSITORY)},
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _outcome(report: Mapping[str, Any], slow: int) -> dict[str, Any]:
    met = report["measured"]["exchanges"]
    best = [
        pair["gb_per_s"] for pair in met if slow in (pair["a"], pair["b"]) and pair["gb_per_s"] is not None
    ]
    return {"gb_per_s": max(best, default=None), "failed": report["failed"]}


def summary(rows: Sequence[Mapping[str, Any]], *, num_hosts: int) -> dict[str, Any]:
    """What was named, and how far the measured rate is off the bucket's."""
    errors = [
        abs(row["gb_per_s"] / (row["mbit_per_s"] / 8e3) - 1)
        for row in rows
        if row["gb_per_s"] is not None and row["mbit_per_s"] != CUT
    ]
    return {
        "hosts": num_hosts,
        "cases": len(rows),
        "named_alone": sum(row["failed"] == [row["slow"]] for row in rows),
        "largest_error": round(max(errors), 4) if errors else None,
        "rows": list(rows),
    }


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
