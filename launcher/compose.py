"""Command-line words -> composed configuration -> Job. The only place for Hydra and OmegaConf.

Hydra's term Launcher (`hydra/launcher=...`) is a different thing from this package.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

import strategies
from launcher import calibrate, torchrun
from launcher.cluster import detect, slurm
from launcher.cluster.spec import ClusterSpec
from launcher.cluster.switches import tiers
from launcher.config import Job
from launcher.decode import decode, encode
from launcher.defaults import complete_training
from launcher.environments import catalogue
from launcher.errors import ClusterError, ConfigError, LauncherError
from strategies import engine_options
from strategies.hf_config import from_hf_config
from strategies.model_spec import ModelSpec
from strategies.names import suggest

# Groups of keys that no YAML lists: what is passed through, where a model may come from, what a run costs.
OPEN_KEYS = re.compile(
    r"^(strategy\.engine\.|submit\.(sbatch|srun)\.|model\.(hf_config|weights)=|cluster\.(price_per_gpu_hour|mttf_hours_per_gpu|storage_gb_per_s|fabric)=)"
)
OUR_FLAGS = ("--json", "--dry-run", "--why", "--sensitivity")  # of `submit`, of `plan`
_CLUSTER_FILE = "from_file"  # an option of the group `cluster` that no packaged file has


@dataclass(frozen=True, kw_only=True)
class Composed:
    """One combination of the values that a command line lists: its job, or why it is none."""

    words: tuple[str, ...]  # its overrides, one value each
    job: Job | None = None
    fault: LauncherError | None = None


def jobs(arguments: Sequence[str]) -> list[Job]:
    """Let Hydra read `arguments`, its own flags included; return the jobs they describe, none after --help."""
    found = combinations(arguments)
    for composed in found:
        if composed.fault is not None:
            raise composed.fault
    return [composed.job for composed in found if composed.job is not None]


def combinations(arguments: Sequence[str]) -> list[Composed]:
    """Return what `jobs` does, faults of single combinations included; raise for what is wrong with all of them."""
    found: list[Composed] = []
    bugs: list[Exception] = []

    @hydra.main(version_base="1.3", config_path="pkg://hydra_configs", config_name="config")
    def application(config: DictConfig) -> None:
        try:
            # As typed: what a word refers to is another value in every combination.
            overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
            assert isinstance(overrides, list)
            found.append(_composed(config, [str(word) for word in overrides], typed=typed))
        except Exception as error:  # carried past Hydra, which would print its own words about it
            bugs.append(error)

    flags, overrides = split(arguments)
    # Hydra wants its flags before the overrides.
    named = [_with_cluster_file(override) for override in overrides]
    typed = dict(zip(named, overrides, strict=True))
    words = [*flags, *map(_open, named)]
    # With this set Hydra raises instead of printing; the sentence is ours to make.
    with (
        _environment("HYDRA_FULL_ERROR", "1"),
        tempfile.TemporaryDirectory(prefix="meshwright-sweep-") as sweep,
        _environment("MESHWRIGHT_SWEEP_DIR", sweep),
        _argv([sys.argv[0], *words]),
    ):
        try:
            application()
        except SystemExit:
            pass  # --help, --cfg and their like have printed what was asked
        except MissingConfigException as error:
            raise ConfigError(_missing_option(error)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_first_cause(error)) from error
    if bugs:
        raise bugs[0]
    return found


def _composed(config: DictConfig, overrides: Sequence[str], *, typed: Mapping[str, str]) -> Composed:
    plain = (word.removeprefix("++") for word in overrides)
    words = tuple(typed.get(word, word) for word in plain)
    try:
        return Composed(words=words, job=build_job(config, overrides=overrides))
    except OmegaConfBaseException as error:
        return Composed(words=words, fault=ConfigError(str(error).splitlines()[0]))
    except LauncherError as error:
        return Composed(words=words, fault=error)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's flags with their values, and the overrides; raise ConfigError for what is neither."""
    parser = get_args_parser()
    # A rerun would read an old pickle of Hydra's; a run directory is what we resume.
    flags = [flag for action in parser._actions for flag in action.option_strings if "rerun" not in flag]
    unknown = next(
        (word for word in arguments if word.startswith("-") and word.split("=")[0] not in flags), None
    )
    if unknown is not None:
        raise ConfigError(f"'{unknown}' is not a flag; {suggest(unknown, [*flags, *OUR_FLAGS])}")
    try:
        parser.exit_on_error = False
        overrides = parser.parse_intermixed_args(arguments).overrides
    except ArgumentError as error:
        raise ConfigError(f"{error}") from error
    rest = list(arguments)
    for override in overrides:
        rest.remove(override)
    return rest, overrides


