"""The house rules that a linter does not know: sizes, no framework in the control plane, tests mirror the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(REPOSITORY / "launcher").rglob("*.py"), *(REPOSITORY / "strategies").rglob("*.py")])
LONGEST_FILE, LONGEST_FUNCTION = 400, 50


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for function in functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{path}:{function.lineno} {function.name}"


def test_every_module_has_a_test_of_its_name() -> None:
    tests = {path.relative_to(REPOSITORY / "tests") for path in (REPOSITORY / "tests").rglob("test_*.py")}
    for path in SOURCES:
        inside = path.relative_to(REPOSITORY)
        if inside.name not in ("__init__.py", "__main__.py"):
            assert inside.with_name(f"test_{inside.name}") in tests, f"{inside} has no mirrored test"


FRAMEWORKS = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "megatron",
    "colossalai",
    "datasets",
    "wandb",
)


@pytest.mark.parametrize(
    "strategy", ["accelerate", "deepspeed", "fake", "auto", "megatron", "colossalai", "any"]
)
def test_planning_imports_no_framework(strategy: str) -> None:
    code = (
        "import sys; from launcher import cli; "
        f"code = cli.run(['plan', 'strategy={strategy}', 'model=llama3_8b', 'cluster=h100_sxm', '--json']); "
        f"print(code, sorted(set(sys.modules) & set({FRAMEWORKS!r})), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip().splitlines()[-1] == "0 []"


def test_no_import_cycle() -> None:
    """Runtime imports between our modules form no cycle, imports inside functions included."""
    graph = {_name(path): set(_imports(path)) for path in SOURCES}
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    while leaves := [name for name, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        for others in graph.values():
            others.difference_update(leaves)
    assert not graph, f"in a cycle or above one: {sorted(graph)}"


def _name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` depends on the module, not on the package around it.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {_name(source) for source in SOURCES}
            yield from ([name for name in inner if name in known] or [node.module])
