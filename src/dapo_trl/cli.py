"""
The command `dapo-trl`: `dapo-trl COMMAND recipe.yaml [--name value ...]`.

Nothing heavy is imported before a command is known, so that `--help` answers at once.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_trl._version import __version__
from dapo_trl.interrupts import noted_interrupts
from dapo_trl.recipe_parsing import UsageError, parse_recipe, refuse_unknown
from dapo_trl.settings import SettingsError, did_you_mean


COMMANDS = {
    "run": "all stages: sample, values, critic, score, advantages, train, eval",
    "sample": "solutions of all problems",
    "values": "... and completions from all states of the kept ones: step values",
    "critic": "... and the step critic",
    "score": "... and its values of all rows",
    "advantages": "... and state rows with advantages, ready to train on",
    "train": "... and the policy, evaluated before and after",
    "eval": "accuracy of `model_name_or_path`, or of any model given by that name, on the test problems",
    "diagnose": "what the critic of a run (its folder, or its recipe) knows about problems that it was not trained on; "
    "of a recipe, --num_completions N measures it against N fresh completions of every state",
    "processbench": "how often a critic finds the first wrong step of others' solutions, those of ProcessBench",
    "inspect": "the states of one problem of a run in the terminal, steps coloured by value",
    "report": "a run as one HTML file: accuracies, critic, training, what was left out, solutions by value",
    "env": "versions of everything, for bug reports",
}
_NEED_A_CRITIC = ("critic", "score")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments (sequence of `str`, *optional*):
            Command line without the program's name. `None` takes the process's own.

    Returns:
        `int`: exit code; 0 if all went well, 1 for an error in the data or on the way, 2 for a setting that cannot be
        used, in the recipe or on the command line, 130 after an interrupt.
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
            raise UsageError(f"There is no command {command!r}{did_you_mean(command, COMMANDS)}")
        with noted_interrupts():
            _run(command, rest)
    except SettingsError as error:
        if os.environ.get("DAPO_TRL_TRACEBACK"):
            raise
        print(f"dapo-trl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dapo-trl: stopped. The same command goes on where it was.", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_expected(error):
            error.add_note("This was not expected. Please report it, with what `dapo-trl env` prints.")
            raise
        if os.environ.get("DAPO_TRL_TRACEBACK"):
            raise
        print(f"dapo-trl: {_explain(error)}", file=sys.stderr)
        if not _is_own(error):
            print("Set DAPO_TRL_TRACEBACK=1 to see where this happened.", file=sys.stderr)
        return 1
    return 0


def _is_expected(error: Exception) -> bool:
    """Whether bad input, a machine or a network can be the reason; what is left is a mistake of the library."""
    from_files = type(error).__module__.partition(".")[0] in ("datasets", "safetensors", "pyarrow", "huggingface_hub")
    return from_files or isinstance(error, (ValueError, OSError, RuntimeError, ImportError))


def _is_own(error: BaseException) -> bool:
    """Whether this library says what is wrong, so that the place in the code would tell nothing more."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "dapo_trl"


def _explain(error: BaseException) -> str:
    """The message; of errors that only say that there was one also the reason."""
    reason = error.__cause__
    if reason is not None and type(error).__module__.startswith("datasets"):
        return f"{error}: {_explain(reason)}"
    return str(error) or type(error).__name__


def _run(command: str, arguments: list[str]) -> None:
    if command == "inspect":
        _inspect(arguments)
    elif command == "diagnose":
        _diagnose(arguments)
    elif command == "processbench":
        _processbench(arguments)
    elif command == "report":
        _report(arguments)
    elif {"-h", "--help"} & set(arguments):
        print(f"usage: dapo-trl env\n\n{COMMANDS[command]}" if command == "env" else _command_help(command))
    elif command == "env":
        _print_env()
    else:
        _run_recipe(command, arguments)


def _run_recipe(command: str, arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"Name a recipe: dapo-trl {command} recipe.yaml")
    is_dry = "--dry-run" in arguments
    given = [argument for argument in arguments[1:] if argument != "--dry-run"]
    settings, model_config = parse_recipe(arguments[0], given)  # sets the environment, before much is imported
    if command in _NEED_A_CRITIC and settings.values == "monte_carlo":
        raise UsageError(f"`dapo-trl {command}` has nothing to do: with `values: monte_carlo` there is no critic.")
    from dapo_trl.recipe import Recipe

    recipe = Recipe(settings, model_config)
    if is_dry:
        from dapo_trl.estimate import print_estimate

        print_estimate(recipe)
    elif command == "eval":
        name = recipe.model.strip("/").replace("/", "--")
        recipe.evaluate(recipe.model, recipe.model, recipe.folder / "evaluations" / f"{name}.json")
    else:
        recipe.run("train" if command == "run" else command)


