"""
Settings from YAML or a command line, checked against the dataclass that they are for. Nothing heavy is imported.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any


_MANY = 20  # names that nobody wants to read in an error
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


class SettingsError(ValueError):
    """A setting, of a recipe or a command line, cannot be used."""


def read_settings(settings: Mapping[str, Any], *kinds: Any, section: str = "") -> dict[str, Any]:
    """
    Settings with the types of their fields.

    YAML reads `1e-5` as text and `1.0e-5` as a number; both are numbers here.

    Args:
        settings (`Mapping`):
            Values by name.
        *kinds (`type`):
            Dataclasses with the fields.
        section (`str`, *optional*, defaults to `""`):
            Section that the settings stand in, for errors.

    Returns:
        `dict`.

    Raises:
        ValueError: if a name is unknown, or a value is not of its field's type; the message names it.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> from dapo_trl.settings import read_settings

    >>> @dataclass
    ... class Config:
    ...     learning_rate: float = 5e-6
    >>> read_settings({"learning_rate": "1e-5"}, Config)
    {'learning_rate': 1e-05}
    >>> read_settings({"learning_rat": 1e-5}, Config, section="critic")
    Traceback (most recent call last):
    ...
    ValueError: `critic` has no entry 'learning_rat'; did you mean 'learning_rate'?

    ```
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"`{section}` must hold entries, `name: value` a line, but is {settings!r}.")
    hints = {name: hint for kind in kinds for name, hint in _hints(kind).items()}
    read = {}
    for name, value in settings.items():
        label = f"{section}.{name}" if section else name
        if name not in hints:
            what = f"`{section}` has no entry" if section else "There is no setting"
            raise ValueError(f"{what} {name!r}{did_you_mean(str(name), hints)}")
        try:
            read[name] = _read(value, hints[name])
        except (TypeError, ValueError):
            raise ValueError(f"`{label}` must be {_describe(hints[name])}, got {value!r}.") from None
    return read


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """
    End of a sentence about a name that does not exist.

    Args:
        name (`str`):
            The name.
        known (iterable of `str`):
            Names that exist.

    Returns:
        `str`: the closest of them, or all if there are few.
    """
    known = list(known)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f". There are: {', '.join(known)}." if len(known) < _MANY else "."


def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _alternatives(hint: Any) -> list[Any]:
    """Plain types of a hint: those of a union, `list` of `list[str]`, `str` of choices."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (list, dict, tuple):
        return [origin]
    if origin is typing.Literal:
        return [str]
    return [kind for argument in arguments for kind in _alternatives(argument)] if arguments else [hint]


def _read(value: Any, hint: Any) -> Any:
    kinds = _alternatives(hint)
    if Any in kinds or type(value) in kinds:
        return value
    if value is None and dict in kinds:  # a section without entries
        return {}
    if isinstance(value, str):
        return _read_text(value, kinds)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _read_number(value, kinds)
    raise ValueError


def _read_text(value: str, kinds: list[Any]) -> Any:
    if float in kinds or int in kinds:
        return _read_number(float(value), kinds)
    if bool in kinds and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    raise ValueError


def _read_number(value: float, kinds: list[Any]) -> Any:
    if float in kinds:
        return float(value)
    if int in kinds and float(value).is_integer():
        return int(value)
    if str in kinds:
        return str(value)
    raise ValueError


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    names |= {dict: "a section", type(None): "null"}
    return " or ".join(dict.fromkeys(names[kind] for kind in _alternatives(hint) if kind in names))
