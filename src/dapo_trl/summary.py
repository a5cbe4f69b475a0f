"""
What a person sees of a run: titles, tables and a figure.
"""

import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import EvalResult
from rich.console import Console
from rich.table import Table

from dapo_trl.diagnosing import describe
from dapo_trl.inspection import one_line
from dapo_trl.intervals import Estimate


console = Console(width=110)
logger = logging.getLogger(__name__)

DONE_BEFORE = ", done before"


def warn(message: str) -> None:
    """Say what is not as it should be."""
    console.print(f"[bold red]{message}")


def print_title(title: str, record: Path | None = None) -> None:
    """
    Begin a stage.

    Args:
        title (`str`):
            What it is called.
        record (`Path`, *optional*):
            File that is there if it was done before.
    """
    if PartialState().is_main_process:
        console.rule(f"[bold]{title}{DONE_BEFORE if record is not None and record.exists() else ''}")


def print_stage(manifest: dict[str, Any], was_complete: bool = False) -> None:
    """
    What a sampling stage did, kept and left out.

    Args:
        manifest (`dict`):
            Manifest of a finished [`~dapo_trl.store.ShardStore`].
        was_complete (`bool`, *optional*, defaults to `False`):
            Whether that was done before.
    """
    if not PartialState().is_main_process:
        return
    table = Table("what", "how many", title=DONE_BEFORE.removeprefix(", ") if was_complete else None)
    for name, number in (manifest["rows"] | manifest["counts"]).items():
        if number:
            table.add_row(name.replace("_", " "), f"{number:,}")
    seconds, tokens = manifest["seconds"], manifest["counts"].get("tokens_generated", 0)
    table.add_row("seconds, interruptions left out", f"{seconds:,.1f}")
    table.add_row("tokens per second, all processes", f"{tokens / max(seconds, 1e-9):,.0f}")
    console.print(table)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """
    Accuracy of a policy.

    Args:
        evaluation (`dict`):
            Fields of [`~dapo_trl.evaluation.Evaluation`].
    """
    if not PartialState().is_main_process:
        return
    k = evaluation["k"]
    num_samples = evaluation["num_problems"] * (k + 1)
    passed = (evaluation.get("pass_at") or {}) | {str(k): evaluation["pass_at_k"]}
    shown = ", ".join(f"pass@{number} {Estimate(**found)}" for number, found in passed.items())
    console.print(
        f"greedy {Estimate(**evaluation['greedy'])}, mean@{k} {Estimate(**evaluation['mean_at_k'])}, {shown}; "
        f"{evaluation['truncated']:,} of {num_samples:,} samples truncated, {evaluation['not_judged']:,} not judged"
    )


def print_critic(metrics: dict[str, Any]) -> None:
    """
    Whether the critic is any good.

    Args:
        metrics (`dict`):
            Metrics on the held-out problems, and its `diagnosis`, see [`~dapo_trl.diagnosing.diagnose_once`].
    """
    if not PartialState().is_main_process:
        return
    who = f"The mean of {len(metrics['critics'])} critics" if "critics" in metrics else "Critic"
    if "shift" in metrics:
        who = f"The first iteration's values, their log-odds shifted by {metrics['shift']:+.2f},"
    console.print(
        f"{who} on {metrics['num_held_out']} held-out problems: BCE {metrics['eval_bce']:.3f} (best constant "
        f"{metrics['eval_bce_constant']:.3f}), skill {metrics['eval_skill']:.1%}, Brier {metrics['eval_brier']:.3f}, "
        f"calibration error {metrics['eval_calibration_error']:.3f}; orders {metrics['eval_sibling_ranking']:.1%} of "
        f"{metrics['eval_sibling_pairs']:,} pairs of sibling steps as their Monte Carlo values do, where these differ "
        "by 0.3 or more."
    )
    diagnosis = metrics["diagnosis"]
    if description := describe(diagnosis):
        console.print(f"{description}.")
    (console.print if diagnosis["is_fit"] else warn)(diagnosis["verdict"])


