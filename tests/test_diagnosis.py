"""
`diagnosis.py`: what is said of critics whose quality is known.
"""

import json

import numpy as np
import pytest
from datasets import Dataset

from dapo_trl.calibration import draw_calibration
from dapo_trl.cli import main
from dapo_trl.diagnosis import MIN_SKILL, diagnose


def world(critic, seed=0, num_problems=60, rollouts=16, num_steps=4):
    """
    Solution and state rows of random problems, with the values of a critic: a function of true value, depth and a
    random generator.
    """
    rng = np.random.default_rng(seed)
    solutions, states = [], []
    for problem in range(num_problems):
        identity = {"problem_id": f"p{problem}"}
        for number in range(2):
            truth = np.clip(rng.beta(0.7, 0.7, num_steps), 0.02, 0.98)
            reward = float(rng.random() < truth[-1])
            n = np.append(np.full(num_steps, rollouts), 1)
            k = np.append(rng.binomial(rollouts, truth), reward)
            values = [critic(value, depth, rng) for depth, value in enumerate(np.append(truth, reward))]
            steps = [f"{problem} {number} {step}\n" for step in range(num_steps)]
            counted = {"mc_successes": k.tolist(), "mc_rollouts": n.tolist(), "critic_values": values}
            solutions.append(identity | {"completions": steps, "reward": reward} | counted)
        truth = rng.uniform(0.02, 0.98, 3)
        k = rng.binomial(rollouts, truth).tolist()
        values = [critic(value, 1, rng) for value in truth]
        counted = {"mc_successes": k, "mc_rollouts": [rollouts] * 3, "critic_values": values}
        states.append(identity | {"counts": [2, 1, 1]} | counted)
    return solutions, states


def perfect(value, depth, rng):
    return float(value)


def constant(value, depth, rng):
    return 0.5


def inverted(value, depth, rng):
    return float(1 - value)


def random_head(value, depth, rng):
    return float(1 / (1 + np.exp(-rng.normal())))


def noisy(value, depth, rng):
    """As good as a critic usually is."""
    logit = 0.7 * np.log(value / (1 - value)) if 0 < value < 1 else 0.0
    return float(1 / (1 + np.exp(-logit - 1.2 * rng.normal())))


def measured(critic, **kwargs):
    return diagnose(*world(critic, **kwargs), num_resamples=200)


def test_perfect():
    found = measured(perfect)
    assert found.is_fit
    assert found.verdict == "The critic knows something about problems that it has not seen."
    for name in ("skill", "depth_skill", "brier_skill", "depth_brier_skill"):
        assert found.measures[name].low > 0.2
    assert found.measures["calibration_error"].mean < 0.02
    assert found.measures["rank_correlation"].mean > 0.9
    assert found.measures["sibling_ranking"].mean > 0.95
    assert found.measures["advantage_correlation"].mean > 0.9
    assert found.measures["sign_accuracy"].mean > 0.95
    assert found.measures["terminal_bias"].mean == 0
    assert list(found.skill_by_distance) == ["1", "2", "3", "4-5"]
    assert found.num_states == 60 * 7  # the two solutions of a problem share the bare prompt
    assert found.num_rollouts == 60 * 7 * 16


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("critic", [constant, inverted, random_head])
def test_broken_critics_are_found_out(critic, seed):
    found = measured(critic, seed=seed)
    assert not found.is_fit
    assert "do not use it" in found.verdict


@pytest.mark.parametrize("seed", range(10))
def test_working_critics_pass(seed):
    assert measured(noisy, seed=seed).is_fit


def test_depth_alone():
    """A critic that knows only how far along a solution is."""
    rng = np.random.default_rng(0)
    solutions = []
    for problem in range(100):
        reward = float(problem % 2)
        truth = [0.1, 0.9]  # of all problems, by depth
        k = [*rng.binomial(16, truth).tolist(), reward]
        counted = {"mc_successes": k, "mc_rollouts": [16, 16, 1], "critic_values": [*truth, reward]}
        solutions.append({"problem_id": str(problem), "completions": ["a", "b"], "reward": reward} | counted)
    found = diagnose(solutions, num_resamples=100)
    assert found.measures["skill"].low > 0.4
    for name in ("depth_skill", "depth_brier_skill"):
        assert found.measures[name].mean == pytest.approx(0, abs=0.02)
    assert found.verdict == "The critic knows how far along a solution is, and little more: do not use it."
    assert not found.is_fit
    assert "sibling_ranking" not in found.measures


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_problems_alone(seed, noise):
    """
    A critic that tells easy problems from hard ones has skill; to next steps it gives the same value, or any: refused.
    """
    rng = np.random.default_rng(seed)
    solutions, states = [], []
    for problem in range(60):
        identity, level = {"problem_id": str(problem)}, rng.uniform(0.1, 0.9)

        def rows(truth, ends, level=level):
            k = [*rng.binomial(16, truth).tolist(), *ends]
            values = 1 / (1 + np.exp(-np.log(level / (1 - level)) - noise * rng.normal(size=len(k))))
            return {"mc_successes": k, "mc_rollouts": [16] * len(truth) + [1] * len(ends), "critic_values": values}

        truth = np.clip(level + rng.uniform(-0.2, 0.2, 4), 0, 1)
        solutions.append(identity | rows(truth, [1.0]) | {"completions": ["a", "b", "c", "d"], "reward": 1.0})
        for _ in range(2):
            states.append(identity | rows(np.clip(level + rng.uniform(-0.4, 0.4, 3), 0, 1), []) | {"counts": [2, 1, 1]})
    found = diagnose(solutions, states, num_resamples=200)
    assert found.has_skill
    assert found.measures["skill"].low > MIN_SKILL
    assert not found.is_fit
    assert "does not tell the next steps of a state apart" in found.verdict


