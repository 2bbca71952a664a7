"""The whole configuration on one page: Job and its sections, as the frozen config.yaml holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.checkpoint import CheckpointPolicy
from launcher.cluster.spec import ClusterSpec
from launcher.data.config import DataConfig
from launcher.monitor.config import MonitorConfig
from launcher.planner.calibration import Calibration
from launcher.planner.problem import PlanRequest
from launcher.planner.search.goals import Goal
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

MemoryRemedy = Literal["halve_micro_batch", "more_recompute", "shard_more", "offload", "replan"]
LossRemedy = Literal["skip_batch", "halve_learning_rate"]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Which engine, and keys passed through to it after a strict check."""

    name: str
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """How workers are started: here, by Slurm, or on hosts that are named (by a person on each, or through ssh)."""

    name: Literal["local", "slurm", "torchrun", "ssh"] = "local"
    port: int | None = None  # of the rendezvous; null: a free one, or one that the job's number gives
    # Python of the workers. null: this one where it has the engine, else the one of `meshwright env create`.
    python: str | None = None
    prefix: tuple[str, ...] = ()  # before that Python on each node: a container's command
    inside: str | None = None  # Python inside the container that `prefix` or `srun` opens
    wait: bool = False  # until the job has ended
    preflight: bool = False  # look at every node before a start, and start without those that are not sound
    # Slurm. Flags by name: {partition: gpu, exclusive: true} is --partition=gpu --exclusive.
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    srun: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    signal_s: int = 180  # before the time limit, to save and leave
    requeue: bool = True
    max_restarts: int = 3  # from one and the same checkpoint
    chain: int = 1  # jobs, each begun when the one before has ended
    after: str | None = None  # a dependency as sbatch writes it: afterok:123
    # Hosts without Slurm.
    hosts: tuple[str, ...] = ()
    hostfile: str | None = None  # one host a line; `slots=8` and the like behind it are left alone
    ssh: tuple[str, ...] = ("ssh", "-o", "BatchMode=yes")

    def __post_init__(self) -> None:
        for key, lowest in (("signal_s", 1), ("max_restarts", 0), ("chain", 1)):
            if getattr(self, key) < lowest:
                raise ValueError(f"submit.{key}={getattr(self, key)} must be at least {lowest}")
        if self.inside is not None and not self.prefix and not self.srun:
            raise ValueError(
                f"submit.inside={self.inside} is a Python inside a container, which submit.prefix or submit.srun "
                "has to open; set one, or name the Python with submit.python"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the validation split is read, and how much of it."""

    interval: int = 0  # steps between evaluations; 0: only after the last step
    num_sequences: int = (
        64  # per evaluation, over all ranks; rounded up to whole global batches; 0: none at all
    )


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    """Questions asked after a run; a `no` is exit code 11."""

    loss_falls: bool = False
    resume_is_exact: bool = False
    max_deviation: float | None = (
        None  # of `compare`: between losses of one step, relative to the first engine's
    )


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig:
    """What becomes of a run whose workers fail: how often they start again, when they hang, what may be changed."""

    max_restarts: int = 100  # of one launcher; 0: a failure ends the run
    max_fruitless: int = 3  # starts in a row without a new step or checkpoint, then the run ends
    backoff_s: float = (
        5.0  # before the start after a fruitless one, doubled with each more; after progress: none
    )
    backoff_max_s: float = 300.0
    init_timeout_s: float = (
        1800.0  # without a sign of life: start-up, the first step, evaluations, checkpoints
    )
    step_timeout_s: float = 600.0  # the same in the loop
    # Several hosts without Slurm.
    host_timeout_s: float = 60.0  # without a word from a host's launcher, or a way to the first host
    host_wait_s: float = 3600.0  # for hosts that are missing, before a start
    # What may be changed when memory runs out, in this order; the global batch stays as it is.
    on_out_of_memory: tuple[MemoryRemedy, ...] = ()
    # What may be changed when loss or gradient norm are no number, or the loss leaps, in this order.
    on_bad_loss: tuple[LossRemedy, ...] = ()
    spike_factor: float | None = (
        None  # a loss above so many times the median of the last steps is bad; null: none is
    )
    # Command that says how this host is: exit code 0 and the number of sound devices in its last line. null: the
    # GPUs that the driver shows. Asked before every start.
    health_command: str | None = None
    health_interval_s: float = 30.0  # between two questions, while devices are missing
    elastic: bool = False  # while devices are missing train on fewer ranks; false: wait for them

    def __post_init__(self) -> None:
        for key, lowest in (
            ("max_restarts", 0),
            ("max_fruitless", 1),
            ("backoff_s", 0),
            ("backoff_max_s", 0),
        ):
            if getattr(self, key) < lowest:
                raise ValueError(f"supervise.{key}={getattr(self, key)} must be at least {lowest}")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(
                f"supervise.spike_factor={self.spike_factor} must be above 1; null looks for no spikes"
            )
        for key in ("init_timeout_s", "step_timeout_s", "health_interval_s", "host_timeout_s", "host_wait_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"supervise.{key}={getattr(self, key)} must be above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How `meshwright sweep` tries its points; without meaning for one run."""

    top_k: int | None = None  # the planner's best so many plans of each job; null: its choice
    steps: int | None = None  # a short trial of each point; null: all of training.num_steps
    max_parallel: int | None = None  # jobs of submit=slurm that may run side by side; null: as many as fit

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"sweep.{key}={value} must be at least 1; null sets no limit")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What a node has to be before a run starts on it; where the bounds come from: docs/cluster.md."""

    check_timeout_s: float = 15.0  # for one look at a node
    nodes_timeout_s: float = 180.0  # until the last node has answered
    exchange_timeout_s: float = 30.0  # for one round of exchanges between nodes
    rounds: int = 4  # of them, each with other pairs
    # Lowest share of what the planner assumes, and of what the median node reaches.
    min_product: float = 0.8  # a large matrix product
    min_bandwidth: float = 0.7
    min_memory: float = 0.5  # of cluster.host_memory_gib that is free
    max_gpu_used_gib: float = 2.0  # somebody else's processes on a GPU
    min_disk_gib: float = 10.0  # free in the run directory and in the folder for temporary files
    min_inodes: int = 10_000
    max_clock_skew_s: float = 1.0  # from the median node

    def __post_init__(self) -> None:
        for key in ("check_timeout_s", "nodes_timeout_s", "exchange_timeout_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"preflight.{key}={getattr(self, key)} must be above 0 seconds")
        for key in ("min_product", "min_bandwidth", "min_memory"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"preflight.{key}={getattr(self, key)} must lie between 0 and 1")
        for key in ("rounds", "max_gpu_used_gib", "min_disk_gib", "min_inodes", "max_clock_skew_s"):
            if getattr(self, key) < 0:
                raise ValueError(f"preflight.{key}={getattr(self, key)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one run needs, decoded."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    data: DataConfig
    plan: PlanRequest
    strategy: StrategyConfig
    submit: SubmitConfig
    monitor: MonitorConfig
    checkpoint: CheckpointPolicy
    evaluation: EvaluationConfig
    checks: ChecksConfig
    strategies: tuple[str, ...] | None = None  # of `compare`; null: every engine
    sweep: SweepConfig = field(default_factory=SweepConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    goal: Goal = field(default_factory=Goal)
    weights: str | None = None  # folder of Hugging Face weights to start from; null: a seeded random start
    hf_config: str | None = None  # the Hugging Face config.json the model came from
    calibration: Calibration | None = None  # from plan.calibration=RUN_DIR: factors of a finished run
    report: str | None = None  # file for the plan as one HTML page; null: none
    run_dir: str | None = None  # null: runs/<time>-<model>-<strategy>
    stop_at_step: int | None = None  # leave with a checkpoint after this step, as a stop file would

    def __post_init__(self) -> None:
        interval, num_steps = self.checkpoint.interval, self.training.num_steps
        if self.checks.resume_is_exact and (interval == "auto" or not 0 < interval < num_steps):
            raise ValueError(
                f"checks.resume_is_exact=true needs a checkpoint before the last step; set checkpoint.interval "
                f"between 1 and {num_steps - 1} (it is {interval})"
            )
        if self.stop_at_step is not None and self.stop_at_step < 1:
            raise ValueError(
                f"stop_at_step={self.stop_at_step} must be at least 1; null runs to training.num_steps"
            )
        if self.checks.max_deviation is not None and not self.checks.max_deviation >= 0:
            raise ValueError(
                f"checks.max_deviation={self.checks.max_deviation} must be at least 0; null allows any deviation"
            )
        for key in ("interval", "num_sequences"):
            if getattr(self.evaluation, key) < 0:
                raise ValueError(f"evaluation.{key}={getattr(self.evaluation, key)} must not be negative")
