from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import RunDirError
from launcher.monitor import log


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    log.remove()
    root.setLevel(level)


def test_rank_0_speaks_plainly_and_its_file_has_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log.setup(0, world_size=4, directory=tmp_path / "logs")
    logging.getLogger("launcher.training.trainer").info("training\nstarts")
    logging.getLogger("launcher.training.trainer").warning("careful")
    assert capsys.readouterr().out == "training starts\nwarning: careful\n"
    assert path == tmp_path / "logs" / "rank_00000.log"
    written = path.read_text()
    assert "rank 0 of 4" in written
    assert "INFO launcher.training.trainer: training" in written


def test_other_ranks_only_warn_and_say_who_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log.setup(3, world_size=4, directory=tmp_path)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").error("loud")
    assert capsys.readouterr().out == f"[rank 3 {socket.gethostname()}] error: loud\n"
    assert path.name == "rank_00003.log"
    assert "quiet" in path.read_text()


def test_a_traceback_goes_to_the_file_not_to_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log.setup(0, world_size=1, directory=tmp_path)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    assert capsys.readouterr().out == "error: it failed\n"
    assert "Traceback" in path.read_text()


def test_warnings_go_to_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log.setup(0, world_size=1, directory=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old habit", DeprecationWarning, stacklevel=1)
    captured = capsys.readouterr()
    assert "old habit" in path.read_text()
    assert "old habit" not in captured.out + captured.err


def test_without_a_console_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, world_size=1, directory=tmp_path, console=False)
    logging.getLogger("x").error("only in the file")
    assert capsys.readouterr().out == ""


def test_a_second_setup_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, world_size=1, directory=tmp_path / "a")
    log.setup(0, world_size=1, directory=tmp_path / "b")
    logging.getLogger("x").info("once")
    assert capsys.readouterr().out == "once\n"
    assert "once" not in (tmp_path / "a" / "rank_00000.log").read_text()


def test_libraries_keep_their_warnings_but_lose_their_own_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log.setup(0, world_size=1, directory=tmp_path)
    # What DeepSpeed does when it is imported, after our setup.
    library = logging.getLogger("DeepSpeed")
    library.propagate = False
    library.setLevel(logging.INFO)
    library.addHandler(logging.StreamHandler())
    log.quiet_libraries()
    library.info("chatter")
    library.warning("worth knowing")
    captured = capsys.readouterr()
    assert captured.out == "warning: worth knowing\n"
    assert captured.err == ""
    assert "chatter" not in path.read_text()


def test_the_environment_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    path = log.setup(0, world_size=1, directory=tmp_path, console=False)
    assert "a-secret-value" not in path.read_text()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    with pytest.raises(RunDirError, match=r"rank_00000\.log cannot be written"):
        log.setup(0, world_size=1, directory=tmp_path / "logs")
