"""`meshwright probe nccl`: collectives with and without candidate settings; what wins beyond noise is written down."""

from __future__ import annotations

import json
import math
import os
import random
import select
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launcher import compose
from launcher.cluster import nccl, nccl_trial
from launcher.cluster.nccl_trial import Candidate, Outcome
from launcher.cluster.spec import ClusterSpec, Tuned
from launcher.decode import decode, encode
from launcher.errors import FINISHED, ClusterError, ConfigError
from launcher.output import Output
from launcher.submit import gang
from launcher.submit.gang import Member, Place
from launcher.verbs import cluster_file, words

WORKER = "launcher.verbs.tune_worker"
VERB = "probe nccl"
INHERITED, CONTROL = "as it is", "as it is, again"
_START_S = 120.0  # for importing torch and finding each other
_TURN_S = 60.0  # for one round of one setting; a setting that takes longer is out


@dataclass(frozen=True, kw_only=True)
class Request:
    """The words of the verb beside those of the cluster."""

    out: str = "cluster.yaml"
    rounds: int = 10
    force: bool = False  # replace a file that is there
    candidates: tuple[Candidate, ...] = ()  # of the words try=; none: those of the fabric

    def __post_init__(self) -> None:
        cluster_file.check_name(self.out)
        if not 1 <= self.rounds <= 16:
            raise ValueError(f"rounds={self.rounds} must lie between 1 and 16")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What ran in all rounds: the inherited setting, the same again as a control, or a candidate."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What each setting took, and what became of it."""

    settings: tuple[Setting, ...]
    cells: tuple[tuple[str, int], ...]
    seconds: Mapping[str, Sequence[Sequence[float]]]  # by setting: rounds of cells
    outcomes: Mapping[str, Outcome]
    rounds: int

    @property
    def winner(self) -> Setting | None:
        """The fastest setting that may be adopted."""
        won = [s for s in self.settings[2:] if self.outcomes[s.name].verdict == "adopt"]
        return max(won, key=lambda setting: self.outcomes[setting.name].speedup, default=None)


def tune(arguments: list[str], output: Output) -> int:
    """Try settings together with those who were started on other nodes; rank 0's tells and writes."""
    request, cluster = read(arguments)
    path = Path(request.out).expanduser().absolute()
    place = gang.find(cluster, verb=VERB)
    if place.leads:
        cluster_file.check(path, force=request.force)
    settings = settings_of(request, cluster)
    trial = run(cluster, settings, place, rounds=request.rounds)
    if trial is None:
        return FINISHED
    found = adopted(trial, host=place.host)
    if found is not None:
        changed = replace(cluster, name=path.stem, tuned=found)
        cluster_file.write(path, changed, by=f"{VERB}` on {found.host}, {found.date}")
    told = {"out": None if found is None else str(path), "tuned": encode(found), **to_json(trial)}
    output.result(told, to_text(trial, written=None if found is None else path))
    return FINISHED


def read(arguments: Sequence[str]) -> tuple[Request, ClusterSpec]:
    """Split the words into the verb's own and those that describe the cluster."""
    keys = [key for key in Request.__dataclass_fields__ if key != "candidates"]
    tried = [word for word in arguments if word.startswith("try=")]
    rest = [word for word in arguments if word not in tried]
    own, described = words.of_cluster(VERB, rest, own=keys, known=("try",))
    try:
        candidates = tuple(nccl_trial.parse(word.removeprefix("try=")) for word in tried)
    except ValueError as error:
        raise ConfigError(f"{error}; a candidate is try=NCCL_ALGO=Tree, or several variables") from error
    request = replace(decode(Request, own), candidates=candidates)
    [job] = compose.jobs(described)
    return request, job.cluster