def test_overconfident():
    """In the right order, but far off: refused, and told what is right about it."""
    found = measured(lambda value, depth, rng: float(0.999 if value > 0.4 else 0.001))
    assert found.measures["skill"].mean < 0
    assert not found.is_fit
    assert "more than 0.1 off on average, though they order next steps better than chance." in found.verdict


def test_far_off():
    """Skilled and in order, but all values are too high by 0.2: refused for that alone, given problems enough."""
    found = measured(lambda value, depth, rng: float(np.clip(value + 0.2, 0.01, 0.99)))
    assert found.measures["skill"].low > MIN_SKILL
    assert found.tells_apart and found.is_far_off and not found.is_fit
    assert found.verdict.startswith("The critic tells states apart, but its values are no probabilities of success")
    assert "though they order next steps better than chance." in found.verdict
    few = measured(lambda value, depth, rng: float(np.clip(value + 0.2, 0.01, 0.99)), num_problems=6)
    assert few.measures["calibration_error"].low > 0.1
    assert few.is_fit


def test_nothing_to_know():
    solutions, states = world(perfect, num_problems=4)
    for row in (*solutions, *states):
        row["mc_successes"] = [float(n) for n in row["mc_rollouts"]]
    found = diagnose(solutions, states, num_resamples=20)
    assert not found.is_fit
    assert found.verdict.startswith("All outcomes are alike")


def test_ties_of_a_constant():
    found = measured(constant)
    for name in ("sibling_ranking", "sign_accuracy"):
        assert found.measures[name].mean == found.measures[name].low == found.measures[name].high == 0.5
    assert found.measures["advantage_correlation"].mean == found.measures["advantage_correlation"].high == 0
    assert "rank_correlation" not in found.measures


def test_bias_at_the_end():
    found = measured(lambda value, depth, rng: 0.75 * value + 0.1)
    rows, _ = world(perfect)
    rewards = [row["reward"] for row in rows]
    assert found.measures["terminal_bias"].mean == pytest.approx(0.1 - 0.25 * np.mean(rewards))


def test_rank_correlation_is_spearmans():
    solutions, _ = world(noisy)
    states = {}
    for row in solutions:
        for depth in range(len(row["completions"])):
            cells = (row["critic_values"][depth], row["mc_successes"][depth] / row["mc_rollouts"][depth])
            states.setdefault((row["problem_id"], *row["completions"][:depth]), cells)
    columns = np.array(list(states.values())).T
    ranks = [[(x < y).sum() + (x == y).sum() / 2 for y in x] for x in columns]
    expected = np.corrcoef(ranks)[0, 1]
    assert diagnose(solutions, num_resamples=2).measures["rank_correlation"].mean == pytest.approx(expected)


def test_advantage_correlation_by_hand():
    """
    Advantages of the outcomes weigh rollouts: the mean of 1/1 and 0/3 is 1/4, so they are 3/4 and -1/4; the critic's
    mean is 0.6 * 1/4 + 0.2 * 3/4 = 0.3, so its are 0.3 and -0.1: proportional. Of the second state they are 1/2 and
    -1/2 (twice, of 2/2 and 0/2), and -0.1 and 0.1. Sums over candidates of n times: products 1 * 0.225 + 3 * 0.025 -
    4 * 0.05 = 0.1; outcomes 0.75 + 1 = 1.75; critic 0.12 + 0.04 = 0.16. The known reward of a third is left out.
    """
    solutions, _ = world(perfect, num_problems=2)
    first = {"mc_successes": [1.0, 0.0, 9.0], "mc_rollouts": [1, 3, 9], "critic_values": [0.6, 0.2, 0.0]}
    second = {"mc_successes": [2.0, 0.0], "mc_rollouts": [2, 2], "critic_values": [0.4, 0.6], "counts": [1, 1]}
    first |= {"problem_id": "p0", "counts": [1, 1, 1], "rewards": [None, None, 1.0]}
    states = [first, second | {"problem_id": "p1"}]
    found = diagnose(solutions, states, num_resamples=2).measures["advantage_correlation"].mean
    assert found == pytest.approx(0.1 / (1.75 * 0.16) ** 0.5)


