"""
The command `dapo-trl`: `dapo-trl COMMAND recipe.yaml [--name value ...]`.

Nothing heavy is imported before a command is known, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_trl._version import __version__


COMMANDS = {
    "run": "all stages: sample, values, critic, score, advantages, train, eval",
    "sample": "solutions of all problems",
    "values": "... and completions from all states of the kept ones: step values",
    "critic": "... and the step critic",
    "score": "... and its values of all rows",
    "advantages": "... and state rows with advantages, ready to train on",
    "train": "... and the policy, evaluated before and after",
    "eval": "accuracy of `model_name_or_path`, or of any model given by that name, on the test problems",
    "inspect": "the states of one problem of a run in the terminal, steps coloured by value",
    "env": "versions of everything, for bug reports",
}
_PATHS = ("model_name_or_path", "critic_model_name_or_path", "dataset_name")


class UsageError(ValueError):
    """The command line or the recipe cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments (sequence of `str`, *optional*):
            Command line without the program's name. `None` takes the process's own.

    Returns:
        `int`: exit code; 0 if all went well, 1 for an error in the data or on the way, 2 for a wrong command line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise UsageError(f"There is no command {command!r}{_did_you_mean(command, COMMANDS)}.")
        _run(command, rest)
    except UsageError as error:
        print(f"dapo-trl: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("DAPO_TRL_TRACEBACK"):
            raise
        print(f"dapo-trl: {error}\nSet DAPO_TRL_TRACEBACK=1 to see where this happened.", file=sys.stderr)
        return 1
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command == "env":
        _print_env()
    elif command == "inspect":
        _inspect(arguments)
    elif {"-h", "--help"} & set(arguments):
        print(_command_help(command))
    else:
        _run_recipe(command, arguments)


def _run_recipe(command: str, arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"Name a recipe: dapo-trl {command} recipe.yaml")
    is_dry = "--dry-run" in arguments
    given = [argument for argument in arguments[1:] if argument != "--dry-run"]
    from dapo_trl.recipe import Recipe

    recipe = Recipe(*parse_recipe(arguments[0], given))
    if is_dry:
        from dapo_trl.estimate import print_estimate

        print_estimate(recipe)
    elif command == "eval":
        name = recipe.model.strip("/").replace("/", "--")
        recipe.evaluate(recipe.model, recipe.model, recipe.folder / "evaluations" / f"{name}.json")
    else:
        recipe.run("train" if command == "run" else command)


def parse_recipe(path: str, arguments: Sequence[str] = ()) -> tuple[Any, Any]:
    """
    Read a recipe.

    Args:
        path (`str`):
            YAML file with arguments of [`~dapo_trl.recipe_arguments.RecipeArguments`] and [`~trl.ModelConfig`]. Paths
            that begin with a dot are relative to it.
        arguments (sequence of `str`, *optional*):
            Arguments of a command line, which go first: `--seed 1`, `--policy.beta 0.1` for an entry of a section.

    Returns:
        `tuple[RecipeArguments, ModelConfig]`.

    Raises:
        UsageError: if the file is no YAML, or an argument is unknown or of the wrong kind.
    """
    from trl import ModelConfig, TrlParser

    from dapo_trl.recipe_arguments import RecipeArguments

    settings = _read_yaml(path)
    for name, value in (settings.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    known = [field.name for kind in (RecipeArguments, ModelConfig) for field in dataclasses.fields(kind)]
    for name in settings:
        if name not in known:
            raise UsageError(f"{path}: there is no setting {name!r}{_did_you_mean(name, known)}.")
    for name in _PATHS:
        if str(settings.get(name, "")).startswith("."):
            settings[name] = os.path.normpath(Path(path).parent / settings[name])
    parser = TrlParser([RecipeArguments, ModelConfig], exit_on_error=False)
    plain = _with_sections(settings, arguments)
    parser.set_defaults_with_config(**settings)
    try:
        recipe, model_config = parser.parse_args_into_dataclasses(plain, look_for_args_file=False)
    except (argparse.ArgumentError, SystemExit) as error:
        raise UsageError(f"{path}: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    return recipe, model_config


def _with_sections(settings: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Put `--section.name value` into the settings; the arguments that are left."""
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        section, _, name = argument.removeprefix("--").partition(".")
        if not (argument.startswith("--") and section in ("critic", "policy") and name):
            rest.append(argument)
            continue
        name, has_value, value = name.partition("=")
        if not has_value:
            value = next(waiting, "")
        settings[section] = dict(settings.get(section) or {}) | {name: _parse_value(value)}
    return rest


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    if not Path(path).exists():
        raise UsageError(f"There is no recipe {path!r}. Check the path.")
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings, `name: value` a line, but holds {type(settings).__name__}.")
    return settings


def _inspect(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dapo-trl inspect", description=COMMANDS["inspect"])
    parser.add_argument("folder", help="Folder of a run, or a parquet file of state rows.")
    parser.add_argument("--problem", help="`problem_id`; the first one by default.")
    options = parser.parse_args(arguments)
    from dapo_trl.inspection import print_problem

    print_problem(Path(options.folder), options.problem)


def _print_env() -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    print(f"- Platform: {platform.platform()}\n- Python: {platform.python_version()}\n- dapo-trl: {__version__}")
    for name in ("trl", "transformers", "accelerate", "datasets", "torch", "peft", "deepspeed", "vllm", "openai"):
        try:
            print(f"- {name}: {version(name)}")
        except PackageNotFoundError:
            print(f"- {name}: not installed")
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"- GPUs: {', '.join(devices) or 'none'}")


def _help() -> str:
    lines = ["usage: dapo-trl COMMAND recipe.yaml [--name value ...]", "", "commands:"]
    lines += [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "dapo-trl COMMAND --help lists the settings. Every stage that is done is skipped, one that was killed",
    ]
    lines += [
        "goes on where it was, with the same command. Several processes: accelerate launch -m dapo_trl COMMAND ..."
    ]
    return "\n".join(lines)


def _command_help(command: str) -> str:
    from dapo_trl.recipe_arguments import RecipeArguments

    lines = [f"usage: dapo-trl {command} recipe.yaml [--name value ...]", "", COMMANDS[command], "", "settings:"]
    for field in dataclasses.fields(RecipeArguments):
        factory: Any = field.default_factory
        default = factory() if field.default is dataclasses.MISSING else field.default
        lines.append(f"  --{field.name} ({default!r})\n      {field.metadata.get('help', '')}")
    lines += [
        "",
        "and those of TRL's `ModelConfig`: --model_name_or_path, --dtype, --attn_implementation, --use_peft, ...",
    ]
    lines += ["Entries of a section: --critic.learning_rate 1e-5, --policy.beta 0.1"]
    lines += ["--dry-run prints what the run would cost and does nothing."]
    return "\n".join(lines)


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f". There are: {', '.join(known)}"


if __name__ == "__main__":
    sys.exit(main())
