"""What a run reports, and how often: the `monitor` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """When a run raises its voice; 0 turns a rule off. Where to is no setting but a secret: MESHWRIGHT_WEBHOOK_URL."""

    stalled_factor: float = 10.0  # no step for so many 99th percentiles of the step time
    stalled_least_s: float = 300.0  # but never sooner: a checkpoint may take minutes
    slowdown: float = 1.5  # median of the newest 10 steps over the run's own median
    straggler: float = 1.5  # a rank's time for a fixed computation over that of the others
    checkpoint_age_s: float = 0.0  # the newest checkpoint is older; 0: off
    least_goodput: float = 0.5  # share of the time in steps that count
    goodput_after_s: float = 900.0  # a start is given so long before its goodput is judged
    repeat_s: float = 3600.0  # the same cause stays quiet for so long

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value < 0:
                raise ValueError(f"monitor.alerts.{key}={value} must not be negative; 0 turns the rule off")
        if self.repeat_s == 0:
            raise ValueError(
                "monitor.alerts.repeat_s=0 would tell a cause twice a second while it lasts; "
                "use seconds between two tellings, as 3600"
            )
        for key in ("slowdown", "straggler"):
            if 0 < getattr(self, key) <= 1:
                raise ValueError(
                    f"monitor.alerts.{key}={getattr(self, key)} must be above 1, which is no difference; "
                    "0 turns the rule off"
                )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Which writers are on, and the rhythm of the console. metrics.jsonl is always written, every step."""

    tensorboard: bool = True
    wandb: bool = True
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key
    wandb_project: str = "meshwright"
    wandb_group: str | None = None  # runs of a sweep share one
    mlflow: bool = False  # to MLFLOW_TRACKING_URI, else to metrics/mlflow
    mlflow_experiment: str = "meshwright"
    prometheus: bool = False  # answer GET /metrics
    prometheus_host: str = "127.0.0.1"
    prometheus_port: int = 9877  # 0: any that is free; metrics/prometheus.url tells which
    prometheus_textfile: str | None = None  # a .prom file in the folder of node-exporter's textfile collector
    log_interval: int = 10  # steps between console lines
    warmup_steps: int = 3  # first steps left out of predicted vs measured
    sample_interval: int = 10  # steps between figures of all ranks and nodes; 0: none
    node_seconds: float = 5.0  # between two looks at a node's hardware
    histograms: int = 0  # steps between histograms of weights and gradients; 0: none
    profile: tuple[int, ...] = ()  # first and last step of a trace; empty: none
    trace_interval: int = 0  # steps between single steps that are profiled for their figures alone; 0: none
    alerts: AlertConfig = field(default_factory=AlertConfig)

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ValueError(
                f"monitor.log_interval={self.log_interval} must be at least 1; 1 prints every step"
            )
        for key in ("warmup_steps", "sample_interval", "histograms"):
            if getattr(self, key) < 0:
                raise ValueError(f"monitor.{key}={getattr(self, key)} must not be negative; {_ZERO[key]}")
        if self.trace_interval < 0 or self.trace_interval == 1:
            raise ValueError(
                f"monitor.trace_interval={self.trace_interval} must be at least 2, because traced steps are left out "
                "of the step times; 0 traces none"
            )
        if not self.wandb_project.strip():
            raise ValueError(
                f"monitor.wandb_project={self.wandb_project!r} must name a project; "
                "to do without W&B set monitor.wandb=false"
            )
        if self.node_seconds <= 0:
            raise ValueError(
                f"monitor.node_seconds={self.node_seconds} must be positive; monitor.sample_interval=0 asks no node"
            )
        if not 0 <= self.prometheus_port < 2**16:
            raise ValueError(
                f"monitor.prometheus_port={self.prometheus_port} is no port; use 1 to 65535, or 0 for any that is free"
            )
        if self.prometheus_textfile is not None and not self.prometheus_textfile.endswith(".prom"):
            raise ValueError(
                f"monitor.prometheus_textfile={self.prometheus_textfile} must end in .prom, "
                "or node-exporter does not read it"
            )
        if self.profile and not (len(self.profile) == 2 and 1 < self.profile[0] <= self.profile[1]):
            raise ValueError(
                f"monitor.profile={list(self.profile)} must be the first and the last step of a trace, as in [10,12]; "
                "the first step is all set-up and cannot be in it"
            )


_ZERO = {
    "warmup_steps": "0 counts all",
    "sample_interval": "0 samples nothing",
    "histograms": "0 takes none",
}
