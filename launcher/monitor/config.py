"""What a run reports, and how often: the `monitor` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Which writers are on, and the rhythm of the console. metrics.jsonl is always written, every step."""

    tensorboard: bool = True
    wandb: bool = True
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key
    wandb_project: str = "meshwright"
    log_interval: int = 10  # steps between console lines
    warmup_steps: int = 3  # first steps left out of predicted vs measured

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ValueError(
                f"monitor.log_interval={self.log_interval} must be at least 1; 1 prints every step"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"monitor.warmup_steps={self.warmup_steps} must not be negative; 0 counts all")
        if not self.wandb_project.strip():
            raise ValueError(
                f"monitor.wandb_project={self.wandb_project!r} must name a project; "
                "to do without W&B set monitor.wandb=false"
            )
