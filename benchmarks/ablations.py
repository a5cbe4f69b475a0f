"""
What matters: one setting of this method at a time, on the demo's task, against the others as they are in the demo.

    python benchmarks/ablations.py [--seeds 0 1 2] [--output_dir runs/learning]

Each row is the demo's recipe on the critic's values with one setting changed, over the same seeds, evaluated on 512
validation problems: greedily, and 8 samples a problem at temperature 1; intervals are Student's t over seeds. Settings
of the policy share the data of `learning.py`; settings of the data have data and a critic of their own. Writes
`benchmarks/results/ablations.json`, the tables in `benchmarks/README.md` and `docs/images/ablations.png`.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from learning_jobs import STUDENTS, TASKS, Job, data_of, run_jobs, sample_data
from learning_report import METRICS, spread
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify")
TASK = "arithmetic"
CRITIC = "critic_model_name_or_path"
REDUCTIONS = ("samples", "states", "pairs", "pairs without duplicates")


@dataclass(frozen=True)
class Ablation:
    """
    Values of one setting.

    Attributes:
        title (`str`):
            What it is.
        name (`str`):
            Field of `DAPOConfig`, or argument of the recipe.
        values (`tuple`):
            Values that are tried; the demo's among them.
        default (`Any`):
            That of the demo.
        is_of_data (`bool`):
            Whether data and critic change with it.
    """

    title: str
    name: str
    values: tuple[Any, ...]
    default: Any
    is_of_data: bool = False

    def job(self, value: Any, seed: int) -> Job:
        settings = {name: POLICY[name] for name in ("learning_rate", "beta", "num_train_epochs")}
        data: tuple[str, ...] = ()
        if value != self.default and self.is_of_data:
            data = (f"--{self.name}", str(value))
        elif value != self.default:
            settings[self.name] = value
        return Job(TASK, seed, "critic", "validation", settings, data)


RECIPE = TASKS[TASK].settings
POLICY = RECIPE["policy"]
ABLATIONS = (
    Ablation("beta", "beta", (0.002, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5), POLICY["beta"]),
    Ablation("passes over the states", "num_train_epochs", (1, 2, 3, 5, 8), POLICY["num_train_epochs"]),
    Ablation("states with nothing to compare", "anchor_states", (False, True), RECIPE["anchor_states"]),
    Ablation("smallest advantage gap of a state", "min_advantage_gap", (0.0, 0.1, 0.2, 0.4), 0.1),
    Ablation("weights by reliability", "reliability_weights", (False, True), False),
    Ablation("mean of the loss over", "reduction", REDUCTIONS, "samples"),
    Ablation(
        "completions of a state", "num_completions", (2, 4, 8, 16, 32), RECIPE["num_completions"], is_of_data=True
    ),
    Ablation("solutions kept of a problem", "num_kept", (2, 4, 8), RECIPE["num_kept"], is_of_data=True),
    Ablation("problems", "num_train_problems", (175, 350, 700, 1400), RECIPE["num_train_problems"], is_of_data=True),
    Ablation(
        "share of the problems that the critic learns from", "critic_share", (0.25, 0.5, 1.0), 1.0, is_of_data=True
    ),
    Ablation("states that the critic learns from", "critic_states", ("solutions", "candidates"), "solutions", True),
    Ablation("model of the critic", CRITIC, ("2 layers", "4 layers", "student", "larger"), "student", True),
    Ablation("critics, of which the mean is taken", "num_critics", (1, 3), 1, is_of_data=True),
)


def critic_model(name: str, folder: Path) -> Path:
    """A model for the critic: the larger one, or the student's first layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "larger":
        return TASKS[TASK].larger
    num_layers = int(name.split()[0])
    path = folder / f"student-{num_layers}"
    if not (path / "tokenizer_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(STUDENTS)
        model.model.layers = model.model.layers[:num_layers]
        model.config.num_hidden_layers = num_layers
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(STUDENTS).save_pretrained(path)
    return path


def jobs_of(ablation: Ablation, seeds: list[int], folder: Path) -> Iterator[tuple[Any, Job]]:
    for value in ablation.values:
        for seed in seeds:
            job = ablation.job(value, seed)
            if ablation.name == CRITIC and value != ablation.default:
                job = replace(job, data=(f"--{CRITIC}", str(critic_model(value, folder))))
            yield value, job


def measure(seeds: list[int], folder: Path, num_processes: int) -> dict[str, Any]:
    """Results of all values, and of the critics where they differ."""
    everything = {ablation.name: list(jobs_of(ablation, seeds, folder)) for ablation in ABLATIONS}
    jobs = [job for jobs in everything.values() for _, job in jobs]
    run_jobs(jobs, folder, num_processes)
    restored = [job for job in jobs if not diagnosis_of(job, folder).exists()]
    sample_data(restored, folder, num_processes)
    found: dict[str, Any] = {}
    for ablation in ABLATIONS:
        rows: dict[str, list[dict[str, Any]]] = {}
        for value, job in everything[ablation.name]:
            (result,) = run_jobs([job], folder, num_processes)
            kept = {name: result[name] for name in (*METRICS, "tokens")}
            rows.setdefault(str(value), []).append(kept | {"seed": job.seed, "critic": critic_of(job, folder)})
        found[ablation.name] = {"title": ablation.title, "default": str(ablation.default), "rows": rows}
    return found


def diagnosis_of(job: Job, folder: Path) -> Path:
    return data_of(job, folder).run / "data" / "diagnosis.json"


def critic_of(job: Job, folder: Path) -> dict[str, float]:
    """Skill of the critic, or of several together, on problems that it was not trained on."""
    measures = json.loads(diagnosis_of(job, folder).read_text())["measures"]
    return {name: measures[name]["mean"] for name in ("skill", "sibling_ranking") if name in measures}


# ---- Report ----


def table(found: dict[str, Any]) -> str:
    titles = [*METRICS, f"{METRICS[0]}: this minus the demo", "tokens", "critic's skill"]
    lines = [f"| setting | value | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for ablation in found.values():
        demo = ablation["rows"][ablation["default"]]
        for value, runs in ablation["rows"].items():
            cells = [spread([run[metric] for run in runs]) for metric in METRICS]
            pairs = zip(runs, demo, strict=True)
            cells.append("" if runs is demo else spread([a[METRICS[0]] - b[METRICS[0]] for a, b in pairs], "+"))
            tokens = np.mean([run["tokens"] for run in runs])
            cells += [f"{tokens / 1000:,.0f} k", f"{np.mean([run['critic']['skill'] for run in runs]):.3f}"]
            mark = " (demo)" if runs is demo else ""
            lines.append(f"| {ablation['title']} | {value}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def details(record: dict[str, Any]) -> str:
    return (
        f"{origin_in_words(record)} "
        f"Validation problems, {len(record['seeds'])} seeds, 95% intervals; differences are paired, seed by seed.\n\n"
        f"{table(record['results'])}"
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel a setting."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = list(figure.subplots(-(-len(found) // 4), 4, sharey=True).flat)
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, ablation in zip(axes, found.values(), strict=False):
        values = list(ablation["rows"])
        for metric, marker, color in zip(METRICS, "os", ("#4477aa", "#ee6677"), strict=True):
            scores = np.array([[100 * run[metric] for run in ablation["rows"][value]] for value in values])
            axis.plot(range(len(values)), scores.mean(axis=1), marker=marker, color=color, label=metric)
            axis.plot(range(len(values)), scores, ".", color=color, alpha=0.4, markersize=4)
        axis.set_xticks(range(len(values)), [value.replace(" without", "\nwithout") for value in values])
        axis.tick_params(labelsize=8)
        axis.axvline(values.index(ablation["default"]), color="#bbbbbb", linewidth=6, alpha=0.4, zorder=0)
        axis.set_title(ablation["title"].replace(", of", ",\nof").replace(" that the", "\nthat the"), fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.supylabel("% correct on validation problems")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "learning")
    parser.add_argument("--num_processes", type=int, default=2, help="Trainings at a time, one core each.")
    given = parser.parse_args()
    record = {
        **origin(command_line(), PACKAGES),
        "seeds": given.seeds,
        "settings": RECIPE,
        "results": measure(given.seeds, given.output_dir, given.num_processes),
    }
    keep(record, "ablations")
    draw(record["results"], REPOSITORY / "docs" / "images" / "ablations.png")
    write_between(REPOSITORY / "benchmarks" / "README.md", "ablations", details(record))
    print(table(record["results"]))


if __name__ == "__main__":
    main()
