"""`meshwright probe preflight`: whether the nodes are sound, each one PASS or FAIL with a sentence."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launcher import compose
from launcher.cluster.spec import ClusterSpec
from launcher.config import PreflightConfig
from launcher.decode import decode, encode
from launcher.errors import FINISHED, ClusterError, ConfigError, RunDirError, UnsoundNodeError
from launcher.files import write_whole
from launcher.output import Output, print_line
from launcher.preflight.gathered import Gathered
from launcher.preflight.judge import Check, NodeVerdict, judge
from launcher.preflight.look import look
from launcher.run_dir import RunDir
from launcher.submit import gang
from launcher.submit.gang import Place
from launcher.verbs import words

WORKER = "launcher.verbs.preflight_worker"
VERB = "probe preflight"
FAILED = "preflight_failed"  # among the logs: nodes for the job script to leave out, one a line
_SPARE_S = 30.0  # on top of everything that is bounded: starting Python, saying farewell


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be sound: nodes as a cluster describes them, for a run or for none yet."""

    cluster: ClusterSpec
    bounds: PreflightConfig
    run: RunDir | None = None

    @property
    def folders(self) -> dict[str, Path]:
        """Where a run writes, by what for."""
        here = ("the run directory", self.run.path) if self.run else ("this folder", Path.cwd())
        # Not tempfile's: where /tmp is full that is whatever else can be written.
        temporary = Path(os.environ.get("TMPDIR") or "/tmp")
        return {here[0]: here[1], "the folder for temporary files": temporary}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The verdicts, and what they were made of."""

    date: str  # UTC, ISO 8601
    nodes: tuple[NodeVerdict, ...]
    bounds: PreflightConfig
    gathered: Gathered | None  # None: where it is collected cannot be reached

    @property
    def failed(self) -> tuple[NodeVerdict, ...]:
        """Nodes that no run should start on."""
        return tuple(node for node in self.nodes if not node.passed)


def preflight(arguments: list[str], output: Output) -> int:
    """Look at all nodes together with those who were started on the others; rank 0's tells."""
    subject = read(arguments)
    report = check(subject, gang.find(subject.cluster, verb=VERB))
    if report is None:
        return FINISHED
    output.result(to_json(report), to_text(report))
    if not report.failed:
        return FINISHED
    # As with `verify` the table is the answer; a fault would put its own document in its place.
    print_line(f"meshwright: {fault(report)}", sys.stderr)
    return UnsoundNodeError.exit_code


def read(arguments: Sequence[str]) -> Subject:
    """Return what the words describe: RUN_DIR, or keys of `cluster` and `preflight`."""
    if words.names_a_run(arguments):
        run = words.open_run(VERB, arguments)
        job = run.job()
        return Subject(cluster=job.cluster, bounds=job.preflight, run=run)
    for word in arguments:
        if word.partition("=")[0].partition(".")[0] not in ("cluster", "preflight") or "=" not in word:
            raise ConfigError(
                f"'{word}' is not a word of `{VERB}`; it takes RUN_DIR, or words of cluster and preflight, as in "
                "cluster=h100_sxm cluster.num_nodes=4 preflight.rounds=2"
            )
    [job] = compose.jobs(arguments)
    return Subject(cluster=job.cluster, bounds=job.preflight)


def check(subject: Subject, place: Place) -> Report | None:
    """Look at this node, and measure with the others; the verdict is found where rank 0 is."""
    speaker = place.node * place.ranks_per_node
    facts = None
    if speaker in place.ranks:
        facts = look(host=place.host, folders=subject.folders, timeout_s=subject.bounds.check_timeout_s)
    with tempfile.TemporaryDirectory(prefix="meshwright-preflight-", dir=gang.scratch()) as folder:
        results = Path(folder) / "results.json"
        request = _request(subject, place, results)
        plain, speaking = Path(folder) / "request.json", Path(folder) / "speaker.json"
        plain.write_text(json.dumps(request), encoding="utf-8")
        speaking.write_text(json.dumps({**request, "facts": encode(facts)}), encoding="utf-8")
        commands = [
            (
                gang.command(WORKER, str(speaking if rank == speaker else plain)),
                place.environment(rank, os.environ),
            )
            for rank in place.ranks
        ]
        if place.leads:
            collect = gang.command(WORKER, str(plain), "collect")
            commands.insert(0, (collect, place.environment(0, os.environ)))
        return _finish(subject, place, commands, results)


def _request(subject: Subject, place: Place, results: Path) -> dict[str, Any]:
    bounds = subject.bounds
    return {
        "device": subject.cluster.gpu.device,
        "ranks_per_node": place.ranks_per_node,
        "world_size": place.world_size,
        "rounds": bounds.rounds,
        "nodes_timeout_s": bounds.nodes_timeout_s,
        "exchange_timeout_s": bounds.exchange_timeout_s,
        "results": str(results),
    }