def test_pairs_by_difference():
    """Every pair is in one bin; those 0.3 apart are the last two."""
    found = measured(noisy)
    pairs = found.pairs_by_difference
    assert list(pairs) == ["0-0.1", "0.1-0.2", "0.2-0.3", "0.3-0.5", "0.5-1"]
    assert 0 < pairs["0.5-1"] < pairs["0.3-0.5"] + pairs["0.5-1"] == found.num_pairs
    ranking = found.ranking_by_difference
    weighed = sum(ranking[name].mean * pairs[name] for name in ("0.3-0.5", "0.5-1")) / found.num_pairs
    assert weighed == pytest.approx(found.measures["sibling_ranking"].mean)
    assert ranking["0-0.1"].mean < ranking["0.5-1"].mean


def test_calibration():
    """Of a perfect critic the intervals hold its values; every state is in one bin."""
    found = measured(perfect, num_problems=200)
    assert sum(part.num_states for part in found.calibration) == found.num_states
    values = [part.value for part in found.calibration]
    assert values == sorted(values)
    missed = [part for part in found.calibration if not part.outcome.low <= part.value <= part.outcome.high]
    assert len(missed) <= 2


def test_the_figure_stops_nothing(tmp_path, caplog):
    bins = measured(noisy).calibration
    draw_calibration(bins, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 5_000
    draw_calibration(bins, tmp_path / "nowhere" / "calibration.png")
    assert "calibration.png could not be drawn: FileNotFoundError" in caplog.text


def test_intervals_cover():
    """Of twenty worlds, at most three intervals miss what a very large one says; the mean of twenty is near it."""
    truth = diagnose(*world(noisy, num_problems=3000, seed=1000), num_resamples=2).measures
    found = [measured(noisy, seed=seed).measures for seed in range(20)]
    for name in ("skill", "sibling_ranking", "calibration_error"):
        estimates = [measures[name] for measures in found]
        assert sum(not each.low <= truth[name].mean <= each.high for each in estimates) <= 3
        assert np.mean([each.mean for each in estimates]) == pytest.approx(truth[name].mean, rel=0.1)


def test_calibrated():
    """Noise alone makes the plain calibration error of a perfect critic 0.01 and more."""
    found = [measured(perfect, seed=seed).measures["calibration_error"] for seed in range(20)]
    assert np.mean([each.mean for each in found]) < 0.008
    assert all(each.low <= each.mean <= each.high and each.low < 0.01 for each in found)


def test_few_problems_are_not_enough_to_be_sure():
    found = diagnose(*world(noisy, num_problems=3, seed=3), num_resamples=200)
    assert found.measures["skill"].low <= 0 < found.measures["skill"].mean
    assert found.is_fit
    assert "3 problems are too few to be sure" in found.verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:1], "at least two problems"),
        (lambda rows: [], "there are 0 states of 0 problems"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "critic_values"}], "Row 0 has no 'critic_values'"),
    ],
)
def test_refusals(change, message):
    solutions, _ = world(perfect, num_problems=2)
    with pytest.raises(ValueError, match=message):
        diagnose(change(solutions))


def test_states_without_solutions_are_refused():
    solutions, states = world(perfect, num_problems=3)
    with pytest.raises(ValueError, match="State row 2 is of problem 'p2', of which there is no solution row"):
        diagnose(solutions[:4], states)


def test_of_a_run(tmp_path, capsys):
    """Only problems that the critic was not trained on count."""
    solutions, states = world(noisy, num_problems=200)
    told = [row for row in solutions if int(row["problem_id"][1:]) % 10]
    for row in told:  # what it has seen it knows by heart
        row["critic_values"] = [k / n for k, n in zip(row["mc_successes"], row["mc_rollouts"], strict=True)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(solutions).to_parquet(tmp_path / "data" / "solutions_critic.parquet")
    Dataset.from_list(states).to_parquet(tmp_path / "data" / "states_critic.parquet")
    assert main(["diagnose", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Critic on 140 states of 20 held-out problems" in text
    assert "The critic knows something about problems that it has not seen." in " ".join(text.split())
    assert "pairs" in text
    record = json.loads((tmp_path / "data" / "diagnosis.json").read_text())
    unseen = [[row for row in rows if int(row["problem_id"][1:]) % 10 == 0] for rows in (solutions, states)]
    assert record["measures"]["skill"]["mean"] == diagnose(*unseen).measures["skill"].mean
    assert record["is_fit"]
    assert (tmp_path / "calibration.png").exists()


def test_a_run_without_a_critic(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)]) == 1
    assert "has no values by a critic. Run `dapo-trl score` with its recipe first." in capsys.readouterr().err
