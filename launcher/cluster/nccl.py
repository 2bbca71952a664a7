"""What NCCL is told: near-empty defaults by fabric, and a check of what a job would inherit."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.cluster.nccl_variables import (
    AZURE_NEEDS,
    DEPRECATED,
    EFA_GUIDE,
    EFA_STALE,
    FOREIGN_PREFIXES,
    NCCL,
    NCCL_GUIDE,
    OF_A_HOST,
    OWNED_BY,
    PROFILES,
    REMOVED,
    SLOW_SWITCHES,
    TORCH_GUIDE,
    Fabric,
)
from launcher.cluster.spec import ClusterSpec, Tuned
from launcher.errors import ConfigError
from strategies.names import suggest

ENVIRONMENT = "the environment"
_MAX_SOCKETS = 64  # NCCL_SOCKET_NTHREADS * NCCL_NSOCKS_PERTHREAD
_WATCHED = ("NCCL_", "TORCH_NCCL_", "FI_", "OFI_NCCL_", "RDMAV_", *SLOW_SWITCHES)
_FABRIC_WORDS: dict[str, Fabric] = {
    "infiniband": "infiniband",
    "roce": "roce",
    "efa": "efa",
    "tcpxo": "gcp",
    "ethernet": "tcp",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A variable, and who has set it: the environment, or a file that NCCL reads."""

    name: str
    value: str
    set_by: str = ENVIRONMENT

    def __str__(self) -> str:
        return f"{self.name}={self.value} (set by {self.set_by})"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with a setting, in a sentence, and where that is written."""

    verdict: Literal["refuse", "warn"]
    setting: Setting
    message: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Default:
    """A value that we set where nobody has, and why."""

    name: str
    value: str
    source: str


def defaults(fabric: Fabric | None) -> tuple[Default, ...]:
    """Return what a job on `fabric` gets where nothing is set. NCCL chooses well alone; its silence is all we mend."""
    warn = Default(
        name="NCCL_DEBUG",
        value="WARN",
        source=f"{NCCL_GUIDE}, NCCL_DEBUG: an explicit message for each failing call, else silent",
    )
    # EFA and GCP: aws-ofi-nccl's guide wants nothing set since 1.7, Google's init script sets what its plug-in needs.
    # Sockets alone want a host name's own interface, which is for the site to say.
    by_fabric: dict[Fabric, tuple[Default, ...]] = {
        "roce": (
            Default(
                name="NCCL_IB_ROCE_VERSION_NUM",
                value="2",
                source=f"{NCCL_GUIDE}, NCCL_IB_ROCE_VERSION_NUM: picks the routable GID without a fixed index",
            ),
        )
    }
    return (warn, *(by_fabric.get(fabric, ()) if fabric else ()))


def tuned_defaults(tuned: Tuned | None) -> tuple[Default, ...]:
    """Return what a trial on this cluster has found faster."""
    found = {} if tuned is None else tuned.environment
    return tuple(
        Default(name=name, value=value, source=tuned.source if tuned else "") for name, value in found.items()
    )


def fabric_of(cluster: ClusterSpec, settings: Mapping[str, Setting]) -> Fabric | None:
    """Return what joins the nodes: by the slowest tier's name, else by the plug-in that is set up; None: unknown."""
    if cluster.fabric is not None:
        return cluster.fabric
    network = cluster.links[-1].name.lower()
    named = next((fabric for word, fabric in _FABRIC_WORDS.items() if word in network), None)
    if named is None and "FI_PROVIDER" in settings and settings["FI_PROVIDER"].value == "efa":
        return "efa"
    if named is None and any(name.startswith("NCCL_FASTRAK_") for name in settings):
        return "gcp"
    return named


# ---- what is set --------------------------------------------------------------------------------------------------