def settings_of(request: Request, cluster: ClusterSpec) -> list[Setting]:
    """Return what is to run; raise ConfigError for settings that NCCL would not take, and for too few rounds."""
    fabric = nccl.fabric_of(cluster, nccl.look(os.environ))
    given = request.candidates or nccl_trial.candidates(fabric, device=cluster.gpu.device)
    if not given:
        raise ConfigError(
            f"cluster.fabric={fabric} has no candidates of ours, its plug-in tunes; name one with try="
        )
    for candidate in given:
        for finding in nccl.lint(nccl.collect(candidate.environment, {}), fabric):
            if finding.verdict == "refuse":
                setting = f"{finding.setting.name}={finding.setting.value}"
                raise ConfigError(
                    f"try={candidate.name}: {setting}: {finding.message}; see {finding.reference}"
                )
    parts = len(nccl_trial.cells(cluster.gpu.device))
    fewest = nccl_trial.fewest_rounds(num_candidates=len(given), num_cells=parts)
    if request.rounds < fewest:
        raise ConfigError(
            f"rounds={request.rounds} cannot tell {len(given)} candidates, and what each does to {parts} operations "
            f"and sizes, from noise; use {fewest} or more"
        )
    tried = [Setting(name=c.name, environment=c.environment, source=c.source) for c in given]
    return [Setting(name=INHERITED), Setting(name=CONTROL), *tried]


# ---- measuring ----------------------------------------------------------------------------------------------------


def run(cluster: ClusterSpec, settings: Sequence[Setting], place: Place, *, rounds: int) -> Trial | None:
    """Let resident processes of every setting measure in turns; None on nodes that only help."""
    with tempfile.TemporaryDirectory(prefix="meshwright-nccl-", dir=gang.scratch()) as folder:
        request = Path(folder) / "request.json"
        content = {"device": cluster.gpu.device, "start_s": _START_S, "turn_s": _TURN_S}
        request.write_text(json.dumps(content), encoding="utf-8")
        commands = [
            (gang.command(WORKER, str(request), str(number)), _environment(place, rank, cluster, setting))
            for number, setting in enumerate(settings)
            for rank in place.ranks
        ]
        with gang.members(commands, pipes=True) as started:
            if not place.leads:
                inherited = started[: len(place.ranks)]
                limit = _START_S + (rounds + 1) * len(settings) * _TURN_S
                if not gang.wait(inherited, timeout_s=limit):
                    raise ClusterError(
                        f"{VERB} on {place.address} did not come to an end within {limit:.0f} s"
                    )
                return None
            first = started[:: len(place.ranks)]  # rank 0 of each setting
            return _lead(settings, first, device=cluster.gpu.device, rounds=rounds)


def _environment(place: Place, rank: int, cluster: ClusterSpec, setting: Setting) -> dict[str, str]:
    """What training would have, and the candidate on top of it."""
    inherited = place.environment(rank, os.environ)
    nccl.fill(inherited, replace(cluster, tuned=None))
    return {**inherited, **setting.environment}


def _lead(settings: Sequence[Setting], first: Sequence[Member], *, device: str, rounds: int) -> Trial:
    turns = {setting.name: _Turns(member=member) for setting, member in zip(settings, first, strict=True)}
    deadline = time.monotonic() + _START_S
    for one in turns.values():
        one.answer(until=deadline)
        _check_inherited(turns)  # it brings the store: without it the others wait for nothing
    for one in turns.values():
        one.take()  # connections, buffers
    order = random.Random(0)
    for _ in range(rounds):
        left = [one for one in turns.values() if one.fault is None]
        for one in order.sample(left, k=len(left)):
            one.seconds.append(one.take())
    for one in turns.values():
        one.end()
    _check_inherited(turns)
    return _judge(settings, turns, device=device, rounds=rounds)


def _check_inherited(turns: Mapping[str, _Turns]) -> None:
    if turns[INHERITED].fault is not None:
        raise ClusterError(f"collectives cannot be measured here: {turns[INHERITED].fault}")


