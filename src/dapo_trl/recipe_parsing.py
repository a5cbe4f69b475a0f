"""
Settings of a run from a recipe, which is a YAML file, and from a command line.

Nothing heavy is imported before the recipe's environment variables are set.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_trl.recipe_arguments import SECTIONS
from dapo_trl.settings import SettingsError, did_you_mean, read_settings


_PATHS = ("model_name_or_path", "critic_model_name_or_path", "dataset_name")  # of what must be there


class UsageError(SettingsError):
    """The command line or the recipe cannot be used."""


def parse_recipe(path: str, arguments: Sequence[str] = ()) -> tuple[Any, Any]:
    """
    Read a recipe.

    Args:
        path (`str`):
            YAML file with arguments of [`~dapo_trl.recipe_arguments.RecipeArguments`] and [`~trl.ModelConfig`]. Paths
            that begin with a dot are relative to it, also `output_dir`. Its variables `env` are set before anything
            is imported that might read them.
        arguments (sequence of `str`, *optional*):
            Arguments of a command line, which go first: `--seed 1`, `--policy.beta 0.1` for an entry of a section.

    Returns:
        `tuple[RecipeArguments, ModelConfig]`.

    Raises:
        SettingsError: if the file is no YAML, an argument is unknown or of the wrong kind, or there is nothing at a
            path of the file.
    """
    settings = _read_yaml(path)
    _set_environment(path, settings.pop("env", None) or {})
    from trl import ModelConfig, TrlParser

    from dapo_trl.recipe_arguments import RecipeArguments, refuse_missing_path

    kinds: Any = [RecipeArguments, ModelConfig]  # TRL's annotation knows one type of dataclass at a time
    try:
        settings = read_settings(settings, *kinds)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    relative = [name for name in (*_PATHS, "output_dir") if (settings.get(name) or "").startswith(".")]
    for name in relative:
        settings[name] = os.path.normpath(Path(path).parent / settings[name])
    plain = _with_sections(settings, arguments)
    refuse_unknown(plain, [field.name for kind in kinds for field in dataclasses.fields(kind)])
    parser = TrlParser(kinds, exit_on_error=False, allow_abbrev=False)
    parser.set_defaults_with_config(**settings)
    try:
        recipe, model_config = parser.parse_args_into_dataclasses(plain, look_for_args_file=False)
    except (argparse.ArgumentError, ValueError) as error:
        raise UsageError(str(error)) from error
    for name in set(relative) & set(_PATHS):
        value = getattr(model_config if name == "model_name_or_path" else recipe, name)
        if value == settings[name]:  # not set anew by the command line
            refuse_missing_path(name, os.path.join(os.curdir, value))
    return recipe, model_config


def _set_environment(path: str, variables: Any) -> None:
    if not isinstance(variables, dict):
        raise UsageError(f"{path}: `env` must hold variables, `NAME: value` a line, but is {variables!r}.")
    os.environ.update({name: str(value) for name, value in variables.items()})


def _with_sections(settings: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Put `--section.name value` and `--section JSON` into the settings; the arguments that are left."""
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, has_value, value = argument.partition("=")
        section, _, name = option.removeprefix("--").partition(".")
        if not option.startswith("--") or section not in SECTIONS:
            rest.append(argument)
            continue
        text = value if has_value else next(waiting, None)
        if text is None:
            raise UsageError(f"{option} needs a value.")
        entries = {name: _parse_value(text)} if name else _parse_value(text)
        if not isinstance(entries, dict):
            raise UsageError(f"{option} must be a JSON object, such as '{{\"max_steps\": 10}}', got {text!r}.")
        settings[section] = dict(settings.get(section) or {}) | entries
    return rest


def refuse_unknown(arguments: list[str], known: list[str]) -> None:
    """
    Refuse what is no setting.

    Args:
        arguments (`list[str]`):
            Arguments of a command line.
        known (`list[str]`):
            Settings that there are.

    Raises:
        UsageError: if an argument is none of them.
    """
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"{arguments[0]!r} is no setting. After the recipe come settings: --name value")
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name.removeprefix("no_") not in known:
            raise UsageError(f"There is no setting {argument.partition('=')[0]!r}{did_you_mean(name, known)}")


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"There is no recipe {path!r}. Check the path.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_repetitions(path, yaml.compose(text, yaml.SafeLoader))
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        held = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise UsageError(f"{path} must hold settings, `name: value` a line, but holds {held}.")
    return settings


def _refuse_repetitions(path: str, node: Any) -> None:
    """YAML takes the last of several entries of one name, and forgets the others without a word."""
    lines: dict[str, int] = {}
    for child in node.value if getattr(node, "id", "") in ("mapping", "sequence") else []:
        key, value = child if isinstance(child, tuple) else (None, child)
        if key is not None and key.id == "scalar":
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise UsageError(f"{path}, line {line}: {key.value!r} is set already, in line {first}. Remove one.")
            lines[key.value] = line
        _refuse_repetitions(path, value)