def look(environ: Mapping[str, str]) -> dict[str, Setting]:
    """Return what a job started here inherits: the variables, and the files where NCCL looks for more of them."""
    own = Path(environ.get("NCCL_CONF_FILE", "~/.nccl.conf")).expanduser()
    texts = {}
    for path in (own, Path("/etc/nccl.conf")):  # the first one that says a thing wins
        try:
            texts[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
    return collect(environ, texts)


def collect(environ: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Setting]:
    """Merge variables and the text of NCCL's files, in NCCL's order: the environment, then the files as they come."""
    found = {
        name: Setting(name=name, value=value)
        for name, value in sorted(environ.items())
        if name.startswith(_WATCHED)
    }
    for path, text in files.items():
        for line in text.splitlines():
            name, sign, value = line.partition("#")[0].partition("=")
            if sign and name.strip():
                setting = Setting(name=name.strip(), value=value.strip(), set_by=path)
                found.setdefault(setting.name, setting)
    return found


def fill(environ: MutableMapping[str, str], cluster: ClusterSpec) -> None:
    """Set the defaults of a job on `cluster` where neither the environment nor a file of NCCL says otherwise."""
    told = look(environ)
    for default in defaults_of(cluster, told):
        if default.name not in told:
            environ.setdefault(default.name, default.value)


def defaults_of(cluster: ClusterSpec, settings: Mapping[str, Setting]) -> tuple[Default, ...]:
    """Return what a job on `cluster` gets where nothing is set: of its fabric, and what a trial on it has found."""
    by_fabric = defaults(fabric_of(cluster, settings)) if cluster.gpu.device == "cuda" else ()
    return (*by_fabric, *tuned_defaults(cluster.tuned))


# ---- the check ----------------------------------------------------------------------------------------------------


def lint(
    settings: Mapping[str, Setting], fabric: Fabric | None, *, deterministic: bool = False
) -> tuple[Finding, ...]:
    """Return what is wrong with `settings` for a job on `fabric`, what has to be refused first."""
    settings = {
        name: setting for name, setting in settings.items() if setting.value.strip()
    }  # NCCL skips empty ones
    found = [*_sockets(settings)]
    for setting in settings.values():
        finding = _judge(setting, settings, fabric, deterministic=deterministic)
        if finding is not None:
            found.append(finding)
    return tuple(sorted(found, key=lambda finding: finding.verdict != "refuse"))


def _judge(
    setting: Setting, settings: Mapping[str, Setting], fabric: Fabric | None, *, deterministic: bool
) -> Finding | None:
    name = setting.name
    owner = next((owner for prefix, owner in OWNED_BY.items() if name.startswith(prefix)), None)
    if owner is not None and fabric not in (None, owner):
        what = f"it belongs to {PROFILES[owner].vendor} and this cluster's network is {fabric}"
        return _finding("warn", setting, f"{what}; unset it", PROFILES[owner].source)
    if name in EFA_STALE:  # RDMAV_FORK_SAFE is of use on other networks
        return None if fabric not in (None, "efa") else _stale(setting)
    if owner is not None:
        return None
    if name in SLOW_SWITCHES:
        return _slow_switch(setting)
    if name in REMOVED:
        return _finding("warn", setting, f"NCCL reads it no more: {REMOVED[name]}; unset it")
    if name in DEPRECATED:
        return _finding("warn", setting, f"it is deprecated: {DEPRECATED[name]}")
    if not name.startswith("NCCL_") or name.startswith(FOREIGN_PREFIXES):
        return None
    if name not in NCCL:
        return _unknown(setting, fabric)
    return (
        _out_of_range(setting)
        or _forced_ll128(setting, fabric)
        or _left_on(setting, settings, fabric, deterministic=deterministic)
    )


def _stale(setting: Setting) -> Finding:
    return _finding("warn", setting, f"{EFA_STALE[setting.name]}; unset it", EFA_GUIDE)


def _slow_switch(setting: Setting) -> Finding | None:
    if setting.value.upper() != SLOW_SWITCHES[setting.name]:
        return None
    return _finding("warn", setting, "debugging is left on and slows every step down; unset it", TORCH_GUIDE)


def _unknown(setting: Setting, fabric: Fabric | None) -> Finding | None:
    profile = PROFILES.get(fabric) if fabric else None
    if profile is not None and setting.name in profile.needs:
        return None
    near = suggest(setting.name, NCCL)
    remedy = near if near.startswith("did you mean") else "unset it where nothing needs it"
    return _finding("warn", setting, f"NCCL's guide has no variable of this name; {remedy}", NCCL_GUIDE)


def _out_of_range(setting: Setting) -> Finding | None:
    known, value = NCCL[setting.name], setting.value.strip()
    if known.accepted is not None and value.lower() not in {text.lower() for text in known.accepted}:
        wanted = ", ".join(sorted(known.accepted))
        return _finding("refuse", setting, f"it is none of {wanted}; set one of those, or unset it")
    if known.lowest is None:
        return None
    try:
        number = int(value, 0)
    except ValueError:
        return _finding("refuse", setting, "it is not a whole number; set one, or unset it")
    if number < known.lowest or (known.highest is not None and number > known.highest):
        bound = (
            f"{known.lowest} to {known.highest}" if known.highest is not None else f"{known.lowest} or more"
        )
        usual = f" (the default is {known.default})" if known.default else ""
        return _finding("refuse", setting, f"it has to be {bound}; set such a value, or unset it{usual}")
    return None


def _forced_ll128(setting: Setting, fabric: Fabric | None) -> Finding | None:
    words = setting.value.upper().replace(";", ",")
    if setting.name != "NCCL_PROTO" or words.startswith("^") or "LL128" not in words or fabric == "gcp":
        return None
    message = "LL128 is forced, which corrupts data where the platform lacks it; unset it, NCCL knows where it works"
    return _finding("refuse", setting, message)


def _left_on(
    setting: Setting, settings: Mapping[str, Setting], fabric: Fabric | None, *, deterministic: bool
) -> Finding | None:
    name, value, known = setting.name, setting.value.strip(), NCCL[setting.name]
    if name == "NCCL_DEBUG":
        loud = value.upper() in ("INFO", "TRACE")
        return _finding("warn", setting, "debugging is left on; use WARN, or unset it") if loud else None
    if name == "NCCL_IB_GID_INDEX" and value != "-1":
        message = "a fixed index points at another GID after a change of addresses; unset it, NCCL finds it since 2.21"
        return _finding("warn", setting, message)
    profile = PROFILES.get(fabric) if fabric else None
    azure = "ndv" in settings.get("NCCL_TOPO_FILE", setting).value.lower() and name in AZURE_NEEDS
    wanted = (
        (profile is not None and name in profile.needs) or azure or (deterministic and name == "NCCL_ALGO")
    )
    if not known.debugging or value in (known.default, *known.advised) or wanted:
        return None
    return _finding("warn", setting, "NCCL's guide keeps it for debugging, not for production; unset it")


def _sockets(settings: Mapping[str, Setting]) -> list[Finding]:
    names = ("NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD")
    if not all(name in settings and settings[name].value.isdigit() for name in names):
        return []
    threads, each = (int(settings[name].value) for name in names)
    if threads * each <= _MAX_SOCKETS:
        return []
    message = f"{threads} threads of {each} sockets are {threads * each}; their product may be {_MAX_SOCKETS} at most"
    return [_finding("refuse", settings[names[0]], message)]


def differences(by_host: Mapping[str, Mapping[str, Setting]]) -> tuple[str, ...]:
    """Return a sentence for each variable on which hosts contradict each other, with who has set it on each."""
    names = sorted({name for settings in by_host.values() for name in settings} - OF_A_HOST)
    sentences = []
    for name in names:
        told = {host: settings.get(name) for host, settings in by_host.items()}
        if len({None if setting is None else setting.value for setting in told.values()}) > 1:
            values = ", ".join(
                f"{host}: {'unset' if setting is None else f'{setting.value} by {setting.set_by}'}"
                for host, setting in told.items()
            )
            sentences.append(f"{name} differs between hosts ({values}); NCCL needs one value on all of them")
    return tuple(sentences)


def _finding(
    verdict: Literal["refuse", "warn"], setting: Setting, message: str, reference: str = ""
) -> Finding:
    return Finding(
        verdict=verdict,
        setting=setting,
        message=message,
        reference=reference or f"{NCCL_GUIDE}, {setting.name}",
    )


# ---- for the verbs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a job would inherit, and what is wrong with it."""

    fabric: Fabric | None
    settings: tuple[Setting, ...]
    findings: tuple[Finding, ...]
    defaults: tuple[Default, ...]


def report(cluster: ClusterSpec, *, deterministic: bool = False) -> Report:
    """Look at this process's environment on behalf of a job on `cluster`."""
    settings = look(os.environ) if cluster.gpu.device == "cuda" else {}
    fabric = fabric_of(cluster, settings)
    return Report(
        fabric=fabric,
        settings=tuple(settings.values()),
        findings=lint(settings, fabric, deterministic=deterministic),
        defaults=defaults_of(cluster, settings),
    )


def warnings(told: Report) -> tuple[str, ...]:
    """Return the sentences to print; raise ConfigError for the first setting that cannot be meant."""
    for finding in told.findings:
        sentence = f"{finding.setting}: {finding.message}; see {finding.reference}"
        if finding.verdict == "refuse":
            raise ConfigError(sentence)
    return tuple(f"{f.setting}: {f.message}; see {f.reference}" for f in told.findings)


def to_json(told: Report) -> dict[str, Any]:
    """Return what env.json keeps."""
    return {
        "fabric": told.fabric,
        "inherited": {setting.name: [setting.value, setting.set_by] for setting in told.settings},
        "defaults": {default.name: [default.value, default.source] for default in told.defaults},
        "findings": [f"{finding.setting}: {finding.message}" for finding in told.findings],
    }
