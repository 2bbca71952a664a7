from __future__ import annotations

import inspect
from pathlib import Path

from launcher import errors


def test_every_error_has_its_own_documented_exit_code() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.LauncherError)
    ]
    codes = [cls.exit_code for cls in classes]
    assert sorted(codes) == sorted(set(codes)) == sorted(errors.BY_EXIT_CODE)
    assert errors.__doc__
    for cls in classes:
        line = next(line for line in errors.__doc__.splitlines() if cls.__name__ in line)
        assert str(cls.exit_code) in line.split()


def test_exit_codes_are_in_the_readme(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    for code, cls in errors.BY_EXIT_CODE.items():
        assert f"| {code} | `{cls.__name__}`" in readme
