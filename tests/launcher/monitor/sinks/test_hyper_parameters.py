"""What runs are compared by."""

from __future__ import annotations

from launcher.monitor.sinks.hyper_parameters import hyper_parameters


def test_plain_values_of_training_and_plan_have_dotted_names() -> None:
    settings = {"training": {"seed": 3, "precision": "bf16", "betas": [0.9]}, "monitor": {"wandb": True}}
    found = hyper_parameters(settings, {"dp": 2, "predictions": {"step_s": 1.0}, "nvme_path": None})
    assert found == {"training.seed": 3, "training.precision": "bf16", "plan.dp": 2}