def print_strength(strength: float, is_of_critic: bool = True) -> None:
    """
    For how many rollouts the prior stands.

    Args:
        strength (`float`):
            Prior strength, see [`~dapo_trl.shrinkage.fit_prior_strength`].
        is_of_critic (`bool`, *optional*, defaults to `True`):
            Whether the prior is the critic, and not the mean outcome in its place.
    """
    if not PartialState().is_main_process:
        return
    if is_of_critic:
        console.print(f"On held-out states the critic is worth {strength:.1f} rollouts: values are shrunk that far.")
    else:
        console.print(
            f"The critic is not used: values are shrunk towards the mean outcome, which is worth {strength:.1f} "
            "rollouts. `allow_unfit_critic: true` shrinks them towards the critic."
        )


def critic_table(metrics: dict[str, Any], column: str = "held-out problems") -> dict[str, dict[str, Any]]:
    """
    Metrics of the critic for its card.

    Args:
        metrics (`dict`):
            Metrics on the held-out problems.
        column (`str`, *optional*, defaults to `"held-out problems"`):
            What stands above the numbers.

    Returns:
        `dict`: row -> column -> number; without a metric that is not there.
    """
    names = {"eval_bce": "binary cross-entropy", "eval_bce_constant": "best constant's cross-entropy"}
    names |= {"eval_skill": "skill", "eval_brier": "Brier score", "eval_calibration_error": "calibration error"}
    names |= {"eval_sibling_ranking": "siblings ordered alike (0.3 apart)"}
    return {title: {column: metrics[name]} for name, title in names.items() if name in metrics}


def policy_results(after: dict[str, Any], problems: str | None, split: str) -> list[EvalResult]:
    """
    Accuracies for the metadata of a card.

    Args:
        after (`dict`):
            Fields of [`~dapo_trl.evaluation.Evaluation`] of the trained policy.
        problems (`str`, *optional*):
            Name of the problems on the Hub, if they are there.
        split (`str`):
            Split that was evaluated on.

    Returns:
        `list[EvalResult]`: greedy, mean@k and pass@k, in [0, 1].
    """
    k = after["k"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=problems or "held-out",
            dataset_name=problems or "held-out problems",
            dataset_split=split if problems else None,
            metric_type=kind,
            metric_name=title,
            metric_value=round(after[name]["mean"], 6),
        )
        for kind, title, name in (
            ("accuracy", "accuracy, greedy", "greedy"),
            ("accuracy", f"accuracy, mean@{k}", "mean_at_k"),
            ("pass@k", f"pass@{k}", "pass_at_k"),
        )
    ]


def critic_results(metrics: dict[str, Any], problems: str | None) -> list[EvalResult]:
    """
    Metrics of the critic for the metadata of its card.

    Args:
        metrics (`dict`):
            Metrics on the held-out problems.
        problems (`str`, *optional*):
            Name of the problems on the Hub, if they are there.

    Returns:
        `list[EvalResult]`.
    """
    return [
        EvalResult(
            task_type="reinforcement-learning",
            dataset_type=problems or "held-out",
            dataset_name="problems held out of training",
            metric_type=name.removeprefix("eval_"),
            metric_name=name.removeprefix("eval_").replace("_", " "),
            metric_value=round(metrics[name], 6),
        )
        for name in ("eval_bce", "eval_bce_constant", "eval_skill", "eval_brier", "eval_calibration_error")
    ]


