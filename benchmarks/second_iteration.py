"""
Values in the second iteration: mean squared error against fresh completions, from these alone, or also from what the
first iteration left.

    python benchmarks/second_iteration.py [--seeds 0 1 2 3 4] [--repeats 10]

The first iteration is the demo's, with anchor states as there and the smaller steps of `iterations.py`: it leaves a
critic, and outcomes of the student's completions. The second policy solves validation problems that neither has been
trained on, and of every state of its kept solutions 192 completions are sampled. A run takes n of the first 64 as fresh
ones and is compared with the mean of the others, whose own variance is subtracted. Of the same problems the student's
completions, 8 of a state as in the demo, are what the first iteration knows of states that recur.

One half of the problems fits the strength of the critic as a prior; errors are those of the other half. Intervals are
Student's t over seeds: of the first iteration's draws, its critic, and the second policy. Writes
`benchmarks/results/second_iteration.json` and the table in `benchmarks/README.md`.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from dapo_trl import StepCriticConfig, StepCriticTrainer, math_reward
from dapo_trl.earlier_outcomes import batch_values, fit_shift, kernel_weights, shifted_values
from dapo_trl.files import temporary_file
from dapo_trl.rollouts import sample_solutions, value_solutions
from dapo_trl.shrinkage import fit_prior_strength, shrinkage_values
from estimators import tokens_needed
from iterations import STEPS
from learning_jobs import TASKS, Data, make_data, run_in_processes
from learning_methods import train_policy
from recording import REPOSITORY, command_line, interval, keep, origin, origin_in_words, write_between
from value_pool import (
    NUM_DRAWS,
    PROBLEM_SEED,
    SAMPLING,
    Pool,
    load_engine,
    make_problems,
    rollout_config,
    sample_pool,
    state_prefixes,
)


PACKAGES = ("torch", "transformers", "trl", "datasets", "numpy")
NUMBERS = (2, 4, 8, 16, 32)  # fresh completions of a state
BANDWIDTHS = {"kernel": 1.0, "kernel, all alike": np.inf}  # of two iterations: the first counts half, or fully
TITLES = {
    "monte_carlo": "Monte Carlo, fresh completions alone",
    "shrinkage": "shrinkage towards the first critic",
    "kernel": "KAE, h = 1: outcomes of the first iteration count half",
    "kernel, all alike": "KAE, h infinite: they count fully",
    "kernel and shrinkage": "KAE (h = 1) and shrinkage",
    "critic": "the first critic's values, as they are",
    "shifted critic": "BASIS: the first critic's values, shifted by c (`later_critics: shift`)",
    "batch critic": "BASIS: these, and the batch's ratio",
    "shifted critic and shrinkage": "shrinkage towards the first critic's values, shifted by c",
    "table": "the first iteration's values, as they are: its outcomes shrunk towards its critic",
    "shifted table": "BASIS: the first iteration's values, shifted by c",
    "batch": "BASIS: shifted, and the batch's ratio",
    "shifted and shrinkage": "shrinkage towards BASIS's shifted values",
    "all": "KAE (h = 1) and shrinkage towards the critic's values, shifted by c",
}
SHOWN = (2, 8)  # of these the share of Monte Carlo's tokens is in the table
Prefix = tuple[int, ...]


class States(NamedTuple):
    """What is known of S states of the second policy's solutions."""

    rewards_SN: np.ndarray
    tokens_SN: np.ndarray
    first_2S: np.ndarray  # successes and rollouts of the first iteration
    table_S: np.ndarray  # its critic's values
    problem_S: np.ndarray


# ---- What the first iteration leaves ----


def first_outcomes(num_problems: int, seed: int) -> dict[Prefix, tuple[float, int]]:
    """
    Successes and rollouts of the student, of all states and next steps that it came by.

    With draws of their own, as iterations have: with those of the second policy it would come by the same solutions.
    """
    engine, config = load_engine(), rollout_config(num_completions=8, seed=1_000_003 * (seed + 1))
    rows, _ = sample_solutions(problems_of(num_problems), engine, math_reward, config)
    tables, _ = value_solutions(rows, engine, math_reward, config)
    known: dict[Prefix, tuple[float, int]] = {}
    for row in tables["states"]:
        start = (*row["prompt_ids"], *(token for step in row["prefix_ids"] for token in step))
        for step, *outcomes in zip(row["candidates_ids"], row["mc_successes"], row["mc_rollouts"], strict=True):
            known[*start, *step] = tuple(outcomes)
    for row in tables["solutions"]:
        counts = zip(row["mc_successes"], row["mc_rollouts"], strict=True)
        known |= dict(zip(state_prefixes(row), counts, strict=False))
    return known


