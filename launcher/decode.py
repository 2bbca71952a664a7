"""Plain mapping -> frozen dataclass, strictly; and back. Serves config.yaml, plan.json and manifest.json alike."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from launcher.errors import ConfigError
from strategies.names import suggest

T = TypeVar("T")


def decode(cls: type[T], data: Any, key: str = "") -> T:
    """Build `cls` from `data`. Raises ConfigError with the full key for anything unknown, missing or mistyped."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{key or 'the configuration'}={data!r} must be a group of keys")
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise ConfigError(f"unknown key '{_join(key, str(name))}'; {suggest(str(name), fields)}")
    missing = [name for name, f in fields.items() if name not in data and _required(f)]
    if missing:
        raise ConfigError(f"missing key '{_join(key, missing[0])}'; set it to {_describe(hints[missing[0]])}")
    values = {name: _value(hints[name], value, _join(key, name)) for name, value in data.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def encode(value: Any) -> Any:
    """The inverse of `decode`: dataclasses to plain dicts, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [encode(item) for item in value]
    return value


def _value(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _optional(args, value, key, hint)
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args):
            raise ConfigError(f"{key}={value} is not accepted; {suggest(str(value), [str(a) for a in args])}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} must be a list")
        return tuple(_value(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must be a group of keys")
        return {str(k): _value(args[1], v, _join(key, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, key)  # type: ignore[arg-type]
    return _scalar(hint, value, key)


def _optional(args: tuple[Any, ...], value: Any, key: str, hint: Any) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise ConfigError(f"{key}=null is not accepted; give {_describe(hint)}")
    inner = [arg for arg in args if arg is not type(None)]
    words = [arg for arg in inner if get_origin(arg) is Literal]
    if len(inner) == 2 and words:  # a number, or a word that stands for one
        if value in get_args(words[0]):
            return value
        if not isinstance(value, int | float):
            raise ConfigError(f"{key}={value} is not {_describe(hint)}")
        inner.remove(words[0])
    assert len(inner) == 1, f"decode supports X | None and X | Literal only, not {hint}"
    return _value(inner[0], value, key)


def _scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 3e-4 as text; a person means a number.
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}={'null' if value is None else value} is not {_describe(hint)}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if hint in names:
        return names[hint]
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(arg) for arg in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        null = ["null"] if type(None) in get_args(hint) else []
        words = [str(word) for arg in inner if get_origin(arg) is Literal for word in get_args(arg)]
        plain = [_describe(arg) for arg in inner if get_origin(arg) is not Literal or len(inner) == 1]
        return " or ".join([*plain, *(words if len(inner) > 1 else []), *null])
    return "a list" if get_origin(hint) is tuple else "a group of keys"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
