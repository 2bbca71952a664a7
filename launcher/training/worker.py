"""One process a rank: `python -m launcher.training.worker RUN_DIR`. Reads the frozen folder, and plans nothing.

`--from-rank0` instead of RUN_DIR: bare torchrun started us, and rank 0 tells where the run lies.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import re
import shutil
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import psutil

import strategies
from launcher import ranks as torch_side
from launcher.cluster import nccl
from launcher.config import Job
from launcher.decode import encode
from launcher.environments import interpreter
from launcher.errors import (
    CheckpointError,
    ClusterError,
    DeviceMemoryError,
    EngineError,
    LauncherError,
    RunDirError,
    TrainingError,
)
from launcher.heartbeat import Heart
from launcher.monitor import log
from launcher.monitor.alerts import Alerts, Outbox
from launcher.monitor.metrics import MetricsFile, truncate_after
from launcher.monitor.progress import Reporter
from launcher.monitor.sinks.writers import About, Sink, open_writers
from launcher.provenance import versions
from launcher.ranks import Ranks, Store
from launcher.run_dir import RunDir, open_run, write_error
from launcher.submit.local import EXPORT, LAUNCHER_PID
from launcher.supervise import unwatched
from launcher.training.saver import RandomState
from launcher.training.trainer import Process, Trainer
from strategies import environment
from strategies.spec import Plan

logger = logging.getLogger(__name__)
FROM_RANK0 = "--from-rank0"
SHARE = "--share"
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't|not enough)|CUDA error: out of memory|Cannot allocate memory"
)


def main(arguments: list[str]) -> int:
    """Run this rank; return its exit code."""
    store = None
    export = Path(arguments.pop()) if EXPORT in arguments else None
    arguments = [word for word in arguments if word != EXPORT]
    where = None if arguments == [FROM_RANK0] else arguments[-1]
    if FROM_RANK0 in arguments or SHARE in arguments:
        where, store = torch_side.share_run_dir(where)
    assert where is not None
    rank = int(os.environ.get("RANK", "0"))
    run = RunDir(path=Path(where))
    try:
        run = open_run(Path(where))
        heart = _show_life(run, rank=rank)
        if unwatched.is_ours():
            unwatched.tell_restart(run)
        _work(run, heart, store=store, export=export)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        return _report(run, rank=rank, error=error)
    return 0


def _show_life(run: RunDir, *, rank: int) -> Heart:
    """Begin to beat, and tell on SIGUSR1 what all threads are doing, also while they are deep in an engine."""
    with suppress(OSError):
        run.logs.mkdir(exist_ok=True)
        stacks = (run.logs / f"stacks_rank_{rank:05d}.txt").open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    return Heart(run.heartbeats, rank=rank)


def _work(run: RunDir, heart: Heart, *, store: Store | None, export: Path | None) -> None:
    job, plan, dataset = run.job(), run.plan(), run.dataset()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != plan.world_size:
        raise ClusterError(
            f"WORLD_SIZE={world_size} does not match the frozen plan of {plan.world_size} ranks "
            f"(dp={plan.dp} tp={plan.tp} pp={plan.pp} cp={plan.cp}); start {plan.world_size} processes"
        )
    frozen = run.interpreter()
    if frozen is not None:  # each node may have its own; under bare torchrun nobody has looked yet
        interpreter.check_import(strategies.ENGINE_PACKAGES.get(plan.strategy), strategy=plan.strategy)
        interpreter.check(frozen, has=interpreter.installed(), record=run.env_file)
    if job.cluster.world_size != plan.world_size:
        raise RunDirError(
            f"{run.path}: the plan is for {plan.world_size} ranks and cluster.* for {job.cluster.world_size}: "
            "planning anew was cut short; repeat `meshwright resume` with the same words"
        )
    on_device = plan.strategy in strategies.ENGINE_PACKAGES and job.cluster.gpu.device == "cuda"
    _set_variables(job, plan, on_device=on_device)
    ranks = torch_side.connect(os.environ, on_device=on_device, store=store)
    log.setup(ranks.rank, world_size=ranks.world_size, directory=run.logs)
    trainer = Trainer(
        run=run,
        job=job,
        plan=plan,
        dataset=dataset,
        strategy=_build_strategy(run, job, plan, ranks),
        ranks=ranks,
        process=_process(heart),
        versions=versions(),
    )
    log.quiet_libraries()  # engines install handlers of their own when they are imported
    trainer.restore()
    if export is not None:
        _export(trainer, export)
    else:
        _train(trainer, run, job, ranks)
    heart.beat("leaving", trainer.step)
    trainer.strategy.teardown()
    # Only on the good way out: beside a failed rank this would wait for peers that never come.
    torch_side.disconnect()


def _set_variables(job: Job, plan: Plan, *, on_device: bool) -> None:
    try:
        environment.apply(environment.environment(plan, job.training), os.environ)
    except ValueError as error:
        raise EngineError(str(error)) from error
    if on_device or job.cluster.gpu.device == "cpu":
        nccl.fill(os.environ, job.cluster)


def _process(heart: Heart) -> Process:
    return Process(
        device_peak_bytes=torch_side.device_peak_bytes(),
        random=RandomState(get=torch_side.random_state, set=torch_side.restore_random_state),
        is_abandoned=_launcher_is_gone,
        beat=heart.beat,
        device_memory=torch_side.device_memory(),
        pulse_s=torch_side.pulse_s,
        open_profiler=torch_side.Profiler,
    )


def _export(trainer: Trainer, directory: Path) -> None:
    if trainer.step == 0:
        raise CheckpointError(
            f"{trainer.run.checkpoints} holds no checkpoint yet, so there is nothing to export; train first"
        )
    # Written aside: a folder that is there is whole, and a failed export can be repeated.
    aside = directory.with_name(f".{directory.name}.part")
    if trainer.ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    trainer.ranks.barrier()
    try:
        trainer.strategy.export(aside)
    except ValueError as error:  # an adapter's own refusal, in a sentence
        raise EngineError(str(error)) from error
    trainer.ranks.barrier()  # stages may write files of their own
    if trainer.ranks.rank == 0:
        os.replace(aside, directory)
        trainer.run.log_event("exported", step=trainer.step, directory=str(directory))
        logger.info("weights of step %d written to %s", trainer.step, directory)


def _train(trainer: Trainer, run: RunDir, job: Job, ranks: Ranks) -> None:
    by_host = dict(ranks.gather((socket.gethostname(), nccl.look(os.environ))))
    if ranks.rank == 0:
        trainer.log_restored()
        # Where torchrun or Slurm starts us nobody else saw when that was.
        begun = psutil.Process().create_time()
        run.log_event("started", step=trainer.step, hosts=sorted(by_host), begun=begun)
        for sentence in nccl.differences(by_host):
            logger.warning("%s", sentence)
        trainer.sinks = _open_sinks(run, job, start_step=trainer.step)
    # What set-up made lives as long as the run: full collections need not walk it at some step or other.
    gc.collect()
    gc.freeze()
    try:
        trainer.train()
    finally:
        for sink in trainer.sinks:
            sink.close()


def _open_sinks(run: RunDir, job: Job, *, start_step: int) -> tuple[Sink, ...]:
    """metrics.jsonl, the configured writers and the console; what a later step left there is taken back."""
    history = truncate_after(run.metrics_file, step=start_step)
    about = About(directory=run.metrics, settings=encode(job), plan=run.plan_data())
    writers = open_writers(job.monitor, about=about, history=history)
    outbox = Outbox(run.metrics, repeat_s=job.monitor.alerts.repeat_s, announce=writers.announce)
    return (
        MetricsFile(run.metrics_file),
        Alerts(job.monitor.alerts, outbox=outbox),
        writers,
        Reporter(
            job.training.num_steps,
            start_step=start_step,
            interval=job.monitor.log_interval,
            stream=sys.stdout,
        ),
    )


def _build_strategy(run: RunDir, job: Job, plan: Plan, ranks: Ranks) -> strategies.Strategy:
    strategy = strategies.load(plan.strategy)()
    weights = run.weights if job.weights is None else Path(job.weights)
    if job.weights is None and ranks.rank == 0:
        strategy.create_weights(job.model, job.training, weights)
    ranks.barrier()
    try:
        strategy.setup(plan, job.model, job.training, weights)
    except ValueError as error:  # an adapter's own refusal, in a sentence
        raise EngineError(str(error)) from error
    return strategy


def _launcher_is_gone() -> bool:
    """Tell whether a launcher started us and died without saying so."""
    launcher = os.environ.get(LAUNCHER_PID)
    return launcher is not None and not psutil.pid_exists(int(launcher))


def _report(run: RunDir, *, rank: int, error: BaseException) -> int:
    """Leave the cause for the launcher; a person who runs us under bare torchrun sees the sentence as well."""
    trace = traceback.format_exc()
    named = _name(error)
    if unwatched.is_ours():
        # torchrun ends the ranks beside one that has left: this one has something to tell first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError):  # a full or vanished disk; the sentence below still reaches the log
        frame = _first_user_frame(error)
        write_error(run, rank=rank, host=socket.gethostname(), error=named, frame=frame, trace=trace)
    print(
        f"meshwright: rank {rank}: {str(named).splitlines()[0] if str(named) else type(named).__name__}",
        file=sys.stderr,
    )
    if unwatched.is_ours():
        unwatched.tell(run)
    return named.exit_code if isinstance(named, LauncherError) else TrainingError.exit_code


def _name(error: BaseException) -> BaseException:
    if _is_out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else "host memory is exhausted"
        return DeviceMemoryError(
            f"out of memory: {first}; use a smaller plan.micro_batch_size, plan.recompute=full "
            "or a higher plan.zero_stage"
        )
    if isinstance(error, ImportError):
        return EngineError(f"a package that this strategy needs cannot be imported: {error}")
    return error


def _is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's allocator for processors, and CUDA outside of PyTorch's allocator, raise plain RuntimeErrors.
    return isinstance(error, MemoryError | torch_side.device_error()) or (
        isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
    )


def _first_user_frame(error: BaseException) -> str | None:
    """The innermost line that is not inside an installed package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader may have left
            stream.flush()
    # Leave at once. After a fault, destructors of a process group may wait for ranks that wait for us; after a
    # good end, gloo's threads now and then abort the interpreter's own way out (seen as SIGABRT, all work done).
    os._exit(code)
