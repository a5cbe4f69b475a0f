"""
How many generated tokens a value costs: mean squared error of Monte Carlo values against tokens, scheme by scheme.

    python benchmarks/values.py [--num_problems 80] [--num_truth 512] [--search_repeats 6] [--repeats 20]

The student of `examples/student` solves problems of the validation split, and of every state of the kept solutions
`num_truth` completions are sampled once. A run of a scheme then takes its completions from this pool, without
replacement, instead of the model: what the library does with them, and how many tokens they have, is the same. Each run
draws from 64 completions of a state, chosen anew, and is compared with the mean of the others, whose own variance is
subtracted; so the error is that against the true value, without bias. One half of the problems chooses the settings,
the other half reports. Writes `benchmarks/results/values.json`, `docs/images/values_budget.png` and the table in
`benchmarks/README.md`.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from dapo_trl import math_reward
from dapo_trl.rollouts import RolloutConfig, value_solutions
from dapo_trl.steps import split_step_ids
from recording import REPOSITORY, command_line, keep, origin, write_between
from value_pool import (
    NUM_DRAWS,
    PROBLEM_SEED,
    STUDENT,
    Pool,
    PoolEngine,
    Row,
    load_pool,
    rollout_config,
    state_prefixes,
)
from value_report import details, draw, table


# Shape legend: S states of the kept solutions, N completions of each in the pool, P problems, B bins of values.

PACKAGES = ("torch", "transformers", "trl", "datasets", "numpy")


# ---- Schemes ----


@dataclass(frozen=True)
class Scheme:
    """
    A way to spend completions.

    Attributes:
        family (`str`):
            `"own"` takes n completions of every state and the mean of these; `"counted"` draws the same and counts
            what passes through a state as well; `"reuse"` draws only what is missing; `"reuse, adaptive"` and
            `"adaptive"` stop by the rule.
        maximum (`int`):
            `num_completions` of [`RolloutConfig`].
        minimum (`int`, *optional*):
            Its `min_completions`.
        precision (`float`, *optional*, defaults to `0.15`):
            Its `precision`.
    """

    family: str
    maximum: int
    minimum: int | None = None
    precision: float = 0.15

    @property
    def config(self) -> RolloutConfig:
        """Numbers for the library."""
        return rollout_config(
            num_completions=self.maximum,
            min_completions=self.minimum,
            precision=self.precision,
            reuse=self.family.startswith("reuse"),
        )

    @property
    def is_adaptive(self) -> bool:
        """Whether any outcomes let a state stop before it has all of its completions."""
        rule = self.config.stopping_rule
        return any(rule.is_enough(0, look) for look in rule.looks[:-1])


EXAMPLES = [Scheme("reuse, adaptive", 16, 4, 0.15)]  # the library's own `precision`
PRECISIONS = (0.08, 0.1, 0.12, 0.14, 0.16, 0.2)
REFERENCE = Scheme("own", 16)
BASELINE = [Scheme("own", number) for number in (2, 4, 8, 16, 32, 64)]
FIXED = [Scheme("counted", number) for number in (2, 4, 8, 16)]
FIXED += [Scheme("reuse", number) for number in (2, 4, 8, 16, 32)]
GRID = [
    scheme
    for family in ("reuse, adaptive", "adaptive")
    for minimum, maximum, precision in itertools.product((2, 4, 8), (8, 16, 24, 32), PRECISIONS)
    if minimum < maximum and (scheme := Scheme(family, maximum, minimum, precision)).is_adaptive
]
ADAPTIVE = ("reuse, adaptive", "reuse, adaptive: plain mean", "adaptive", "adaptive: plain mean")


@dataclass
class Shuffle:
    """
    What one run may draw, and what it is compared with.

    Attributes:
        order_SN (`np.ndarray`):
            A random order of the completions of each state; the first 64 are to be drawn.
        truth_S (`np.ndarray`):
            Mean outcome of the others.
        variance_S (`np.ndarray`):
            Unbiased estimate of that mean's variance.
        halves_2S (`np.ndarray`):
            Mean outcome of either half of the others.
    """

    order_SN: np.ndarray
    truth_S: np.ndarray
    variance_S: np.ndarray
    halves_2S: np.ndarray


def shuffle(pool: Pool, repeat: int) -> Shuffle:
    rng = np.random.default_rng(repeat)
    order_SN = np.argsort(rng.random(pool.rewards_SN.shape), axis=1)
    held_SN = np.take_along_axis(pool.rewards_SN, order_SN[:, NUM_DRAWS:], axis=1)
    halves = np.stack([half.mean(axis=1) for half in np.array_split(held_SN, 2, axis=1)])
    return Shuffle(order_SN, held_SN.mean(axis=1), held_SN.var(axis=1, ddof=1) / held_SN.shape[1], halves)


def estimate(
    scheme: Scheme, pool: Pool, rows: list[Row], tokenizer: Any, order_SN: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, list[Row]]:
    """
    Run a scheme on the problems of some rows.

    Returns:
        `tuple[dict[str, np.ndarray], np.ndarray, list[dict]]`: values of the states by estimator, NaN where there is
        none; tokens drawn from each; the state rows.
    """
    engine = PoolEngine(pool, tokenizer, order_SN)
    if scheme.family == "own":
        for prefix in pool.prefixes:
            engine.generate([prefix], [range(scheme.maximum)], None)
        drawn_SN = np.take_along_axis(pool.rewards_SN, order_SN[:, : scheme.maximum], axis=1)
        return {scheme.family: drawn_SN.mean(axis=1)}, engine.tokens_S, []
    tables, _ = value_solutions(rows, engine, math_reward, scheme.config)
    values = {name: np.full(len(pool.prefixes), np.nan) for name in (scheme.family, f"{scheme.family}: plain mean")}
    row_of = {prefix: row for row, prefix in enumerate(pool.prefixes)}
    for solution in tables["solutions"]:
        states = [row_of[prefix] for prefix in state_prefixes(solution)]
        columns = (np.array(solution[name][: len(states)]) for name in ("values", "mc_successes", "mc_rollouts"))
        value, successes, rollouts = columns
        values[scheme.family][states] = value
        values[f"{scheme.family}: plain mean"][states] = successes / rollouts
    if scheme.minimum is None:
        del values[f"{scheme.family}: plain mean"]  # it is the value
    return values, engine.tokens_S, tables["states"]


# ---- Measuring ----

# True values between which errors are averaged with their sign.
EDGES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


class Tally:
    """
    Errors and tokens of one estimator, by problem.

    Args:
        problem_S (`np.ndarray`):
            Number of each state's problem.
        weights_S (`np.ndarray`):
            Kept solutions that pass through each state.
    """

    def __init__(self, problem_S: np.ndarray, weights_S: np.ndarray) -> None:
        self._problem_S, self._weights_S = problem_S, weights_S
        self._num_problems = int(problem_S.max()) + 1
        self.errors_P, self.weights_P, self.tokens_P, self.states_P = np.zeros((4, self._num_problems))
        self.signed_PB, self.signed_weights_PB = np.zeros((2, self._num_problems, len(EDGES) - 1))

    def add(self, values_S: np.ndarray, tokens_S: np.ndarray, run: Shuffle) -> None:
        """Note a run. States of problems that it left out are NaN."""
        done = ~np.isnan(values_S)
        problem, weights = self._problem_S[done], self._weights_S[done]
        errors = (values_S - run.truth_S) ** 2 - run.variance_S
        self.errors_P += self._sum(problem, weights * errors[done])
        self.weights_P += self._sum(problem, weights)
        self.tokens_P += self._sum(problem, tokens_S[done])
        self.states_P += self._sum(problem, np.ones(len(problem)))
        # One half says which bin a state belongs to, the other how far off its value is.
        bins = np.digitize(run.halves_2S[0][done], EDGES[1:-1], right=True)
        signed = weights * (values_S - run.halves_2S[1])[done]
        np.add.at(self.signed_PB, (problem, bins), signed)
        np.add.at(self.signed_weights_PB, (problem, bins), weights)

    def _sum(self, problem: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return np.bincount(problem, numbers, minlength=self._num_problems)

    def error(self, picks: np.ndarray) -> np.ndarray:
        """Mean squared error over some problems: the last dimension of `picks`."""
        return self.errors_P[picks].sum(-1) / self.weights_P[picks].sum(-1)

    def tokens(self, picks: np.ndarray) -> np.ndarray:
        """Mean tokens of a state, over some problems."""
        return self.tokens_P[picks].sum(-1) / self.states_P[picks].sum(-1)

    def bias(self, picks: np.ndarray) -> np.ndarray:
        """Mean signed error by bin, over some problems."""
        return self.signed_PB[picks].sum(-2) / np.maximum(self.signed_weights_PB[picks].sum(-2), 1)


Tallies = dict[tuple[Scheme, str], Tally]


class Bench:
    """
    Runs schemes on halves of the problems.

    Args:
        pool ([`Pool`]):
            The completions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that sampled them.
    """

    def __init__(self, pool: Pool, tokenizer: Any) -> None:
        self.pool, self.tokenizer = pool, tokenizer
        names = list(dict.fromkeys(pool.problems))
        self.problem_S = np.array([names.index(name) for name in pool.problems])
        self.halves = {"search": names[::2], "report": names[1::2]}
        self.picks = {half: np.array([names.index(name) for name in chosen]) for half, chosen in self.halves.items()}
        passing = [prefix for solution in pool.solutions for prefix in state_prefixes(solution)]
        row_of = {prefix: row for row, prefix in enumerate(pool.prefixes)}
        self.weights_S = np.bincount([row_of[prefix] for prefix in passing], minlength=len(pool.prefixes))

    def run(self, schemes: Sequence[Scheme], half: str, repeats: int) -> Tallies:
        """Tallies of every estimator of the schemes on a half of the problems."""
        rows = [row for row in self.pool.rows if row["problem_id"] in self.halves[half]]
        tallies: Tallies = {}
        for repeat in range(repeats):
            run = shuffle(self.pool, repeat)
            for scheme in schemes:
                values, tokens_S, _ = estimate(scheme, self.pool, rows, self.tokenizer, run.order_SN)
                for name, values_S in values.items():
                    tally = tallies.setdefault((scheme, name), Tally(self.problem_S, self.weights_S))
                    tally.add(values_S, tokens_S, run)
            print(f"{half}: repeat {repeat + 1} of {repeats}", flush=True)
        return tallies

    def candidates(self, scheme: Scheme, half: str, repeats: int) -> dict[str, Any]:
        """Errors of the candidates' values: those of the library, and plain means."""
        rows = [row for row in self.pool.rows if row["problem_id"] in self.halves[half]]
        truths = CandidateTruths(self.pool, self.tokenizer)
        found, number = [], 0
        for repeat in range(repeats):
            run = shuffle(self.pool, repeat)
            for row in estimate(scheme, self.pool, rows, self.tokenizer, run.order_SN)[2]:
                number += sum(reward is None for reward in row["rewards"])
                found += truths.compare(row, run)
        return candidate_errors(np.array(found)) | {"per_run": number / repeats, "covered": len(found) / number}


