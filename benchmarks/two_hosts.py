"""Two hosts on one machine, and what happens to a run over both: a slow link, a cut one, a stopped rank, a lost host.

The link is as slow as tc's token bucket makes it; it adds no latency (netem, which could, is not in every kernel).
Run as root: python -m benchmarks.two_hosts --rates 100mbit 400mbit --record
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks import chaos, record
from launcher import heartbeat
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir

SCRIPT = Path(__file__).with_suffix(".sh")
ADDRESSES = {"a": "10.219.91.1", "b": "10.219.91.2"}
NUM_STEPS = 24
HOST_TIMEOUT_S, STEP_TIMEOUT_S = 4.0, 12.0
TRAINING = (
    *("strategy=accelerate", "plan.zero_stage=2", "monitor=none", "data.max_bytes=300000"),
    *("cluster.num_nodes=2", "cluster.gpus_per_node=1", "cluster.gpu.device=cpu", "model.num_layers=2"),
    *("training.sequence_length=64", "training.global_batch_size=8", f"training.num_steps={NUM_STEPS}"),
    *("training.precision=fp32", "training.deterministic=true", "evaluation.num_sequences=8"),
    *("checkpoint.interval=4", f"supervise.step_timeout_s={STEP_TIMEOUT_S}", "supervise.backoff_s=0"),
    f"supervise.host_timeout_s={HOST_TIMEOUT_S}",
)
Kind = Literal["cut", "stop", "kill"]
_LOOK_S = 0.05
_PATIENCE_S = 240.0
_CUT_FOR_S = 2.0  # after it was noticed


@dataclass(frozen=True, kw_only=True)
class TwoHosts:
    """Hosts `a` and `b` that are up."""

    name: str

    def call(self, verb: str, *words: str) -> str:
        """Let the script do something; return what it says."""
        done = subprocess.run(
            [str(SCRIPT), verb, self.name, *words], capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode != 0:
            raise RuntimeError(f"{SCRIPT.name} {verb}: {done.stderr.strip()}")
        return done.stdout

    def start(self, host: str, words: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [str(SCRIPT), "run", self.name, host, *words],
                env=_environment(),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


@contextmanager
def two_hosts(rate: str, *, name: str | None = None) -> Iterator[TwoHosts]:
    """Bring up two hosts with `rate` between them, as tc writes it, and take them away again."""
    hosts = TwoHosts(name=name or f"mw{os.getpid()}")
    try:
        hosts.call("up", rate)
        yield hosts
    finally:
        hosts.call("down")


def obstacle() -> str | None:
    """Return why there can be no two hosts here; None where there can."""
    probe = f"mwp{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=True)
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, text=True, check=True)
        subprocess.run(["tc", "-V"], capture_output=True, check=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed (Debian: iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return None


# ---- the slow link ------------------------------------------------------------------------------------------------


def probe(hosts: TwoHosts, out: Path, *, seconds: float) -> dict[str, Any]:
    """Let `meshwright probe` measure both hosts; return the cluster file that it writes."""
    words = [
        *("launcher", "probe", f"out={out}", f"seconds={seconds:g}", "cluster.num_nodes=2"),
        *("cluster.gpus_per_node=1", "cluster.gpu.device=cpu"),
    ]
    with ExitStack() as stack:
        started = {}
        for node, host in enumerate(ADDRESSES):
            torchrun = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"),
                *("--nproc-per-node=1", f"--master-addr={ADDRESSES['a']}", "--master-port=29511", "-m"),
            ]
            log = out.with_suffix(f".{host}.log")
            started[host] = hosts.start(host, [*torchrun, *words], log=log)
            stack.callback(_end, started[host])
        for host, process in started.items():
            if process.wait(_PATIENCE_S) != 0:
                raise RuntimeError(out.with_suffix(f".{host}.log").read_text()[-3000:])
    found: dict[str, Any] = yaml.safe_load(out.read_text(encoding="utf-8"))
    return found


def gb_per_s(rate: str) -> float:
    """Return 0.05 for `400mbit`."""
    return float(rate.removesuffix("mbit")) / 8e3


# ---- training across it -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was done to host b, and how it went on."""

    kind: Kind
    step: int
    detected_s: float  # until the launcher named the failure
    recovered_s: float  # from then, or from the link's return, to the next training
    event: dict[str, Any]  # `failed`


