"""`meshwright show`, `report` and `watch`: runs as text, as a page, and live on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import FINISHED, ConfigError
from launcher.output import Output
from launcher.report.document import write
from launcher.report.run_data import load_all
from launcher.report.run_page import run_page
from launcher.run_dir import RunDir, open_run
from launcher.verbs import words
from launcher.verbs.show import describe, to_text

OUT, ONCE = "out=", "--once"


def show(arguments: Sequence[str], output: Output) -> int:
    """Tell of one run: plan, state, metrics, predicted against measured."""
    return tell(words.open_run("show", arguments), output)


def tell(run: RunDir, output: Output) -> int:
    """Print what the run directory tells."""
    facts = describe(run)
    output.result(facts, to_text(facts))
    return FINISHED


def report(arguments: Sequence[str], output: Output) -> int:
    """Write the page of one run or of several, and say where."""
    outs = [word.removeprefix(OUT) for word in arguments if word.startswith(OUT)]
    folders = _folders("report", [word for word in arguments if not word.startswith(OUT)])
    if len(outs) > 1 or "" in outs:
        raise ConfigError(f"`meshwright report` takes one {OUT}FILE, not {len(outs)}; name one page")
    if not outs and len(folders) > 1:
        raise ConfigError(
            f"a page of {len(folders)} runs belongs to none of them; name it, as in {OUT}compare.html"
        )
    runs = [open_run(folder) for folder in folders]
    place = outs[0] if outs else runs[0].path / "report.html"
    path = write(place, run_page(load_all(runs)), key=OUT.removesuffix("="))
    output.result({"report": str(path), "runs": [str(run.path) for run in runs]}, f"report     {path}")
    return FINISHED


def watch(arguments: Sequence[str], output: Output) -> int:
    """Show a run on the terminal until it ends; once where nobody can watch, or when asked to; --json as `show`."""
    folders = _folders("watch", [word for word in arguments if word != ONCE])
    if len(folders) != 1:
        raise ConfigError(f"`meshwright watch` takes one run directory, not {len(folders)} words")
    run = open_run(folders[0])
    if output.as_json:
        output.result(describe(run))
    else:
        from launcher.verbs import watch as live

        live.watch(run, once=ONCE in arguments or not sys.stdout.isatty(), stream=sys.stdout)
    return FINISHED


def _folders(verb: str, named: Sequence[str]) -> list[Path]:
    flag = next((word for word in named if word.startswith("-")), None)
    if flag is not None:
        own = f"{ONCE} and --json are the only ones" if verb == "watch" else "--json is the only one"
        raise ConfigError(f"'{flag}' is not a flag of `meshwright {verb}`; {own}")
    if not named:
        raise ConfigError(f"`meshwright {verb}` needs a run directory; give the folder that `train` printed")
    return [Path(word).expanduser() for word in named]