def state_of(row: Row) -> tuple[int, ...]:
    """Token ids of a state row's state."""
    return (*row["prompt_ids"], *(token for step in row["prefix_ids"] for token in step))


class CandidateTruths:
    """True values of candidates: from the completions that begin with them and that no run may draw."""

    least = 4  # completions that a truth needs

    def __init__(self, pool: Pool, tokenizer: Any) -> None:
        self._row_of = {prefix: row for row, prefix in enumerate(pool.prefixes)}
        self._steps: dict[tuple[int, ...], int] = {}
        firsts = [tuple(split_step_ids(c.ids, tokenizer)[0]) for c in pool.completions]
        numbers = np.array([self._steps.setdefault(step, len(self._steps)) for step in firsts])
        self._first_SN, self._rewards_SN = numbers[pool.numbers_SN], pool.rewards_SN

    def compare(self, row: Row, run: Shuffle) -> Iterator[tuple[float, ...]]:
        """Value, plain mean, count, and mean, variance and either half's mean of the truth, of each candidate."""
        return (truth for _, truth in self.with_places(row, run))

    def with_places(self, row: Row, run: Shuffle) -> Iterator[tuple[int, tuple[float, ...]]]:
        """The same, with the candidate's place in its row. Those that end the solution are left out."""
        held = run.order_SN[self._row_of[state_of(row)], NUM_DRAWS:]
        columns = ("values", "mc_successes", "mc_rollouts", "counts", "candidates_ids", "rewards")
        cells = zip(*(row[name] for name in columns), strict=True)
        for place, (value, successes, rollouts, count, ids, reward) in enumerate(cells):
            outcomes = self._outcomes(state_of(row), tuple(ids), held, run)
            if reward is None and len(outcomes) >= self.least:
                truth = (
                    outcomes.mean(),
                    outcomes.var(ddof=1) / len(outcomes),
                    *(outcomes[i::2].mean() for i in (0, 1)),
                )
                yield place, (value, successes / rollouts, count, *truth)

    def _outcomes(self, prefix: tuple[int, ...], step: tuple[int, ...], held: np.ndarray, run: Shuffle) -> np.ndarray:
        child = self._row_of.get(prefix + step)
        if child is not None:
            return self._rewards_SN[child, run.order_SN[child, NUM_DRAWS:]]
        row = self._row_of[prefix]
        return self._rewards_SN[row, held[self._first_SN[row, held] == self._steps.get(step, -1)]]