def print_results(results: dict[str, Any]) -> None:
    """
    Accuracies before and after, and everything that was left out.

    Args:
        results (`dict`):
            Results of [`~dapo_trl.recipe.Recipe`].
    """
    if not PartialState().is_main_process:
        return
    before, temperature = results["before"], results["arguments"]["temperature"]
    table = Table("policy", "greedy", f"mean@{before['k']}", f"pass@{before['k']}")
    problems = f"{before['num_problems']:,} held-out problems"
    table.title = f"Accuracy on {problems}, temperature {temperature:g}, 95% intervals"
    for label, evaluation in _evaluations(results).items():
        cells = (str(Estimate(**evaluation[name])) for name in ("greedy", "mean_at_k", "pass_at_k"))
        table.add_row(label, *cells)
    console.print(table)
    dropped = Table("stage", "what", "how many", title="What was sampled, kept and left out")
    for iteration in results.get("iterations", [results]):
        for stage, report in iteration["dropped"].items():
            for part, counts in report.items() if isinstance(next(iter(report.values()), 0), dict) else [("", report)]:
                for what, count in counts.items():
                    if count:
                        label = f"{stage} {part}".strip().replace("_", " ")
                        dropped.add_row(label, what.replace("_", " "), f"{count:,}")
            dropped.add_section()
    console.print(dropped)
    times = Table("stage", "seconds", "tokens generated", title="Time and tokens per stage")
    for stage, row in results["stages"].items():
        times.add_row(stage, f"{row['seconds']:,.1f}", f"{row['tokens']:,}" if row["tokens"] else "")
    times.add_row("total", f"{sum(row['seconds'] for row in results['stages'].values()):,.1f}", "")
    console.print(times)


def print_next(folder: Path) -> None:
    """
    What to look at in a finished run.

    Args:
        folder (`Path`):
            Folder of the run.
    """
    if not PartialState().is_main_process:
        return
    lines = [f"All of it as one HTML file: dapo-trl report {folder}"]
    lines += [f"The states of a problem, with their values: dapo-trl inspect {folder}"]
    if (folder / "values.png").exists():
        lines.append(f"Values along some solutions: {folder / 'values.png'}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _evaluations(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {"before": results["before"]}
    iterations = results.get("iterations", [results])
    for number, iteration in enumerate(iterations, 1):
        for name, evaluation in iteration.items():
            if name.startswith("policy_"):
                label = f"after, {name.removeprefix('policy_').replace('_', ' ')} values"
                found[label if len(iterations) == 1 else f"iteration {number}, {label}"] = evaluation
    return found


def draw_values(solutions: Dataset, path: Path) -> None:
    """
    Draw values along some solutions of the same problems, correct and wrong. Nothing depends on the figure: what fails
    is a warning.

    Args:
        solutions ([`~datasets.Dataset`]):
            Solution rows with `critic_values`.
        path (`Path`):
            Picture to write.
    """
    try:
        _draw_figure(solutions, path)
    except Exception as error:
        logger.warning(f"The figure {path} could not be drawn: {type(error).__name__}: {error}")


def _draw_figure(solutions: Dataset, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in solutions:
        by_problem.setdefault(row["problem_id"], []).append(row)
    mixed = [rows for rows in by_problem.values() if len({row["reward"] for row in rows}) > 1][:4]
    if not mixed:
        return
    figure, axes = pyplot.subplots(
        1, len(mixed), figsize=(4 * len(mixed), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, rows in zip(axes[0], mixed, strict=True):
        _draw_problem(axis, rows)
    axes[0][0].set_ylabel("value: probability to end correct")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Values along solutions")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    console.print(f"Figure of values along some solutions: {path}")


def _draw_problem(axis: Any, rows: list[dict[str, Any]]) -> None:
    for outcome, color in ((1.0, "#1b7837"), (0.0, "#c2410c")):
        row = next(row for row in rows if (row["reward"] >= 0.5) == bool(outcome))
        states = range(len(row["values"]))
        verdict = "correct" if outcome else "wrong"
        # at the end the method takes the true reward, not the critic's guess
        critic_values = [*row["critic_values"][:-1], row["reward"]]
        axis.plot(states, critic_values, color=color, marker="o", label=f"{verdict}, critic (at the end: outcome)")
        axis.plot(states, row["values"], color=color, linestyle=":", marker="x", label=f"{verdict}, Monte Carlo")
    axis.set_xlabel("steps taken")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    prompt = rows[0]["prompt"] if isinstance(rows[0]["prompt"], str) else rows[0]["prompt"][-1]["content"]
    axis.set_title(one_line(prompt.strip(), longest=40), fontsize=9, parse_math=False)  # `$5` is no formula
