from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import strategies
from launcher import compose
from launcher.cluster import detect, slurm
from launcher.config import Job
from launcher.environments import catalogue
from launcher.errors import ConfigError
from strategies.hf_config import to_hf_config
from strategies.model_spec import ModelSpec


def job_of(*words: str) -> Job:
    jobs = compose.jobs(words)
    assert len(jobs) == 1
    return jobs[0]


def options(repository: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (repository / "hydra_configs" / group).glob("*.yaml"))


GROUPS = (
    "model",
    "cluster",
    "training",
    "plan",
    "strategy",
    "submit",
    "monitor",
    "checkpoint",
    "supervise",
    "preflight",
    "experiment",
    "data",
    "goal",
)


@pytest.mark.parametrize("group", GROUPS)
def test_every_shipped_option_composes_and_decodes(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    assert options(repository, group)
    node = "NodeName=n0 CPUTot=96 RealMemory=2000000 State=IDLE Gres=gpu:h100:8 Partitions=gpu"
    told = slurm.Told(nodes=node, topology="", partitions="PartitionName=gpu Default=YES")
    monkeypatch.setattr(slurm, "ask", lambda: told)  # asked on a real Slurm by tests/slurm
    for option in options(repository, group):
        extra = (f"data.paths=[{tmp_path}]",) if group == "data" and option != "stdlib" else ()
        extra += ("goal.max_step_s=1",) if option == "fewest_gpus" else ()
        assert isinstance(job_of(f"{group}={option}", *extra), Job)


def test_every_group_of_the_configuration_is_listed(repository: Path) -> None:
    folders = {path.name for path in (repository / "hydra_configs").iterdir() if path.is_dir()}
    # Efficiencies belong to the device of a cluster, which names its own.
    assert folders - {"hydra", "efficiency", "__pycache__"} == set(GROUPS)


def test_yaml_stays_small(repository: Path) -> None:
    for path in (repository / "hydra_configs").rglob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 45, path


def test_engine_keys_need_no_plus_sign() -> None:
    job = job_of("strategy=deepspeed", "strategy.engine.zero_optimization.overlap_comm=false")
    assert job.strategy.engine == {"zero_optimization": {"overlap_comm": False}}


def test_a_hugging_face_config_gives_the_shape(tmp_path: Path, tiny_model: ModelSpec) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(tiny_model)))
    job = job_of(f"model.hf_config={folder}")
    assert job.model.num_parameters == tiny_model.num_parameters
    assert job.model.name == "mine"
    assert job.hf_config == str(folder / "config.json")


def test_weights_bring_their_own_shape(tmp_path: Path, tiny_model: ModelSpec) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(tiny_model)))
    with pytest.raises(ConfigError, match="safetensors"):
        job_of(f"model.weights={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    job = job_of(f"model.weights={tmp_path}")
    assert job.weights == str(tmp_path)
    assert job.model.hidden_size == tiny_model.hidden_size


def test_shape_keys_beside_a_hugging_face_config_are_refused(tmp_path: Path, tiny_model: ModelSpec) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(tiny_model)))
    with pytest.raises(ConfigError, match=r"model\.num_layers=4 has no effect beside model\.hf_config"):
        job_of(f"model.hf_config={tmp_path}", "model.num_layers=4")


def test_auto_plans_for_every_engine_where_none_is_installed(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "has_package", lambda strategy: False)
    plan = call("plan", "strategy=auto", "model=llama3_8b", "cluster=h100_sxm", "--json").json
    assert plan["inputs"]["strategies"] == sorted(strategies.ENGINE_PACKAGES)
    assert len(plan["notes"]) == len(strategies.ENGINE_PACKAGES)


def test_torchrun_decides_the_size_of_the_local_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    cluster = job_of().cluster
    assert (cluster.num_nodes, cluster.gpus_per_node) == (2, 3)


def test_the_frozen_configuration_decodes_to_the_same_job(call: Callable[..., Any], tmp_path: Path) -> None:
    words = ("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000")
    words += ("training.sequence_length=32", "training.num_steps=1", f"run_dir={tmp_path / 'run'}")
    assert call("train", *words, "--json").code == 0
    frozen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert frozen["training"]["num_steps"] == 1
    assert frozen["training"]["learning_rate"] is not None
    assert frozen["cluster"]["gpus_per_node"] == 1


def test_any_strategy_is_every_known_engine() -> None:
    job = job_of("strategy=any")
    assert compose.strategies_of(job) == strategies.engines()
    assert "megatron" in compose.strategies_of(job)
    assert compose.strategies_of(job_of("strategy=megatron")) == ["megatron"]
    with pytest.raises(ConfigError, match="needs one engine; name it with strategy=NAME"):
        job_of("strategy=any", "strategy.engine.sync_each_batch=true")


def test_goals_and_what_they_cost() -> None:
    job = job_of(
        "goal=fewest_gpus",
        "goal.max_step_s=5",
        "cluster.price_per_gpu_hour=2.5",
        "cluster.mttf_hours_per_gpu=51000",
        "cluster.storage_gb_per_s=100",
    )
    assert (job.goal.name, job.goal.max_step_s) == ("fewest_gpus", 5.0)
    assert job.cluster.price_per_gpu_hour == 2.5
    assert job_of().goal.name == "fastest"
    with pytest.raises(ConfigError, match=r"goal=fewest_gpus needs something to reach"):
        job_of("goal=fewest_gpus")
    with pytest.raises(ConfigError, match=r"cluster\.price_per_gpu_hour=0\.0 must be above 0, or null"):
        job_of("cluster.price_per_gpu_hour=0")


def test_switches_of_a_cluster_file_become_tiers(tmp_path: Path) -> None:
    known = detect.preset("h100_sxm")
    known["switches"] = [
        {"name": "leaf0", "hosts": ["a", "b"], "oversubscription": 2},
        {"name": "leaf1", "hosts": ["c", "d"], "oversubscription": 2},
        {"name": "spine", "switches": ["leaf0", "leaf1"]},
    ]
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(known))
    (job,) = compose.jobs([f"cluster={file}", "cluster.num_nodes=4"])
    assert [link.size for link in job.cluster.links] == [8, 16, None]
    assert [link.gb_per_s for link in job.cluster.links] == [450, 50, 25]
    assert [switch.name for switch in job.cluster.switches] == ["leaf0", "leaf1", "spine"]


def test_combinations_keep_their_words_and_their_faults() -> None:
    own = "report='${model.name}-${plan.tp}.html'"
    words = ["--multirun", "submit=slurm", "submit.sbatch.time=20", own, "plan.tp=1,0"]
    good, bad = compose.combinations(words)
    assert good.words == ("submit=slurm", "submit.sbatch.time=20", own, "plan.tp=1")
    assert good.job is not None and good.fault is None
    assert good.job.report == "debug_tiny-1.html"
    assert bad.job is None and str(bad.fault).startswith("plan.tp=0 must be at least 1")
    with pytest.raises(ConfigError, match=r"plan\.tp=0 must be at least 1"):
        compose.jobs(words)


def test_flags_and_overrides_are_told_apart() -> None:
    assert compose.split(["plan.tp=1", "--config-dir", "mine", "-m"]) == (
        ["--config-dir", "mine", "-m"],
        ["plan.tp=1"],
    )