def candidate_errors(found: np.ndarray) -> dict[str, Any]:
    """Mean squared and signed errors over candidates, and with each as often as it was drawn."""
    counts, truth, variance, half, other = found[:, 2:].T
    bins = np.digitize(half, EDGES[1:-1], right=True)
    results: dict[str, Any] = {}
    for name, values in (("values", found[:, 0]), ("plain mean", found[:, 1])):
        errors, signed = (values - truth) ** 2 - variance, values - other
        results[name] = {
            "error": errors.mean(),
            "error_by_count": np.average(errors, weights=counts),
            "bias": signed.mean(),
            "bias_by_bin": [
                float(signed[bins == b].mean()) if (bins == b).any() else None for b in range(len(EDGES) - 1)
            ],
        }
    return results


# ---- Comparing ----


def baseline_tokens(tallies: Tallies, error: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Tokens of a state at which the baseline has an error, interpolated between its numbers of completions."""
    curve = [tallies[scheme, "own"] for scheme in reversed(BASELINE)]
    errors = np.log(np.stack([tally.error(picks) for tally in curve], axis=-1))
    tokens = np.log(np.stack([tally.tokens(picks) for tally in curve], axis=-1))
    shape = np.shape(error)
    flat = zip(np.log(error).reshape(-1), errors.reshape(-1, len(curve)), tokens.reshape(-1, len(curve)), strict=True)
    return np.exp([np.interp(*one) for one in flat]).reshape(shape)


def saving(tallies: Tallies, key: tuple[Scheme, str], picks: np.ndarray) -> np.ndarray:
    """Share of the baseline's tokens that a scheme does without, at its own error."""
    return 1 - tallies[key].tokens(picks) / baseline_tokens(tallies, tallies[key].error(picks), picks)


def front(tallies: Tallies, name: str, picks: np.ndarray) -> list[Scheme]:
    """Schemes that no other one beats in tokens and error, at least 8% of the tokens apart, by falling error."""
    points = [(t.tokens(picks), t.error(picks), scheme) for (scheme, own), t in tallies.items() if own == name]
    best: list[tuple[float, float, Scheme]] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not best or (point[1] < best[-1][1] and point[0] > 1.08 * best[-1][0]):
            best.append(point)
    return [scheme for *_, scheme in best]


def best(tallies: Tallies, name: str, picks: np.ndarray) -> Scheme:
    """The scheme that saves most at its own error, which is at most that of 16 completions of every state."""
    limit = tallies[REFERENCE, "own"].error(picks)
    good = [scheme for (scheme, own), t in tallies.items() if own == name and t.error(picks) <= limit]
    return max(good, key=lambda scheme: saving(tallies, (scheme, name), picks))


def tokens_at_reference(tallies: Tallies, curve: list[Scheme], name: str, picks: np.ndarray) -> float | None:
    """Tokens of a state at which a curve has the error of 16 completions of every state; `None` if it has not."""
    points = sorted((float(tallies[s, name].error(picks)), float(tallies[s, name].tokens(picks))) for s in curve)
    errors, tokens = np.log(points).T
    target = np.log(tallies[REFERENCE, "own"].error(picks))
    return float(np.exp(np.interp(target, errors, tokens))) if errors[0] <= target <= errors[-1] else None


def interval(numbers: np.ndarray) -> list[float]:
    """95% interval."""
    return [float(edge) for edge in np.quantile(numbers, (0.025, 0.975))]


def summary(tallies: Tallies, key: tuple[Scheme, str], picks: np.ndarray) -> dict[str, Any]:
    """Tokens and error of a scheme on some problems."""
    tally = tallies[key]
    numbers = {"tokens": float(tally.tokens(picks)), "error": float(tally.error(picks))}
    return asdict(key[0]) | {"estimator": key[1]} | numbers


def describe(tallies: Tallies, key: tuple[Scheme, str], picks: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    """Numbers of a scheme on some problems, with bootstrap intervals over these."""
    tally = tallies[key]
    return summary(tallies, key, picks) | {
        "error_interval": interval(tally.error(resampled)),
        "saving": float(saving(tallies, key, picks)),
        "saving_interval": interval(saving(tallies, key, resampled)),
        "bias_by_bin": tally.bias(picks).tolist(),
        "bias_by_bin_intervals": [interval(bias) for bias in tally.bias(resampled).T],
    }


def measure(pool: Pool, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search for settings on one half of the problems; all results from the other half."""
    bench = Bench(pool, tokenizer)
    searched = bench.run([*BASELINE, *FIXED, *GRID], "search", arguments.search_repeats)
    fronts = {name: front(searched, name, bench.picks["search"]) for name in ADAPTIVE}
    chosen = {name: best(searched, name, bench.picks["search"]) for name in ADAPTIVE}
    named = [*BASELINE, *FIXED, *EXAMPLES, *(scheme for curve in fronts.values() for scheme in curve), *chosen.values()]
    tallies = bench.run(list(dict.fromkeys(named)), "report", arguments.repeats)
    picks = bench.picks["report"]
    resampled = np.random.default_rng(0).choice(picks, (1000, len(picks)))
    curves = {family: [s for s in (*BASELINE, *FIXED) if s.family == family] for family in ("own", "counted", "reuse")}
    curves |= fronts
    compared = [Scheme("counted", 16), Scheme("reuse", 16), Scheme("reuse", 8), chosen["reuse, adaptive"], *EXAMPLES]
    return {
        "states": {half: int(np.isin(bench.problem_S, of_half).sum()) for half, of_half in bench.picks.items()},
        "problems": {half: len(of_half) for half, of_half in bench.picks.items()},
        "edges": EDGES,
        "states_by_bin": np.histogram(pool.rewards_SN.mean(axis=1), EDGES)[0].tolist(),
        "searched": [summary(searched, key, bench.picks["search"]) for key in searched],
        "chosen": {name: describe(tallies, (scheme, name), picks, resampled) for name, scheme in chosen.items()},
        "examples": [describe(tallies, (s, name), picks, resampled) for s in EXAMPLES for name in ADAPTIVE[:2]],
        "curves": {
            name: [describe(tallies, (scheme, name), picks, resampled) for scheme in curve]
            for name, curve in curves.items()
        },
        "tokens_at_reference": {
            name: tokens_at_reference(tallies, curve, name, picks) for name, curve in curves.items()
        },
        "candidates": [
            asdict(scheme) | bench.candidates(scheme, "report", arguments.search_repeats)
            for scheme in dict.fromkeys(compared)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num_problems", type=int, default=80)
    parser.add_argument("--num_truth", type=int, default=512)
    parser.add_argument("--search_repeats", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "values")
    arguments = parser.parse_args()
    pool = load_pool(arguments)
    record = {
        **origin(command_line(), PACKAGES),
        "seeds": {"problems": PROBLEM_SEED, "sampling": 0, "draws": "the number of the run", "bootstrap": 0},
        "arguments": {
            name: getattr(arguments, name) for name in ("num_problems", "num_truth", "search_repeats", "repeats")
        },
        "results": measure(pool, AutoTokenizer.from_pretrained(STUDENT), arguments),
    }
    keep(record, "values")
    draw(record["results"], REPOSITORY / "docs" / "images" / "values_budget.png")
    write_between(REPOSITORY / "benchmarks" / "README.md", "values", details(record))
    print(table(record["results"]))


if __name__ == "__main__":
    main()
