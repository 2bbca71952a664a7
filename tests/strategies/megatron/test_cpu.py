"""The CPU layer of megatron-core: every rule is needed and does what it is for; when install() acts or refuses.

The rules are tried in processes of their own (tests/integration/megatron_cpu_worker.py): this one never imports
megatron.core.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from strategies.megatron import cpu

ROOT = Path(__file__).parents[3]
RULES = [rule.name for rule in (*cpu.CPU_REWRITES, *cpu.CPU_REPAIRS, *cpu.LOCAL_REPAIRS)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("rules") / "outcomes.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "integration" / "megatron_cpu_worker.py", path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def import_system(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The list of finders, as in a process that never met megatron.core; put back afterwards."""
    fresh = [finder for finder in sys.meta_path if not isinstance(finder, cpu._Finder)]
    monkeypatch.setattr(sys, "meta_path", fresh)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    return sys.meta_path


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_makes_its_probe_work_without_a_warning(outcomes: Any, rule: str) -> None:
    assert outcomes["failed"][rule] is None


@pytest.mark.parametrize("rule", RULES)
def test_the_probe_breaks_without_the_rule(outcomes: Any, rule: str) -> None:
    assert outcomes["without"][rule]


def test_every_rewrite_changes_an_imported_module(outcomes: Any) -> None:
    assert outcomes["hits"] == sorted(rule.name for rule in cpu.CPU_REWRITES)


def test_with_cuda_but_without_transformer_engine_only_upstreams_own_faults_are_mended(outcomes: Any) -> None:
    assert outcomes["with_cuda"] == {
        "compiled": True,
        "rewritten": [],
        "failed": {"sequence_parallel_norms": None, "router_product": None, "latent_attention": None},
    }


def test_nothing_happens_with_cuda_and_transformer_engine(
    import_system: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch)
    (tmp_path / "transformer_engine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.99.0")
    before = list(import_system)
    cpu.install()
    assert import_system == before


def test_installing_twice_is_installing_once(import_system: list[Any]) -> None:
    before = list(import_system)
    cpu.install()
    cpu.install()
    assert len(import_system) == len(before) + 1
    assert import_system[1:] == before


def test_a_megatron_imported_too_early_is_refused(
    import_system: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    before = list(import_system)
    with pytest.raises(RuntimeError, match=r"megatron\.core was imported before .*install\(\)"):
        cpu.install()
    assert import_system == before


@pytest.mark.usefixtures("import_system")
def test_another_version_is_refused_with_both_versions_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.17.2")
    with pytest.raises(
        ValueError, match=r"0\.16\.1 and found 0\.17\.2; pip install 'meshwright\[megatron\]'"
    ):
        cpu.install()


@pytest.mark.usefixtures("import_system")
def test_a_missing_megatron_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"megatron-core, which is not installed; pip install"):
        cpu.install()


def test_changed_code_never_reaches_pycache(
    import_system: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "changed.py").write_text("device = 'cuda'\n", encoding="utf-8")
    (tmp_path / "same.py").write_text("device = 'meta'\n", encoding="utf-8")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    cpu.install()
    for name in ("changed", "same"):
        spec = import_system[0].find_spec(f"megatron.core.{name}", [str(tmp_path)])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.device == {"changed": "cpu", "same": "meta"}[name]
    assert [path.name.split(".")[0] for path in (tmp_path / "cache").rglob("*.pyc")] == ["same"]


def test_other_packages_are_left_to_others(import_system: list[Any]) -> None:
    cpu.install()
    assert import_system[0].find_spec("megatron.corel", None) is None
    assert import_system[0].find_spec("megatron", None) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = torch.zeros(1, device='cuda')", "x = torch.zeros(1, device='cpu')"),
        ('f("cuda", "cuda:0", cuda)', 'f("cpu", "cuda:0", cuda)'),
        ("torch.cuda.current_device()", "_cuda_on_cpu.current_device()"),
        ("from torch.cuda import _lazy_call", "from torch.cuda import _lazy_call"),
        ("import torch.cuda.nvtx as nvtx", "import torch.cuda.nvtx as nvtx"),
        ("p.type() == 'torch.cuda.FloatTensor'", "p.type() == 'torch.FloatTensor'"),
        ("t.cuda(torch.cuda.current_device())", "t.cpu()"),
        ("i.cuda(non_blocking=True)", "i.cpu()"),
        ("enable_jit_fuser()", "disable_jit_fuser()"),
        ("def enable_jit_fuser():", "def enable_jit_fuser():"),
    ],
)
def test_rewrite_changes_cuda_names_only(source: str, expected: str) -> None:
    assert cpu.rewrite(source, cpu.CPU_REWRITES)[0] == expected


def test_names_without_a_meaning_on_a_cpu_stay_torchs() -> None:
    assert cpu.CUDA_ON_CPU.memory_allocated is torch.cuda.memory_allocated


def test_rules_have_names_of_their_own_and_say_why() -> None:
    assert len(set(RULES)) == len(RULES)
    for rule in (*cpu.CPU_REWRITES, *cpu.CPU_REPAIRS, *cpu.LOCAL_REPAIRS):
        assert all(dataclasses.asdict(rule).values())
        with pytest.raises(dataclasses.FrozenInstanceError):
            rule.why = ""  # type: ignore[misc]