def _finish(
    subject: Subject,
    place: Place,
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
    results: Path,
) -> Report | None:
    bounds = subject.bounds
    limit = bounds.nodes_timeout_s + 2 * (bounds.rounds + 2) * bounds.exchange_timeout_s + _SPARE_S
    with gang.members(commands) as started:
        waited_for = started[:1] if place.leads else started
        in_time = gang.wait(waited_for, timeout_s=limit)
        failed = next((member for member in waited_for if member.process.poll() != 0), None)
        if failed is None and place.leads:
            gathered = decode(Gathered, json.loads(results.read_text(encoding="utf-8")))
            nodes = judge(gathered, cluster=subject.cluster, bounds=bounds, hosts=place.hosts)
            return _kept(subject, Report(date=_now(), nodes=nodes, bounds=bounds, gathered=gathered))
        if failed is None:
            return None
        reason = failed.fault() if in_time else f"no end within {limit:.0f} s"
    first = place.hosts[0] if place.hosts else place.address
    if place.leads:
        raise ClusterError(f"the preflight could not be collected on {first}: {reason}")
    if place.node == 1 and _is_untold(subject):  # one of those who are left has to tell
        _kept(subject, _unreached(first, by=place.host, bounds=bounds))
    raise ClusterError(f"{first}, where the preflight is collected, left {place.host} alone: {reason}")


def _is_untold(subject: Subject) -> bool:
    """Take the word unless the collector has told: it has heard all nodes, and we know only that we lost it."""
    if subject.run is None:
        return False
    try:
        (subject.run.logs / FAILED).open("x").close()  # the job script takes one of an earlier start away
    except FileExistsError:
        return False
    except OSError:  # for `_kept` to tell
        return True
    return True


def _unreached(host: str, *, by: str, bounds: PreflightConfig) -> Report:
    sentence = f"{by} could not reach it, or it left before the end"
    verdict = NodeVerdict(host=host, checks=(Check(name="answer", mark="fail", sentence=sentence),))
    return Report(date=_now(), nodes=(verdict,), bounds=bounds, gathered=None)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _kept(subject: Subject, report: Report) -> Report:
    """Leave the report in the run directory, and the names of failed nodes for the job script."""
    if subject.run is not None:
        try:
            names = "".join(f"{node.host}\n" for node in report.failed)
            write_whole(subject.run.logs / FAILED, names)  # first: it keeps others from telling
            write_whole(subject.run.path / "preflight.json", json.dumps(to_json(report), indent=1))
        except OSError as error:
            raise RunDirError(
                f"{subject.run.path} cannot be written: {error.strerror}; free or mend its disk"
            ) from error
    return report


# ---- for the verbs ------------------------------------------------------------------------------------------------


def require(run: RunDir) -> None:
    """Look at this host on behalf of a run; raise UnsoundNodeError where it should not start here."""
    job = run.job()
    subject = Subject(cluster=job.cluster, bounds=job.preflight, run=run)
    report = check(subject, gang.find(job.cluster, verb=f"{VERB} {run.path}"))
    if report is not None and report.failed:
        raise UnsoundNodeError(fault(report))


def fault(report: Report) -> str:
    """Name the nodes that failed, and what the first one failed at."""
    first = report.failed[0]
    others = (
        f"; {', '.join(node.host for node in report.failed[1:])} failed as well" if report.failed[1:] else ""
    )
    return f"{first.host} did not pass its preflight: {first.faults[0].sentence}{others}"


def to_json(report: Report) -> dict[str, Any]:
    """Everything that was found, by node."""
    return {
        "date": report.date,
        "passed": not report.failed,
        "failed": [node.host for node in report.failed],
        "nodes": [{"passed": node.passed, **encode(node)} for node in report.nodes],
        "bounds": encode(report.bounds),
        "measured": encode(report.gathered),
    }


def to_text(report: Report) -> str:
    """One line a node and one a fault; a node alone shows all its answers."""
    lines = []
    for node in report.nodes:
        found = node.checks if len(report.nodes) == 1 else node.faults
        sound = [] if node.faults else [check for check in node.checks if check.name in ("product", "pairs")]
        shown = "; ".join(check.sentence for check in sound if check.mark == "pass")
        lines.append(f"{'PASS' if node.passed else 'FAIL'}  {node.host}" + (f"  {shown}" if shown else ""))
        lines += [f"      {_short(check.mark):4}  {check.name:8}  {check.sentence}" for check in found]
    count = len(report.nodes)
    lines.append(f"{count - len(report.failed)} of {count} nodes passed")
    return "\n".join(lines)


def _short(mark: str) -> str:
    return {"pass": "pass", "fail": "FAIL"}.get(mark, "-")