def train(hosts: TwoHosts, run: RunDir, *, kinds: Sequence[Kind]) -> list[Fault]:
    """Train over both hosts through faults; raise RuntimeError where the run does not end well."""
    words = [
        *("submit", *TRAINING, "submit=ssh", f"submit.hosts=[{','.join(ADDRESSES.values())}]"),
        *(f"submit.ssh=[{SCRIPT},ssh,{hosts.name}]", f"run_dir={run.path}"),
    ]
    told = run.path.with_suffix(".log")
    with told.open("wb") as out:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            env=_environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        span = NUM_STEPS // (len(kinds) + 1)
        done = [
            _disturb(hosts, run, launcher, kind=kind, number=number, at_step=number * span + 2)
            for number, kind in enumerate(kinds, start=1)
        ]
        if launcher.wait(_PATIENCE_S) != 0:
            raise RuntimeError(told.read_text()[-3000:])
    finally:
        _end(launcher)
    return done


def _disturb(
    hosts: TwoHosts,
    run: RunDir,
    launcher: subprocess.Popen[bytes],
    *,
    kind: Kind,
    number: int,
    at_step: int,
) -> Fault:
    """Do something to host b in start `number`, at a step, and wait until training goes on."""

    def wait(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + _PATIENCE_S
        while not condition():
            if launcher.poll() is not None or time.monotonic() > until:
                raise RuntimeError(
                    f"{kind} at step {at_step}: {run.path.with_suffix('.log').read_text()[-3000:]}"
                )
            time.sleep(_LOOK_S)

    wait(lambda: len(_events(run, "started")) == number and _step(run) >= at_step)
    step, begun = _step(run), time.time()
    if kind == "cut":
        hosts.call("link", "down")
    elif kind == "stop":
        beat = heartbeat.read(run.heartbeats, 1)
        assert beat is not None
        os.kill(beat.pid, signal.SIGSTOP)
    else:
        for pid in hosts.call("pids", "b").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    wait(lambda: len(_events(run, "failed")) == number)
    event = _events(run, "failed")[-1]
    again = event["time"]
    if kind == "cut":
        time.sleep(_CUT_FOR_S)
        hosts.call("link", "up")
        again = time.time()
    wait(lambda: len(_events(run, "started")) == number + 1)
    return Fault(
        kind=kind,
        step=step,
        detected_s=round(event["time"] - begun, 1),
        recovered_s=round(_events(run, "started")[-1]["time"] - again, 1),
        event=event,
    )


def _events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def _step(run: RunDir) -> int:
    lines = read(run.metrics_file)
    return int(lines[-1]["step"]) if lines else 0


def _environment() -> dict[str, str]:
    root = str(SCRIPT.parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the record ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "400mbit"])
    parser.add_argument("--seconds", type=float, default=120.0, help="for one probe")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        links = [_measured(rate, Path(folder), seconds=options.seconds) for rate in options.rates]
        figures = {"links": links, **_survived(Path(folder))}
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("two_hosts", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='two_hosts').name}")


def _measured(rate: str, folder: Path, *, seconds: float) -> dict[str, Any]:
    with two_hosts(rate) as hosts:
        link = probe(hosts, folder / f"{rate}.yaml", seconds=seconds)["links"][-1]
    ratio = link["gb_per_s"] * link["efficiency"] / gb_per_s(rate)
    return {
        "rate": rate,
        "gb_per_s": link["gb_per_s"],
        "latency_us": link["latency_us"],
        "ratio": round(ratio, 3),
    }


def _survived(folder: Path) -> dict[str, Any]:
    whole, disturbed = (RunDir(path=folder / name) for name in ("whole", "disturbed"))
    with two_hosts("1000mbit") as hosts:
        train(hosts, whole, kinds=())
        faults = train(hosts, disturbed, kinds=("cut", "stop", "kill"))
    rows = [
        {
            **{"kind": fault.kind, "at_step": fault.step, "cause": fault.event["cause"]},
            **{"rank": fault.event["rank"], "detected_s": fault.detected_s, "recovered_s": fault.recovered_s},
        }
        for fault in faults
    ]
    return {
        "faults": rows,
        "host_timeout_s": HOST_TIMEOUT_S,
        "step_timeout_s": STEP_TIMEOUT_S,
        "losses_bit_identical": chaos.trajectory(disturbed) == chaos.trajectory(whole),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
