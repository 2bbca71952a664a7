"""The verbs: `meshwright VERB key=value ...`, the same as `python -m launcher VERB ...`. No torch here."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from launcher import __version__, compose
from launcher.errors import FINISHED, INTERRUPTED, ConfigError, LauncherError
from launcher.output import Output, open_standard_streams, print_line
from strategies.names import suggest

USAGE = """\
meshwright VERB [key=value ...] [--json]

  plan              compute a parallelism plan, explain it, and stop; report=plan.html writes it as a page,
                    --why tp=4,pp=2 says why another plan is not the choice, --sensitivity which hardware
                    would change it
  verify [RUN_DIR]  build the engine's own model for ranks of the planned world, here and without its hardware,
                    and compare it with the prediction: --rank N for one rank, --all-stages for every stage
  train             plan, freeze a run directory, and train here
  compare           train the same model on the same data with several engines, strategies=[a,b] or all of them,
                    and hold their losses against each other: a table and a picture
  sweep             train every combination of plan.tp=1,2 and the like, or the planner's best with top_k=5, here or
                    with submit=slurm, and rank what was measured; sweep.steps=20 for short trials, --dry-run
                    only tells. A SWEEP_DIR behind it tells again; resume and cancel take one as well
  best SWEEP_DIR    print the command that launches its fastest point; --per-gpu
  resume RUN_DIR    go on from the newest good checkpoint; plan.tp=1 and the like behind it go on under another
                    plan, where the engine's checkpoints allow it
  submit [RUN_DIR]  plan, freeze and queue with submit=slurm, start this host's part and print that of the others
                    with submit=torchrun, start all hosts with submit=ssh; --dry-run only tells. A RUN_DIR is
                    queued again; --node-rank N starts its host number N here
  status RUN_DIR    where its jobs and its steps stand
  cancel RUN_DIR    leave with a checkpoint; --now without
  logs RUN_DIR      what it wrote; -f goes on
  export RUN_DIR FOLDER
                    write the weights of the newest good checkpoint as a Hugging Face folder
  show RUN_DIR      plan, state, metrics, predicted against measured
  report RUN_DIR ...
                    write one page of it, or of several runs beside each other: out=compare.html
  watch RUN_DIR     the run on this terminal as it goes; --once for one look
  probe             measure this machine, and write a file to plan with: cluster=FILE.yaml
  probe preflight [RUN_DIR]
                    whether the nodes are sound: PASS or FAIL by node; alone, under srun or torchrun
  probe nccl        try settings of communication, and keep in a cluster file what wins beyond noise
  env               an environment for each engine: env create|check|remove ENGINE, env list

Configuration: group=option picks a part (model=llama3_8b cluster=h100_sxm), key=value sets a value;
`meshwright plan --help` lists all groups and keys. Hydra's flags work after plan, verify, train, compare, sweep and
submit: --cfg job, --multirun, --config-dir DIR, --hydra-help. Tab completion: eval "$(meshwright -sc install=bash)".

Exit codes: 0 finished or stopped on request, 1 other, 2 configuration, 3 plan, 4 data, 5 run directory,
6 checkpoint, 7 engine, 8 cluster, 9 training, 10 memory, 11 a check failed, 12 a lost rank, 13 a hang,
14 a bad loss, 15 a node failed its preflight, 129 hang-up, 130 Ctrl-C, 143 terminated."""


def main() -> NoReturn:
    """Entry point of the console command."""
    open_standard_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one verb; every fault becomes one sentence on stderr and a documented exit code."""
    output = Output(as_json="--json" in arguments)
    words = [word for word in arguments if word != "--json"]
    try:
        return _dispatch(words, output)
    except LauncherError as error:
        return _fail(error, error.exit_code, output)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        named = LauncherError(f"internal error, please report it: {type(error).__name__}: {error}")
        return _fail(named, named.exit_code, output)


def _fail(error: LauncherError, code: int, output: Output) -> int:
    if os.environ.get("MESHWRIGHT_DEBUG"):
        traceback.print_exc()
    with contextlib.suppress(LauncherError):  # where nothing can be written, the exit code still speaks
        print_line(f"meshwright: {' '.join(str(error).split())}", sys.stderr)
        output.result({"error": {"type": type(error).__name__, "message": str(error), "exit_code": code}})
    return code


def _dispatch(words: Sequence[str], output: Output) -> int:
    verb, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if verb in ("--help", "-h", "help") or (verb in _OWN_HELP and rest[-1:] in (["--help"], ["-h"])):
        print_line(USAGE, sys.stdout)
        return FINISHED
    if verb == "--version":
        print_line(f"meshwright {__version__}", sys.stdout)
        return FINISHED
    if verb in ("-sc", "--shell-completion"):
        compose.complete_shell(words, list(VERBS))
        return FINISHED
    if verb not in VERBS:
        raise ConfigError(f"'{verb}' is not a verb; {suggest(verb, VERBS)}")
    return find(verb)(rest, output)


_OWN_HELP = {
    "best",
    "resume",
    "export",
    "show",
    "report",
    "watch",
    "status",
    "cancel",
    "logs",
    "probe",
    "env",
}
# Module and function of each verb. A verb is imported when it is called: planning need not wait for what others import.
VERBS = {
    "plan": "plan.plan",
    "verify": "verify.run",
    "train": "train.train",
    "submit": "submit.submit",
    "status": "sweep.status",
    "cancel": "sweep.cancel",
    "logs": "submit.logs",
    "compare": "compare.compare",
    "sweep": "sweep.sweep",
    "best": "sweep.best",
    "resume": "sweep.resume",
    "show": "see.show",
    "report": "see.report",
    "watch": "see.watch",
    "export": "train.export",
    "probe": "probe.probe",
    "env": "env.env",
}


def find(verb: str) -> Callable[[list[str], Output], int]:
    """Return what a verb does."""
    module, _, name = VERBS[verb].partition(".")
    found: Callable[[list[str], Output], int] = getattr(import_module(f"launcher.verbs.{module}"), name)
    return found
