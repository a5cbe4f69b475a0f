"""
What a critic adds to counts: mean squared error of the candidates' values against generated tokens, for each estimator.

    python benchmarks/estimators.py [--seeds 0 1 2 3 4] [--repeats 10]

Advantages are made of the values of candidate next steps. `monte_carlo` values a candidate by the completions that
begin with it or pass through it, `critic` by the critic alone, `shrinkage` by both. As in `values.py`, completions come
from a pool of 512 of every state of the kept solutions of 80 validation problems, so that values can be compared with
those of completions that no estimate has seen; the variance of these is subtracted. A critic comes from the demo's run
of each seed, which has never seen these problems; "larger" is the mean value of three of the same run that begin with a
larger model; one more, "pooled", learns from the problems of all of these runs.
The prior strength is fitted on one half of the problems; errors are those of the other half, with bootstrap intervals
over problems.

Writes `benchmarks/results/estimators.json`, `docs/images/estimators.png` and the table in `benchmarks/README.md`.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from dapo_trl import StepCriticConfig, StepCriticTrainer
from dapo_trl.critics import mean_values
from dapo_trl.run_folder import critic_folders, held_out_problems
from dapo_trl.shrinkage import fit_prior_strength, shrinkage_values
from learning_jobs import TASKS, Data, Job, data_of, larger_critics, make_data, run_in_processes, train_critic
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between
from value_pool import PROBLEM_SEED, STUDENT, Row, load_pool
from values import Bench, CandidateTruths, Scheme, estimate, shuffle, state_of


PACKAGES = ("torch", "transformers", "trl", "datasets", "numpy")
NUMBERS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # completions of a state, with reuse
STYLES = {  # colours of Paul Tol's "bright" scheme
    "monte_carlo": ("#000000", "o", "Monte Carlo"),
    "critic": ("#228833", "s", "critic"),
    "shrinkage": ("#ee6677", "D", "shrinkage"),
}
LARGER = Job("arithmetic", 0, "larger_critics", "test", data=larger_critics(TASKS["arithmetic"]))
COLUMNS = ("mc_successes", "mc_rollouts", "counts")


class Candidates:
    """
    Candidates of runs with some number of completions, and what they are truly worth. C candidates of all runs.

    Args:
        bench ([`~values.Bench`]):
            Pool and halves.
        number (`int`):
            Completions of a state.
        repeats (`int`):
            Runs.
    """

    def __init__(self, bench: Bench, number: int, repeats: int) -> None:
        scheme = Scheme("reuse", number)
        truths = CandidateTruths(bench.pool, bench.tokenizer)
        problems = list(dict.fromkeys(bench.pool.problems))
        self.rows: list[Row] = []
        found, self.keys = [], []
        tokens_S = np.zeros(len(bench.pool.prefixes))
        for repeat in range(repeats):
            run = shuffle(bench.pool, repeat)
            _, tokens, rows = estimate(scheme, bench.pool, bench.pool.rows, bench.tokenizer, run.order_SN)
            tokens_S += tokens / repeats
            for row in rows:
                self.rows.append(row)
                for column, truth in truths.with_places(row, run):
                    cells = [row[name][column] for name in COLUMNS]
                    found.append([*cells, *truth[3:5], problems.index(row["problem_id"])])
                    self.keys.append((state_of(row), tuple(row["candidates_ids"][column])))
        self.k, self.n, self.counts, self.truth, self.variance, problem = np.array(found, dtype=np.float64).T
        self.problem = problem.astype(int)
        in_report = np.isin(bench.problem_S, bench.picks["report"])
        self.tokens = float(tokens_S[in_report].mean())

    def errors(self, values: np.ndarray, counts: bool, weights_P: np.ndarray) -> float:
        """Mean squared error, where each problem counts as often as its weight says."""
        w = weights_P[self.problem] * (self.counts if counts else 1.0)
        return float(np.average((values - self.truth) ** 2 - self.variance, weights=w))


def pooled_critic(data: list[Data], folder: Path) -> Path:
    """A critic trained as in the demo, but on the problems of several runs."""
    if (folder / "config.json").exists():
        return folder
    solutions = []
    for each in data:
        held_out = held_out_problems(each.problem_ids())
        seen = each.kept_solutions().filter(lambda row, held_out=held_out: row["problem_id"] not in held_out)
        solutions.append(seen)
    trainer = train_critic(concatenate_datasets(solutions), data[0].task, folder)
    trainer.save_model()
    return folder


def critic_values(critics: list[Path], rows: list[Row]) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Values of all candidates by a critic, or the mean of several, each state once."""
    different = {(state_of(row), *map(tuple, row["candidates_ids"])): row for row in rows}
    states = Dataset.from_list(list(different.values()))
    valued = []
    for critic in critics:
        config = StepCriticConfig(str(critic), use_cpu=True, bf16=False, report_to="none", max_length=None)
        tokenizer = AutoTokenizer.from_pretrained(critic)
        trainer = StepCriticTrainer(model=str(critic), args=config, processing_class=tokenizer)
        valued.append(trainer.predict_values(states))
    return {
        (state_of(row), tuple(ids)): value
        for row in mean_values(valued)
        for ids, value in zip(row["candidates_ids"], row["critic_values"], strict=True)
    }