def _inspect(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dapo-trl inspect", description=COMMANDS["inspect"])
    parser.add_argument("folder", help="Folder of a run, or a parquet file of state rows.")
    parser.add_argument("--problem", help="`problem_id`; the first one by default.")
    options = parser.parse_args(arguments)
    from dapo_trl.inspection import print_problem

    print_problem(Path(options.folder), options.problem)


def _diagnose(arguments: list[str]) -> None:
    usage = "dapo-trl diagnose RUN\n       dapo-trl diagnose recipe.yaml [--num_completions N] [--name value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=COMMANDS["diagnose"], allow_abbrev=False)
    parser.add_argument("run", help="Folder of a run, or its recipe.")
    parser.add_argument("--num_completions", type=int, help="Fresh completions of every state, such as 64.")
    parser.add_argument("--max_problems", type=int, help="Held-out problems that get them; all by default.")
    options, rest = parser.parse_known_args(arguments)
    for name in ("num_completions", "max_problems"):
        if (value := getattr(options, name)) is not None and value < 2:
            raise UsageError(f"`--{name}` must be at least 2, got {value}.")
    if options.max_problems is not None and options.num_completions is None:
        raise UsageError("`--max_problems` is about fresh completions: give `--num_completions` too, or neither.")
    _diagnose_one(options.run, options.num_completions, options.max_problems, rest)


def _diagnose_one(run: str, num_completions: int | None, max_problems: int | None, rest: list[str]) -> None:
    """Of a folder as it is; of a recipe, which knows the model, with fresh completions if that is asked for."""
    if Path(run).is_dir():
        if num_completions is not None:
            raise UsageError(
                "Fresh completions come from the model of the run, which its recipe names: dapo-trl diagnose "
                f"recipe.yaml --output_dir {run} --num_completions {num_completions}"
            )
        refuse_unknown(rest, [])
        folder = Path(run)
    else:
        settings, model_config = parse_recipe(run, rest)
        folder = Path(settings.output_dir)
    from dapo_trl.diagnosing import diagnose_run, print_diagnosis

    if num_completions is None:
        print_diagnosis(diagnose_run(folder))
        return
    from dapo_trl.fresh_diagnosis import diagnose_afresh
    from dapo_trl.recipe import Recipe
    from dapo_trl.stages import process_state

    found = diagnose_afresh(Recipe(settings, model_config), num_completions, max_problems)
    if process_state().is_main_process:
        print_diagnosis(found)


def _processbench(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dapo-trl processbench", description=COMMANDS["processbench"])
    parser.add_argument("critic", help="Folder of a run; or name or path of a critic.")
    parser.add_argument("--fit", default="gsm8k", help="Part that thresholds are chosen on, or a file. Default: gsm8k.")
    parser.add_argument(
        "--test",
        nargs="+",
        default=["math", "olympiadbench", "omnimath"],
        help="Parts to measure on, or files. Default: math olympiadbench omnimath.",
    )
    parser.add_argument("--dataset", default="Qwen/ProcessBench", help="Name on the Hub, or folder of a download.")
    parser.add_argument("--prompt_template", help="As in the critic's training; the folder of a finished run knows.")
    parser.add_argument(
        "--step_separator",
        type=lambda text: text.replace("\\n", "\n"),
        default="\n\n",
        help="What ends a step, \\n for a new line. Default: an empty line.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Solutions at a time. Default: 8.")
    parser.add_argument("--output", help="File for the results, as JSON.")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    from dapo_trl.processbench import dump_processbench, evaluate_critic, print_processbench

    found = evaluate_critic(**options)
    print_processbench(found)
    if output:
        Path(output).write_text(dump_processbench(found))


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dapo-trl report", description=COMMANDS["report"])
    parser.add_argument("folder", help="Folder of a run, finished or not.")
    parser.add_argument("--output", help="File to write; by default `report.html` in the folder.")
    parser.add_argument("--problems", type=int, default=40, help="Problems to look at (40); 0 for none.")
    options = parser.parse_args(arguments)
    if options.problems < 0:
        raise UsageError(f"--problems must be at least 0, got {options.problems}.")
    from dapo_trl.report import write_report

    path = write_report(options.folder, options.output, options.problems)
    print(f"Report: {path} ({path.stat().st_size / 1e6:.1f} MB). Open it in a browser.")


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
    lines += [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "dapo-trl COMMAND --help lists the settings. Every stage that is done is skipped, one that was killed goes on",
        "where it was, with the same command. Several processes, with GPUs or without:",
        "accelerate launch --multi_gpu --num_processes N -m dapo_trl COMMAND recipe.yaml ...",
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


if __name__ == "__main__":
    sys.exit(main())