def problems_of(number: int) -> list[dict[str, Any]]:
    return make_problems("validation", number, PROBLEM_SEED)


def critic_table(critic: Path, pool: Pool) -> dict[Prefix, float]:
    """Values of all states by a critic."""
    config = StepCriticConfig(str(critic), use_cpu=True, bf16=False, report_to="none", max_length=None)
    tokenizer = AutoTokenizer.from_pretrained(critic)
    trainer = StepCriticTrainer(model=str(critic), args=config, processing_class=tokenizer)
    valued = trainer.predict_values(Dataset.from_list(pool.solutions))
    return {
        prefix: value
        for row in valued
        for prefix, value in zip(state_prefixes(row), row["critic_values"], strict=False)
    }


def second_states(seed: int, given: argparse.Namespace) -> States:
    """The second policy's states; kept on disk, as sampling them takes long."""
    path = given.output_dir / f"seed-{seed}-{given.num_problems}.npz"
    if not path.exists():
        data = Data(TASKS["arithmetic"], seed, given.data_dir / f"seed-{seed}")
        engine = train_policy("critic", data, dict(STEPS)).engine
        pool = sample_pool(engine, given.num_problems, given.num_truth)
        first, table = first_outcomes(given.num_problems, seed), critic_table(data.run / "critic", pool)
        lengths = np.array([len(completion.ids) for completion in pool.completions])
        states = States(
            pool.rewards_SN,
            lengths[pool.numbers_SN],
            np.array([first.get(prefix, (0.0, 0)) for prefix in pool.prefixes]).T,
            np.array([table[prefix] for prefix in pool.prefixes]),
            np.unique(pool.problems, return_inverse=True)[1],
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **states._asdict())
    with np.load(path) as arrays:
        return States(*(arrays[name] for name in States._fields))


# ---- Estimators ----


def estimates(states: States, k_S: np.ndarray, n_S: np.ndarray, fitted_S: np.ndarray) -> dict[str, np.ndarray]:
    """Values of all states by each estimator, from k successes in n fresh completions."""
    first_k, first_n = states.first_2S
    critic = states.table_S
    strength = fit_prior_strength(first_k[fitted_S], first_n[fitted_S], critic[fitted_S])
    table = shrinkage_values(first_k, first_n, critic, strength).values
    shifted, shifted_critic = (shifted_values(each, fit_shift(each, k_S, n_S)) for each in (table, critic))
    older = {name: kernel_weights(2, bandwidth)[0] for name, bandwidth in BANDWIDTHS.items()}
    pooled = {name: (k_S + weight * first_k, n_S + weight * first_n) for name, weight in older.items()}

    def shrunk(prior: np.ndarray, k: np.ndarray = k_S, n: np.ndarray = n_S) -> np.ndarray:
        strength = fit_prior_strength(k_S[fitted_S], n_S[fitted_S], prior[fitted_S])
        return shrinkage_values(k, n, prior, strength).values

    return {
        "monte_carlo": k_S / n_S,
        "shrinkage": shrunk(critic),
        **{name: k / n for name, (k, n) in pooled.items()},
        "kernel and shrinkage": shrunk(critic, *pooled["kernel"]),
        "critic": critic,
        "shifted critic": shifted_critic,
        "batch critic": batch_values(shifted_critic, k_S, n_S, list(states.problem_S)),
        "shifted critic and shrinkage": shrunk(shifted_critic),
        "table": table,
        "shifted table": shifted,
        "batch": batch_values(shifted, k_S, n_S, list(states.problem_S)),
        "shifted and shrinkage": shrunk(shifted),
        "all": shrunk(shifted_critic, *pooled["kernel"]),
    }