def _with_cluster_file(override: str) -> str:
    """Give a YAML file named by cluster=FILE.yaml, such as `probe` writes, to Hydra as one more option."""
    key, _, value = override.partition("=")
    if key != "cluster" or not value.endswith((".yaml", ".yml")):
        return override
    path = Path(value.strip("'\"")).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{override} does not exist; `meshwright probe out={path}` writes it") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{override} cannot be read as YAML; give a file that `meshwright probe` wrote"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{override} must hold the keys of a cluster; give a file that `meshwright probe` wrote"
        )
    ConfigStore.instance().store(group="cluster", name=_CLUSTER_FILE, node=content)
    return f"cluster={_CLUSTER_FILE}"


def complete_shell(arguments: Sequence[str], verbs: Sequence[str]) -> None:
    """Serve Hydra's tab completion (`-sc install=bash`); the verb is ours, so Hydra must not see it."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if "query=" in " ".join(arguments) and len(words) < (3 if not line.endswith(" ") else 2):
        start = words[1] if len(words) > 1 else ""
        print("\n".join(verb for verb in verbs if verb.startswith(start)))
        return
    rest = line.split(maxsplit=2)[2:] if len(words) > 1 else []
    with _environment("COMP_LINE", " ".join([*words[:1], *rest]) + ("" if rest else " ")):
        jobs(arguments)


def build_job(config: DictConfig, *, overrides: Sequence[str]) -> Job:
    """Decode a composed configuration strictly; fill in what `null` leaves to the machine and the model."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    plain = {str(key): value for key, value in container.items()}
    plain.pop("experiment", None)
    model = _section(plain, "model")
    hf_config, weights = _model_source(model)
    if hf_config is not None:
        _refuse_shape_keys(overrides)
    spec = decode(ModelSpec, model, "model") if hf_config is None else _read_hf_config(hf_config)
    cluster = _cluster(_section(plain, "cluster"))
    plan = _section(plain, "plan")
    calibration = plan.pop("calibration", None)
    job = decode(
        Job,
        {
            **plain,
            "plan": plan,
            "model": encode(spec),
            "cluster": encode(cluster),
            "training": complete_training(_section(plain, "training"), model=spec, cluster=cluster),
            "hf_config": str(hf_config) if hf_config else None,
            "weights": str(weights) if weights else None,
        },
    )
    _check_strategy(job)
    if calibration is not None:
        job = replace(job, calibration=calibrate.read(Path(str(calibration)).expanduser(), job))
    return job


def available_strategies() -> list[str]:
    """Engines that strategy=auto may choose from: those installed here; all where none is (a laptop plans too)."""
    installed = [name for name in strategies.ENGINE_PACKAGES if catalogue.is_here(name)]
    return installed or list(strategies.ENGINE_PACKAGES)


def strategies_of(job: Job) -> list[str]:
    """Engines to plan for: the one named, those that can train here (auto), or every known one (any)."""
    if job.strategy.name == "any":
        return strategies.engines()
    return available_strategies() if job.strategy.name == "auto" else [job.strategy.name]


def _check_strategy(job: Job) -> None:
    if job.strategy.name in ("auto", "any"):
        if job.strategy.engine:
            raise ConfigError(
                f"strategy.engine={dict(job.strategy.engine)} needs one engine; name it with strategy=NAME"
            )
        return
    try:
        engine_options.check(job.strategy.engine, strategies.capabilities(job.strategy.name))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r} must be a group of keys; pick one with {key}=NAME")
    return value


