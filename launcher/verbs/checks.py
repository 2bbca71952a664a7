"""Questions asked after a run: did the loss fall, and does a resume repeat the same losses exactly?"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.checkpoint import CheckpointStore
from launcher.errors import CheckFailed
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir
from launcher.supervise.supervisor import run_workers


def check(run: RunDir, *, quiet_stdout: bool, say: Callable[[str], None]) -> None:
    """Ask what the configuration wants asked; raise CheckFailed on the first `no`."""
    checks = run.job().checks
    losses = _losses(run)
    if checks.loss_falls:
        say(check_loss_falls([losses[step] for step in sorted(losses)]))
    if checks.resume_is_exact:
        say(_check_resume(run, losses, quiet_stdout=quiet_stdout))


def check_loss_falls(losses: Sequence[float]) -> str:
    """Compare the mean of the first and the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
    if not last < first:
        raise CheckFailed(
            f"checks.loss_falls: the loss went from {first:.4f} to {last:.4f}; "
            "look at training.learning_rate and the data, or train longer"
        )
    return f"loss fell from {first:.4f} to {last:.4f}"


def _check_resume(run: RunDir, losses: dict[int, float], *, quiet_stdout: bool) -> str:
    store = CheckpointStore(run.checkpoints, keep_last=run.job().checkpoint.keep_last)
    num_steps = run.job().training.num_steps
    earlier = [path for path in store.committed() if store.verify(path).step < num_steps]
    if not earlier:
        raise CheckFailed(
            "checks.resume_is_exact: no checkpoint before the last step is kept; set checkpoint.interval"
        )
    replay = _copy_at(run, earlier[0])
    run_workers(replay, quiet_stdout=quiet_stdout)
    compared = compare_losses(losses, _losses(replay), after=store.verify(earlier[0]).step)
    shutil.rmtree(replay.path)
    return f"resume repeated {compared} losses exactly"


def compare_losses(first: dict[int, float], second: dict[int, float], *, after: int) -> int:
    """Hold the losses of every step after `after` against each other; return how many were equal."""
    steps = [step for step in sorted(first) if step > after]
    for step in steps:
        if first[step] != second.get(step):
            raise CheckFailed(
                f"checks.resume_is_exact: step {step} gave loss {second.get(step)} after the resume and "
                f"{first[step]} without; set training.deterministic=true, else report it"
            )
    return len(steps)


def _copy_at(run: RunDir, checkpoint: Path) -> RunDir:
    """A second run directory that stands where `checkpoint` was taken."""
    replay = RunDir(path=run.path / "resume_check")
    shutil.rmtree(replay.path, ignore_errors=True)
    for folder in (replay.metrics, replay.checkpoints, replay.logs):
        folder.mkdir(parents=True)
    for file in (run.config_file, run.plan_file, run.data_file, run.env_file):
        shutil.copy(file, replay.path)
    if run.weights.exists():
        replay.weights.symlink_to(run.weights)
    shutil.copytree(checkpoint, replay.checkpoints / checkpoint.name)
    return replay


def _losses(run: RunDir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read(run.metrics_file)}