def measure(bench: Bench, critics: list[list[Path]], repeats: int) -> dict[str, Any]:
    """Errors of the estimators at each number of completions, over critics and problems."""
    sets = [Candidates(bench, number, repeats) for number in NUMBERS]
    rows = [row for candidates in sets for row in candidates.rows]
    known = [critic_values(several, rows) for several in critics]
    ones = np.zeros(len(bench.picks["search"]) + len(bench.picks["report"]))
    ones[bench.picks["report"]] = 1
    rng, size = np.random.default_rng(0), len(bench.picks["report"])
    draws = [np.bincount(rng.choice(bench.picks["report"], size), minlength=len(ones)) for _ in range(500)]
    found: dict[str, Any] = {"critics": len(critics), "points": {}}
    for name, is_weighted in (("drawn", True), ("unique", False)):
        curves = {each: _curve(sets, known, bench, each, is_weighted, [ones, *draws]) for each in STYLES}
        found["points"][name] = {
            each: [
                {"num_completions": number, "tokens": candidates.tokens, "error": curve[0], "interval": _ends(curve)}
                for number, candidates, curve in zip(NUMBERS, sets, errors, strict=True)
            ]
            for each, errors in curves.items()
        }
        found["points"][name]["saved"] = _saved([c.tokens for c in sets], curves)
    return found


def _curve(
    sets: list[Candidates], known: list[dict], bench: Bench, name: str, is_weighted: bool, weights: list[np.ndarray]
) -> list[list[float]]:
    """Errors at each number of completions: a list over resamples, the mean over critics."""
    curve = []
    for candidates in sets:
        values = _values(candidates, known, bench, name)
        errors = [[candidates.errors(one, is_weighted, w) for w in weights] for one in values]
        curve.append(np.mean(errors, axis=0).tolist())
    return curve


def _values(candidates: Candidates, known: list[dict], bench: Bench, name: str) -> list[np.ndarray]:
    if name == "monte_carlo":
        return [candidates.k / candidates.n]
    prior = [np.array([of_critic[key] for key in candidates.keys]) for of_critic in known]
    if name == "critic":
        return prior
    fitted = np.isin(candidates.problem, bench.picks["search"])
    k, n = candidates.k, candidates.n
    whole = fitted & (k == np.round(k))
    return [shrinkage_values(k, n, v, fit_prior_strength(k[whole], n[whole], v[whole])).values for v in prior]