def _model_source(model: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Take model.hf_config and model.weights out of the section; weights imply their own config.json."""
    hf_config, weights = model.pop("hf_config", None), model.pop("weights", None)
    folder = Path(weights).expanduser().absolute() if weights else None
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(
                f"model.weights={weights} is not a folder; give a Hugging Face checkpoint folder"
            )
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"model.weights={weights} holds no *.safetensors file; give a Hugging Face checkpoint folder"
            )
        hf_config = hf_config or str(folder)
    if not hf_config:
        return None, None
    path = Path(hf_config).expanduser().absolute()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model.hf_config={hf_config} does not exist; give a Hugging Face config.json or its folder"
        )
    return path, folder


def _refuse_shape_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.lstrip("+").startswith("model.") and not OPEN_KEYS.match(override.lstrip("+")):
            raise ConfigError(
                f"{override} has no effect beside model.hf_config, which gives the whole shape; "
                "remove it, or change the file"
            )


def _read_hf_config(path: Path) -> ModelSpec:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"model.hf_config={path} cannot be read as JSON; give a Hugging Face config.json"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"model.hf_config={path} does not hold a JSON object; give a Hugging Face config.json"
        )
    try:
        return from_hf_config(data, name=path.parent.name or "hf_config")
    except ValueError as error:
        raise ConfigError(f"model.hf_config={path}: {error}") from error


def _cluster(section: Mapping[str, Any]) -> ClusterSpec:
    section = _match_torchrun(section)
    if section.get("name") == "local":
        section = detect.complete(section)
    if section.get("name") == "slurm":
        section = slurm.complete(section, slurm.ask())
    spec = decode(ClusterSpec, section, "cluster")
    return replace(spec, links=tiers(spec.links, spec.switches, gpus_per_node=spec.gpus_per_node))


def _match_torchrun(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Under torchrun the world is given: the local cluster takes its size, any other must agree with it."""
    if not torchrun.started_us():
        return section
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    given = {"num_nodes": int(os.environ["WORLD_SIZE"]) // per_node, "gpus_per_node": per_node}
    for key, value in given.items():
        if section.get(key) not in (None, value) and not (
            section.get("name") == "local" and key == "num_nodes"
        ):
            raise ClusterError(
                f"cluster.{key}={section.get(key)} does not match torchrun, which started {given['num_nodes']} "
                f"nodes of {per_node} processes; set cluster.{key}={value} or leave it out"
            )
    return {**section, **given}


# ---- Hydra's faults in one sentence -------------------------------------------------------------------------------


def _missing_option(error: MissingConfigException) -> str:
    name = str(error.missing_cfg_file or "")
    group, _, option = name.rpartition("/")
    if group and error.options is not None:
        return f"{group}={option} is unknown; {suggest(option, error.options)}"
    return str(error).splitlines()[0]


def _first_cause(error: BaseException) -> str:
    """The innermost cause knows the key; the outer message repeats the override."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigKeyError | OmegaConfBaseException) and cause.parent_node is not None:
            keys = (
                [str(key) for key in cause.parent_node] if isinstance(cause.parent_node, DictConfig) else []
            )
            return f"unknown key '{cause.full_key}'; {suggest(str(cause.key), keys)}"
        cause = cause.__cause__ or cause.__context__
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return _plain_override_error(text)


def _plain_override_error(text: str) -> str:
    grammar = re.search(
        r"(LexerNoViableAlt|mismatched input|no viable alternative|extraneous input|token recognition)", text
    )
    if grammar:
        return f"{text.split('See https')[0].strip()}; put special characters between quotes: \"key='value'\""
    group = re.search(r"Could not override '([^']+)'\. No match in the defaults list", text)
    if group:
        return f"'{group[1]}' is not a group of the configuration; `meshwright plan --help` lists them"
    syntax = re.search(r"Error parsing override '([^']+)'", text)
    if syntax:
        return f"'{syntax[1]}' is not an override; write key=value"
    return text


def _open(argument: str) -> str:
    return f"++{argument}" if OPEN_KEYS.match(argument) else argument


@contextmanager
def _environment(key: str, value: str) -> Iterator[None]:
    before = os.environ.get(key)
    os.environ[key] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = words
    try:
        yield
    finally:
        sys.argv = before
