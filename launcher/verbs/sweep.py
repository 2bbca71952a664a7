"""`meshwright sweep` and `meshwright best`: try many plans, one run each, and tell which one was fastest."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import torchrun
from launcher.decode import encode
from launcher.errors import (
    FINISHED,
    INTERRUPTED,
    ClusterError,
    ConfigError,
    LauncherError,
    PlanError,
    TrainingError,
)
from launcher.output import Output, print_line
from launcher.planner.words.explain import cost_of
from launcher.planner.words.tables import describe, grid, seconds_text
from launcher.report.document import write
from launcher.run_dir import RunDir
from launcher.submit import slurm
from launcher.sweep.folder import (
    Entry,
    SweepDir,
    create,
    entries_of,
    is_sweep,
    lock,
    open_sweep,
    place_of,
)
from launcher.sweep.measured import stand, standing
from launcher.sweep.page import page
from launcher.sweep.points import Dropped, Expansion, expand, pin_words
from launcher.sweep.standings import HEADER, WORDS, Standings, rows, sentences, to_json
from launcher.verbs import drive, submit, train, words

DRY_RUN, PER_GPU = "--dry-run", "--per-gpu"
_LOOK_S = 2.0
_PINNED = ("plan.", "plan=", "strategy=")  # words that the pins of a plan replace


def sweep(arguments: list[str], output: Output) -> int:
    """Plan all points, drop what cannot be, and train or queue the rest; of a SWEEP_DIR tell how it stands."""
    if words.names_a_run(arguments):
        tell(open_sweep(Path(arguments[0]).expanduser()), output)
        return FINISHED
    words.check("sweep", arguments, output)
    if torchrun.started_us():
        raise ConfigError(
            "`meshwright sweep` starts the ranks of every point itself; call it without torchrun"
        )
    expansion = expand([word for word in arguments if word != DRY_RUN])
    if expansion is None:
        return FINISHED
    words.warn(expansion.job)
    path = place_of(expansion)
    output.say(points_text(expansion))
    if not expansion.points:
        raise PlanError(
            f"none of the {len(expansion.dropped)} points can be trained: {expansion.dropped[0].reason}"
        )
    if DRY_RUN in arguments:
        data, text = _would_be(expansion, path)
        output.result(data, text)
        return FINISHED
    written = create(expansion, path=path, command=["meshwright", "sweep", *arguments])
    output.say(f"\nsweep directory {written.path}")
    return go_on(written, output)


def tell(folder: SweepDir, output: Output) -> Standings:
    """Print where the points stand, fastest first, and write the page where the folder can be written."""
    found = stand(folder)
    with contextlib.suppress(LauncherError):
        write(folder.page, page(found, name=folder.path.name, folder=str(folder.path)))
    output.result(
        {"sweep": str(folder.path), "page": str(folder.page), **to_json(found)}, _text(folder, found)
    )
    return found


def best(arguments: list[str], output: Output) -> int:
    """Print the command that launches the winner: its plan pinned, all its steps."""
    per_gpu, named = PER_GPU in arguments, [word for word in arguments if word != PER_GPU]
    if len(named) != 1 or named[0].startswith("-"):
        raise ConfigError(
            f"`meshwright best SWEEP_DIR` takes the folder of one sweep, not '{' '.join(named)}'; "
            f"{PER_GPU} and --json are its flags"
        )
    folder = open_sweep(Path(named[0]).expanduser())
    winner = stand(folder).winner(per_gpu=per_gpu)
    if winner is None:
        raise TrainingError(
            f"no point of {folder.path} has a step after warm-up yet; see `meshwright sweep {folder.path}`"
        )
    entry = next(entry for entry in folder.record.points if entry.name == winner.name)
    command = launch_command(folder, entry)
    told = {"sweep": str(folder.path), "point": winner.name, "command": command}
    figures = {"tokens_per_s": winner.tokens_per_s, "step_s": winner.measured_s, "plan": winner.plan}
    output.result({**told, **figures}, shlex.join(command))
    return FINISHED


def launch_command(folder: SweepDir, entry: Entry) -> list[str]:
    """Return the words that launch one point in full, under the plan that it has."""
    record = folder.record
    verb = "train" if record.place == "local" else "submit"
    kept = [word for word in (*record.words, *entry.words) if not word.startswith(_PINNED)]
    return ["meshwright", verb, *record.flags, *kept, *pin_words(folder.run(entry).plan())]


# ---- training the points ------------------------------------------------------------------------------------------


def go_on(folder: SweepDir, output: Output) -> int:
    """Train or queue every point that is not finished, then tell; an interruption leaves what is finished."""
    here = folder.record.place == "local"
    descriptor = lock(folder)
    try:
        code = _train(folder, output) if here else _queue(folder, output)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        os.close(descriptor)
    if code != FINISHED:
        queued = "" if here else "jobs that are queued go on by themselves; "
        again = f"`meshwright resume {shlex.quote(str(folder.path))}`"
        print_line(f"meshwright: interrupted; {queued}{again} takes up the points that are left", sys.stderr)
    found = tell(folder, output)
    if code == FINISHED and _has_failed(found, was_tried=here):
        # The table is the answer; a fault would put its own document in its place.
        print_line(
            f"meshwright: no point of {folder.path} has finished; see above what each failed of",
            sys.stderr,
        )
        return TrainingError.exit_code
    return code


def _has_failed(found: Standings, *, was_tried: bool) -> bool:
    """Tell whether all is over and nothing has come of it; what fails before its start leaves no event in its run."""
    stopped = any(point.state == "stopped" for point in found.points)
    return (found.is_over or (was_tried and not stopped)) and not any(p.is_finished for p in found.points)


def resume(arguments: list[str], output: Output) -> int:
    """Go on with the points of a sweep that are left, or with a run."""
    folder = _folder(arguments)
    return train.resume(arguments, output) if folder is None else go_on(folder, output)


def status(arguments: list[str], output: Output) -> int:
    """Tell how the points of a sweep stand, or a run."""
    folder = _folder(arguments)
    if folder is None:
        return submit.status(arguments, output)
    tell(folder, output)
    return FINISHED


def cancel(arguments: list[str], output: Output) -> int:
    """End the jobs of all points of a sweep, or of a run, and say how."""
    folder = _folder([word for word in arguments if word != submit.NOW])
    if folder is None:
        return submit.cancel(arguments, output)
    if folder.record.place == "local":
        raise ConfigError(
            f"{folder.path} is trained by a `meshwright sweep` of this host; stop that with Ctrl-C"
        )
    at_once = submit.NOW in arguments
    runs = {entry.name: folder.run(entry) for entry in folder.record.points}
    told = {
        name: submit.end(run, at_once=at_once) if slurm.numbers(run.events()) else []
        for name, run in runs.items()
    }
    lines = [f"{name}: {sentence}" for name, done in told.items() for sentence in done]
    output.result(
        {"sweep": str(folder.path), "done": told}, "\n".join(lines) or "no job of this sweep is queued"
    )
    return FINISHED


def _folder(arguments: Sequence[str]) -> SweepDir | None:
    """Return the sweep that is the only word, if it is one."""
    path = Path(arguments[0]).expanduser() if len(arguments) == 1 else None
    return open_sweep(path) if path is not None and is_sweep(path) else None


def _train(folder: SweepDir, output: Output) -> int:
    entries = folder.record.points
    for number, entry in enumerate(entries, start=1):
        run = folder.run(entry)
        if standing(run, entry).is_finished:
            continue
        output.say(f"\npoint {number} of {len(entries)}  {entry.shown}")
        try:
            code = drive.work(run, output)
        except LauncherError as error:
            print_line(
                f"meshwright: point {entry.name} failed (exit code {error.exit_code}): {error}", sys.stderr
            )
            continue
        if code != FINISHED:
            return code
    return FINISHED


def _queue(folder: SweepDir, output: Output) -> int:
    """Queue what is neither finished nor queued; with a limit each job waits for the one so many places before it."""
    runs = [folder.run(entry) for entry in folder.record.points]
    live = {run.path: _live(run) for run in runs}
    lanes = [numbers[-1] for numbers in live.values() if numbers]
    most = folder.record.max_parallel
    for run, entry in zip(runs, folder.record.points, strict=True):
        if live[run.path] or standing(run, entry).is_finished:
            continue
        behind = lanes[-most] if most is not None and len(lanes) >= most else None
        try:
            live[run.path] = submit.queue(run, behind=behind)
        except ClusterError as error:
            again = f"`meshwright resume {shlex.quote(str(folder.path))}`"
            raise ClusterError(f"{error}; {again} queues {entry.name} and those after it") from error
        lanes.append(live[run.path][-1])
        output.say(f"submitted {' '.join(live[run.path])}  {entry.name}")
    if runs[0].job().submit.wait:
        waiting = list(lanes)
        while waiting := [number for number in waiting if not slurm.ask(number).has_ended]:
            time.sleep(_LOOK_S)
    return FINISHED


def _live(run: RunDir) -> list[str]:
    return [number for number in slurm.numbers(run.events()) if not slurm.ask(number).has_ended]


# ---- words --------------------------------------------------------------------------------------------------------


def points_text(expansion: Expansion) -> str:
    """Return the points with their predictions, and those that are dropped with the reason."""
    lines = [f"{len(expansion.points)} points to try, {len(expansion.dropped)} dropped"]
    if expansion.points:
        header = ("", "point", "plan", "nodes", "predicted s/step")
        lines += ["", grid([header, *_planned(expansion)], words=(1, 2))]
    if expansion.dropped:
        lines += ["", dropped_text(expansion.dropped)]
    return "\n".join(lines)


def dropped_text(dropped: Sequence[Dropped]) -> str:
    """Return a line for each point that is not tried."""
    return grid([("dropped", "reason"), *((found.shown, found.reason) for found in dropped)], words=(0, 1))


def _planned(expansion: Expansion) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for number, point in enumerate(expansion.points, start=1):
        plan, decision = describe(point.decision.plan), point.decision
        seconds = seconds_text(cost_of(decision.ranking.choose()).step_s)
        told = "" if point.shown.endswith(plan) else plan
        found.append((str(number), point.shown, told, str(decision.job.cluster.num_nodes), seconds))
    return found


def _would_be(expansion: Expansion, path: Path) -> tuple[dict[str, Any], str]:
    """Return what would be tried, with the calls of sbatch; where one waits for another, JOB is that one's number."""
    most = expansion.job.sweep.max_parallel
    calls: list[list[str]] = []
    if expansion.job.submit.name == "slurm":
        for number, (entry, point) in enumerate(zip(entries_of(expansion), expansion.points, strict=True)):
            behind = "JOB" if most is not None and number >= most else None
            calls.append(submit.call(point.decision, path / entry.name, behind=behind))
    points = [{"words": list(p.words), "plan": describe(p.decision.plan)} for p in expansion.points]
    data = {"points": points, "dropped": encode(expansion.dropped), "commands": calls}
    return data, "\n".join(["", *map(shlex.join, calls)] if calls else [])


def _text(folder: SweepDir, found: Standings) -> str:
    lines = ["", grid([HEADER, *rows(found)], words=WORDS)]
    if folder.record.dropped:
        lines += ["", dropped_text(folder.record.dropped)]
    path = shlex.quote(str(folder.path))
    told = sentences(found, folder=path)
    lines += ["", *told] if told else [""]
    lines.append(f"page      {folder.page}")
    if found.ranked:
        lines.append(f"launch    `meshwright best {path}` prints the command of the fastest")
    if not found.is_over:
        lines.append(f"later     `meshwright sweep {path}` tells again, `meshwright resume` goes on")
    return "\n".join(lines)
