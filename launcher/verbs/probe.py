"""`meshwright probe`: measures this machine and writes the cluster file that `cluster=FILE.yaml` plans with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launcher import compose, torchrun
from launcher.cluster import detect, network
from launcher.cluster.fit import to_cluster
from launcher.cluster.spec import ClusterSpec, Measured
from launcher.decode import decode, encode
from launcher.errors import FINISHED, ClusterError
from launcher.output import Output
from launcher.submit import local
from launcher.verbs import cluster_file, preflight, tune, words

WORKER = "launcher.verbs.probe_worker"
FAULT = "probe fault: "  # what the worker writes before its one sentence
_START_S = 90.0  # for importing torch and finding each other, on top of the time to measure


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """The words of the verb beside those of the cluster."""

    out: str = "cluster.yaml"
    num_processes: int | None = None  # null: cluster.gpus_per_node
    seconds: float = 45.0  # measuring stops here, whatever is left
    force: bool = False  # replace a file that is there

    def __post_init__(self) -> None:
        cluster_file.check_name(self.out)
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        if not 1 <= self.seconds <= 600:
            raise ValueError(f"seconds={self.seconds} must lie between 1 and 600")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What was written, and the figures behind it."""

    path: Path
    cluster: ClusterSpec
    figures: Mapping[str, Any]


def probe(arguments: list[str], output: Output) -> int:
    """Measure this machine, and tell what was found and where it is written."""
    if arguments[:1] == ["preflight"]:
        return preflight.preflight(arguments[1:], output)
    if arguments[:1] == ["nccl"]:
        return tune.tune(arguments[1:], output)
    probed = run(arguments)
    if probed is not None:
        output.result(to_json(probed), to_text(probed))
    return FINISHED


def run(arguments: Sequence[str]) -> Probed | None:
    """Measure what the words describe and write the file; None on the ranks of torchrun that only helped."""
    request, cluster = read(arguments)
    path = Path(request.out).expanduser().absolute()
    cluster_file.check(path, force=request.force)
    figures = measure(cluster, seconds=request.seconds)
    if figures is None:
        return None
    measured = Measured(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        torch=figures["torch"],
    )
    found = to_cluster(cluster, figures, name=path.stem, measured=measured)
    cluster_file.write(path, found, by=f"probe` on {measured.host}, {measured.date}")
    return Probed(path=path, cluster=found, figures=figures)


def read(arguments: Sequence[str]) -> tuple[ProbeRequest, ClusterSpec]:
    """Split the words into the verb's own and those that describe the cluster."""
    keys = list(ProbeRequest.__dataclass_fields__)
    own, described = words.of_cluster("probe", arguments, own=keys, known=("preflight", "nccl"))
    request = decode(ProbeRequest, own)
    if request.num_processes is not None:
        described.append(f"cluster.gpus_per_node={request.num_processes}")
    [job] = compose.jobs(described)
    return request, job.cluster


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(cluster: ClusterSpec, *, seconds: float) -> dict[str, Any] | None:
    """Let one worker for each rank measure; under torchrun the ranks are there, and rank 0 returns the figures."""
    given = torchrun.started_us()
    if cluster.num_nodes > 1 and not given:
        raise ClusterError(
            f"cluster.num_nodes={cluster.num_nodes} needs a start on every node; run there `torchrun "
            f"--nnodes={cluster.num_nodes} --nproc-per-node={cluster.gpus_per_node} ... -m launcher probe`, "
            "or use cluster.num_nodes=1"
        )
    rank = int(os.environ.get("RANK", "0")) if given else 0
    with tempfile.TemporaryDirectory(prefix="meshwright-probe-") as folder:
        request, results = Path(folder) / "request.json", Path(folder) / "results.json"
        content = {
            "device": cluster.gpu.device,
            "seconds": seconds,
            "tiers": _tier_sizes(cluster),
            "results": str(results),
        }
        request.write_text(json.dumps(content), encoding="utf-8")
        num_processes = 1 if given else cluster.world_size
        command = local.argv(run_dir=request, num_processes=num_processes, port=None, module=WORKER)
        environment = local.environment(
            os.environ,
            num_processes=cluster.gpus_per_node,
            num_cores=detect.count_cores(),
            interface="lo" if cluster.num_nodes == 1 else network.interface_to(os.environ["MASTER_ADDR"]),
        )
        _finish(command, environment, timeout_s=seconds + _START_S)
        if rank != 0:
            return None
        figures: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    if (
        not figures["products"]
        or len(figures["memory"]) < 2
        or not figures["attention"]
        or not figures["host"]
    ):
        raise ClusterError(f"seconds={seconds} were too few to measure this device; allow more")
    return figures


def _tier_sizes(cluster: ClusterSpec) -> list[int]:
    """Ranks that each tier joins, as far as this world reaches."""
    return [min(cluster.reach_of(link) or cluster.world_size, cluster.world_size) for link in cluster.links]


def _finish(command: Sequence[str], environment: Mapping[str, str], *, timeout_s: float) -> None:
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(
                f"the measurement did not end within {timeout_s:.0f} s; look for ranks that cannot reach each other"
            ) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            stderr.seek(0)
            raise ClusterError(_reason(stderr.read().decode("utf-8", errors="replace"), code))


def _reason(text: str, code: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line.partition(FAULT)[2] for line in lines if FAULT in line]
    said = named[0] if named else lines[-1] if lines else "nothing was said"
    return f"this machine cannot be measured (exit code {code}): {said}"


# ---- what is told -------------------------------------------------------------------------------------------------


def to_json(probed: Probed) -> dict[str, Any]:
    """The file's content and what was timed."""
    return {"out": str(probed.path), "cluster": encode(probed.cluster), "figures": probed.figures}


def to_text(probed: Probed) -> str:
    """What was found, for a person."""
    cluster = probed.cluster
    gpu, efficiency = cluster.gpu, cluster.gpu.efficiency
    peaks = ", ".join(
        f"{precision} {share * gpu.peak_tflops[precision]:.3g}"
        for precision, share in efficiency.matmul.items()
    )
    lines = [
        f"device    {cluster.num_nodes} x {cluster.gpus_per_node} {gpu.name}",
        f"products  {peaks} TFLOP/s at best, half of it at a side of {efficiency.matmul_half_size:.0f} elements",
        f"memory    {gpu.memory_gb_per_s:.1f} GB/s",
        f"kernel    {efficiency.kernel_us:.1f} us from the host",
    ]
    for link in cluster.links:
        reach = "all ranks" if link.size is None else f"{link.size} ranks"
        lines.append(
            f"link      {reach}: {link.gb_per_s * link.efficiency:.3g} GB/s, {link.latency_us:.1f} us a message"
        )
    return "\n".join([*lines, f"written   {probed.path}; plan with cluster={probed.path.name}"])