@dataclass
class _Turns:
    """One setting's rank 0, as it is spoken to."""

    member: Member
    fault: str | None = None  # why it is out
    seconds: list[list[float]] = field(default_factory=list)

    def take(self) -> list[float]:
        """Let the setting measure once; nothing comes of one that is out."""
        if self.fault is None and self._say("go"):
            return list(self.answer(until=time.monotonic() + _TURN_S) or [])
        return []

    def end(self) -> None:
        """Let its processes go."""
        self._say("end")

    def _say(self, word: str) -> bool:
        assert self.member.process.stdin is not None
        try:
            self.member.process.stdin.write(f"{word}\n".encode())
            self.member.process.stdin.flush()
        except OSError:
            self.fault = self.fault or self.member.fault()
        return self.fault is None

    def answer(self, *, until: float) -> Any:
        """Read one line; without one in time, or at all, the setting is out."""
        assert self.member.process.stdout is not None
        descriptor, line = self.member.process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            part = os.read(descriptor, 2**16) if ready else None
            if not part:
                late = "its processes did not answer in time"
                self.fault = late if part is None else self.member.fault()
                return None
            line += part
        return json.loads(line)


def _judge(settings: Sequence[Setting], turns: Mapping[str, _Turns], *, device: str, rounds: int) -> Trial:
    outcomes = {}
    for setting in settings[1:]:
        one = turns[setting.name]
        if one.fault is not None:
            outcomes[setting.name] = Outcome(verdict="could not run", reason=one.fault)
        else:
            # A candidate has to beat both copies: processes may be unlucky for as long as they live.
            against = [INHERITED] if setting.name == CONTROL else [INHERITED, CONTROL]
            bases = [turns[name].seconds for name in against if turns[name].fault is None]
            outcomes[setting.name] = nccl_trial.compare(bases, one.seconds, num_candidates=len(settings) - 2)
    return Trial(
        settings=tuple(settings),
        cells=nccl_trial.cells(device),
        seconds={name: one.seconds for name, one in turns.items() if one.fault is None},
        outcomes=outcomes,
        rounds=rounds,
    )


def adopted(trial: Trial, *, host: str) -> Tuned | None:
    """Return what the cluster file keeps of the winner."""
    if trial.winner is None:
        return None
    outcome = trial.outcomes[trial.winner.name]
    return Tuned(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        host=host,
        environment=trial.winner.environment,
        speedup=round(outcome.speedup, 4),
        p=outcome.p,
        rounds=trial.rounds,
    )


# ---- what is told -------------------------------------------------------------------------------------------------


def to_json(trial: Trial) -> dict[str, Any]:
    """Everything that was timed, and each verdict."""
    return {
        "rounds": trial.rounds,
        "cells": [{"operation": operation, "bytes": size} for operation, size in trial.cells],
        "settings": [
            {
                **encode(setting),
                **({} if setting.name == INHERITED else encode(trial.outcomes[setting.name])),
                "seconds": trial.seconds.get(setting.name),
            }
            for setting in trial.settings
        ],
    }


def to_text(trial: Trial, *, written: Path | None) -> str:
    """A line a setting, and what became of the winner."""
    lines = [f"{'':32}  faster  {'best and worst part':>42}  verdict"]
    for setting in trial.settings[1:]:
        outcome = trial.outcomes[setting.name]
        lines.append(
            f"{setting.name[:32]:32}  {_percent(outcome.speedup):>6}  {_extremes(trial, outcome):>42}  "
            f"{outcome.verdict}: {outcome.reason}"
        )
    if written is not None and trial.winner is not None:
        lines.append(
            f"adopted   {trial.winner.name}: written to {written}; plan and train with cluster={written.name}"
        )
    else:
        lines.append("adopted   nothing: no setting wins beyond noise, so communication is left as it is")
    return "\n".join(lines)


def _percent(speedup: float) -> str:
    return f"{speedup - 1:+.1%}"


def _extremes(trial: Trial, outcome: Outcome) -> str:
    if not outcome.by_cell:
        return ""
    found = [max(outcome.by_cell), min(outcome.by_cell)]
    named = []
    for speedup in found:
        operation, size = trial.cells[outcome.by_cell.index(speedup)]
        named.append(f"{operation} {_size(size)} {_percent(speedup)}")
    return ", ".join(named)


def _size(num_bytes: int) -> str:
    power = int(math.log2(num_bytes)) // 10
    return f"{num_bytes >> 10 * power}{['B', 'K', 'M', 'G'][power]}"