def _saved(tokens: list[float], curves: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """
    Share of the tokens of `monte_carlo` that `shrinkage` does without, at its own error at each number. Where
    `monte_carlo` does not come to this error, it is a bound: at least so many.
    """
    saved = []
    for number, own, errors in zip(NUMBERS, tokens, curves["shrinkage"], strict=True):
        needed = [
            tokens_needed(error, tokens, [point[draw] for point in curves["monte_carlo"]])
            for draw, error in enumerate(errors)
        ]
        shares = [1 - own / (tokens[-1] if each is None else each) for each in needed]
        saved.append({"num_completions": number, "share": shares[0], "is_bound": needed[0] is None})
        saved[-1]["interval"] = _ends(shares)
    return saved


def tokens_needed(error: float, tokens: list[float], curve: list[float]) -> float | None:
    """
    Fewest tokens at which a curve has come down to an error, straight lines between its points in the logarithms; none
    if it does not. An error above that of the first point needs so many tokens at most.
    """
    if error >= curve[0]:
        return tokens[0]
    below = [place for place, point in enumerate(curve) if point <= error]
    if not below:
        return None
    ends = slice(below[0] - 1, below[0] + 1)
    x, y = np.log(curve[ends])[::-1], np.log(tokens[ends])[::-1]
    return float(np.exp(np.interp(np.log(error), x, y)))


def _ends(draws: list[float]) -> list[float]:
    return np.quantile(draws, (0.025, 0.975)).tolist()


# ---- Report ----


def table(results: dict[str, Any], weighting: str) -> str:
    titles = ["completions of a state", "tokens a state", "Monte Carlo"]
    for critic in ("critic", "three larger critics", "critic of all runs"):
        titles += [critic, "shrinkage with it", "tokens that it saves at its error"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    demo, *others = (results[name]["points"][weighting] for name in ("demo", "larger", "pooled"))
    for row, number in enumerate(NUMBERS):
        cells = [f"{demo[name][row]['error']:.4f}" for name in STYLES] + [_share(demo["saved"][row])]
        for other in others:
            cells += [f"{other[name][row]['error']:.4f}" for name in ("critic", "shrinkage")]
            cells.append(_share(other["saved"][row]))
        lines.append(f"| {number} | {demo['monte_carlo'][row]['tokens']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(saved: dict[str, Any]) -> str:
    low, high = saved["interval"]
    if saved["is_bound"]:
        bound = f", {saved['share']:.0%} at least" if saved["share"] > 0 else ""
        return f"not reached{bound}" + (f" ({low:.0%} and more)" if low < saved["share"] else "")
    return f"{saved['share']:.0%} ({low:.0%} to {high:.0%})"


def details(record: dict[str, Any]) -> str:
    tables = {name: table(record["results"], name) for name in ("drawn", "unique")}
    return (
        f"{origin_in_words(record)} Mean "
        "squared error of candidates' values on 40 problems; means over "
        f'{record["results"]["demo"]["critics"]} critics. "Not reached": Monte Carlo with '
        f"{NUMBERS[-1]} completions has a larger error; at least the rest of its tokens is saved.\n\n"
        f"Each candidate as often as it was drawn (`duplicate_weights: counts`, as in the demo):\n\n{tables['drawn']}"
        f"\n\nEach candidate once (`uniform`, as in the paper):\n\n{tables['unique']}"
    )


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for critics, dashes, of in (("demo", "-", ""), ("larger", ":", ", three larger"), ("pooled", "--", " of all runs")):
        for name, (color, marker, title) in STYLES.items():
            if critics != "demo" and name == "monte_carlo":
                continue
            points = results[critics]["points"]["drawn"][name]
            tokens, errors = [point["tokens"] for point in points], [point["error"] for point in points]
            bars = np.abs(np.transpose([point["interval"] for point in points]) - errors)
            style = {"color": color, "marker": marker, "linestyle": dashes}
            axis.errorbar(tokens, errors, bars, markersize=5, capsize=2, label=title + of, **style)
    axis.set(xscale="log", yscale="log", xlabel="generated tokens per state")
    axis.set_ylabel("mean squared error of a candidate's value")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num_problems", type=int, default=80)
    parser.add_argument("--num_truth", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Of the critics.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "values")
    parser.add_argument("--critics_dir", type=Path, default=REPOSITORY / "runs" / "learning" / "arithmetic")
    given = parser.parse_args()
    data = [Data(TASKS["arithmetic"], seed, given.critics_dir / f"seed-{seed}") for seed in given.seeds]
    larger = []
    for seed in given.seeds:
        found = data_of(replace(LARGER, seed=seed), given.critics_dir)
        larger.append(replace(found, folder=given.critics_dir / found.folder.name))
    for each in (data, larger):
        run_in_processes(make_data, [(one,) for one in each], 2)
    bench = Bench(load_pool(given), AutoTokenizer.from_pretrained(STUDENT))
    record = {
        **origin(command_line(), PACKAGES),
        "seeds": {"problems": PROBLEM_SEED, "critics": given.seeds, "draws": "the number of the run", "bootstrap": 0},
        "results": {
            "demo": measure(bench, [[each.run / "critic"] for each in data], given.repeats),
            "larger": measure(bench, [critic_folders(each.run) for each in larger], given.repeats),
            "pooled": measure(bench, [[pooled_critic(data, given.critics_dir / "pooled")]], given.repeats),
        },
    }
    keep(record, "estimators")
    draw(record["results"], REPOSITORY / "docs" / "images" / "estimators.png")
    write_between(REPOSITORY / "benchmarks" / "README.md", "estimators", details(record))
    print(details(record))


if __name__ == "__main__":
    main()