def measure(states: States, repeats: int) -> dict[str, Any]:
    """Errors of one seed, of the states of every second problem, and tokens a state."""
    fitted_S = states.problem_S % 2 == 0
    errors = {name: np.zeros(len(NUMBERS)) for name in TITLES}
    tokens = np.zeros(len(NUMBERS))
    for repeat in range(repeats):
        order_SN = np.argsort(np.random.default_rng(repeat).random(states.rewards_SN.shape), axis=1)
        rewards, lengths = (np.take_along_axis(x, order_SN, axis=1) for x in (states.rewards_SN, states.tokens_SN))
        held = rewards[:, NUM_DRAWS:]
        truth, variance = held.mean(axis=1), held.var(axis=1, ddof=1) / held.shape[1]
        for place, number in enumerate(NUMBERS):
            k_S, n_S = rewards[:, :number].sum(axis=1), np.full(len(rewards), number)
            tokens[place] += lengths[~fitted_S, :number].sum(axis=1).mean() / repeats
            for name, values in estimates(states, k_S, n_S, fitted_S).items():
                squared = (values - truth) ** 2 - variance
                errors[name][place] += squared[~fitted_S].mean() / repeats
    curve = errors["monte_carlo"].tolist()
    needed = {name: [tokens_needed(x, tokens.tolist(), curve) for x in errors[name]] for name in TITLES}
    return {
        "states": int((~fitted_S).sum()),
        "recurring": float((states.first_2S[1] > 0)[~fitted_S].mean()),
        "moved": float((states.rewards_SN.mean(axis=1) - states.table_S)[~fitted_S].mean()),
        "tokens": tokens.tolist(),
        "errors": {name: found.tolist() for name, found in errors.items()},
        # of Monte Carlo's tokens at the same error; where it does not come to it, those that were measured at least
        "share": {
            name: [own / (tokens[-1] if each is None else each) for own, each in zip(tokens, found, strict=True)]
            for name, found in needed.items()
        },
        "is_bound": {name: [each is None for each in found] for name, found in needed.items()},
    }


# ---- Report ----


def _spread(numbers: list[float], digits: int) -> str:
    mean, half = interval(numbers)  # in points
    return f"{mean / 100:.{digits}f} ± {half / 100:.{digits}f}"


def _share(seeds: dict[str, dict[str, Any]], name: str, place: int) -> str:
    """Fresh tokens, of those that Monte Carlo needs for the same error; if it does not come to it, at most so many."""
    runs = list(seeds.values())
    if all(run["errors"][name][place] > max(run["errors"]["monte_carlo"]) for run in runs):
        return "more error than any"
    shares = _spread([100 * run["share"][name][place] for run in runs], 0)
    return f"{shares}%" + (" at most" if any(run["is_bound"][name][place] for run in runs) else "")


def table(seeds: dict[str, dict[str, Any]]) -> str:
    titles = ["values", *(f"error, {number} fresh" for number in NUMBERS)]
    titles += [f"of the tokens of Monte Carlo at its error, {number} fresh" for number in SHOWN]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, title in TITLES.items():
        cells = [_spread([run["errors"][name][i] for run in seeds.values()], 4) for i in range(len(NUMBERS))]
        cells += [_share(seeds, name, NUMBERS.index(number)) for number in SHOWN]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def details(record: dict[str, Any]) -> str:
    runs = record["seeds"]
    recurring = np.mean([run["recurring"] for run in runs.values()])
    moved = np.mean([run["moved"] for run in runs.values()])
    return (
        f"{origin_in_words(record)} Seeds {', '.join(runs)}; "
        f"{np.mean([run['states'] for run in runs.values()]):.0f} states a seed, of which the first iteration has "
        f"outcomes of {recurring:.0%}; success is {100 * moved:.0f} points "
        f"higher in them than the first critic says.\n\n{table(runs)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num_problems", type=int, default=60)
    parser.add_argument("--num_truth", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "second-iteration")
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "runs" / "learning" / "arithmetic")
    given = parser.parse_args()
    data = [Data(TASKS["arithmetic"], seed, given.data_dir / f"seed-{seed}") for seed in given.seeds]
    run_in_processes(make_data, [(each,) for each in data], 2)
    record = {
        **origin(command_line(), PACKAGES),
        "problems": PROBLEM_SEED,
        "steps": STEPS,
        "max_new_tokens": SAMPLING.max_new_tokens,
        "seeds": {str(seed): measure(second_states(seed, given), given.repeats) for seed in given.seeds},
    }
    keep(record, "second_iteration")
    write_between(REPOSITORY / "benchmarks" / "README.md", "second_iteration", details(record))
    print(details(record))


if __name__ == "__main__":
    main()
