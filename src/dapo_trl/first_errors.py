r"""
Where does a solution go wrong first? What a critic's values say, against labels such as those of ProcessBench
(Zheng et al. 2024, arXiv 2412.06559).

A solution of K steps has values V(s_0)..V(s_K). A step is taken for wrong if its score falls below a threshold; the
first such step is the answer, -1 if there is none. N solutions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_trl.intervals import Estimate


RULES = ("drop", "value")
_COLUMNS = ("critic_values", "first_error")


@dataclass(frozen=True)
class FirstErrors:
    """
    How often the first wrong step is found.

    Attributes:
        f1 ([`Estimate`]):
            Harmonic mean of the two accuracies, which is what ProcessBench reports.
        erroneous ([`Estimate`]):
            Of solutions with a wrong step, the share whose first one is named exactly.
        correct ([`Estimate`]):
            Of solutions without, the share of which that is said.
        num_erroneous (`int`), num_correct (`int`):
            Solutions of each kind.
        threshold (`float`):
            Score below which a step is taken for wrong.
        rule (`str`):
            What the score is: `"drop"` or `"value"`.
    """

    f1: Estimate
    erroneous: Estimate
    correct: Estimate
    num_erroneous: int
    num_correct: int
    threshold: float
    rule: str


def step_scores(values: Sequence[float], rule: str = "drop") -> np.ndarray:
    r"""
    Scores of the steps of a solution: the lower, the more does a step look wrong.

    `"drop"` takes the change of the value, V(s_t) - V(s_{t-1}): a value function says how likely success is, so that a
    right step of a hard problem has a low value, but does not lower it. `"value"` takes V(s_t), as for a process reward
    model.

    Args:
        values (sequence of `float`, length K + 1):
            V(s_0)..V(s_K).
        rule (`str`, *optional*, defaults to `"drop"`):
            `"drop"` or `"value"`.

    Returns:
        `np.ndarray` of shape `(K,)`, float64.

    Raises:
        ValueError: if the rule is unknown, there are fewer than two values, or one is not in [0, 1].

    Example:

    ```python
    >>> from dapo_trl.first_errors import step_scores

    >>> step_scores([0.5, 0.75, 0.25]).tolist(), step_scores([0.5, 0.75, 0.25], "value").tolist()
    ([0.25, -0.5], [0.75, 0.25])

    ```
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be {' or '.join(map(repr, RULES))}, got {rule!r}.")
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size < 2 or not ((v >= 0) & (v <= 1)).all():
        raise ValueError(f"A solution of K steps has K + 1 values in [0, 1], got {v.tolist()!r:.80}.")
    return np.diff(v) if rule == "drop" else v[1:]


def predict_first_error(values: Sequence[float], threshold: float, rule: str = "drop") -> int:
    """
    The first step whose score is below a threshold.

    Args:
        values (sequence of `float`, length K + 1):
            V(s_0)..V(s_K).
        threshold (`float`):
            Score below which a step is taken for wrong.
        rule (`str`, *optional*, defaults to `"drop"`):
            See [`step_scores`].

    Returns:
        `int`: index of the step, from 0; -1 if there is none.

    Raises:
        ValueError: as [`step_scores`].

    Example:

    ```python
    >>> from dapo_trl.first_errors import predict_first_error

    >>> predict_first_error([0.5, 0.75, 0.25, 0.0], threshold=-0.2), predict_first_error([0.5, 0.75], threshold=-0.2)
    (1, -1)

    ```
    """
    below = step_scores(values, rule) < threshold
    return int(np.argmax(below)) if below.any() else -1


def fit_threshold(rows: Iterable[Mapping[str, Any]], rule: str = "drop") -> float:
    """
    The threshold with the largest F1, among all there are.

    A solution is judged rightly by the thresholds of one interval: above the score of its first wrong step, and not
    above any score before. So F1 changes at the ends of these intervals only.

    Args:
        rows (iterable of `dict`):
            Solution rows with `critic_values` (K+1 numbers) and `first_error` (index of the first wrong step, -1 if all
            are right). Not those that are to be measured with it.
        rule (`str`, *optional*, defaults to `"drop"`):
            See [`step_scores`].

    Returns:
        `float`: midway between two scores. Of thresholds that are equally good the lowest, which blames fewest steps.

    Raises:
        ValueError: if a row is bad, or there are no solutions with an error or none without.

    Example:

    ```python
    >>> from dapo_trl.first_errors import fit_threshold

    >>> rows = [{"critic_values": [0.5, 0.5, 0.25], "first_error": 1}, {"critic_values": [0.5, 0.5], "first_error": -1}]
    >>> fit_threshold(rows)
    -0.125

    ```
    """
    erroneous, correct = _intervals(rows, rule)
    ends = np.unique(np.concatenate([erroneous, correct]))
    ends = ends[np.isfinite(ends)]
    edges = np.array([ends[0] - 1, *ends, ends[-1] + 1])
    thresholds = (edges[:-1] + edges[1:]) / 2
    scores = _f1(_share_within(erroneous, thresholds), _share_within(correct, thresholds))
    return float(thresholds[np.argmax(scores)])


def measure_first_errors(
    rows: Iterable[Mapping[str, Any]],
    threshold: float,
    rule: str = "drop",
    num_resamples: int = 2000,
    seed: int = 0,
) -> FirstErrors:
    r"""
    How often a critic finds the first wrong step, as ProcessBench counts it.

    $$
    F_1 = \frac{2 \, a_\mathrm{erroneous} \, a_\mathrm{correct}}{a_\mathrm{erroneous} + a_\mathrm{correct}}
    $$

    Args:
        rows (iterable of `dict`):
            Solution rows, as for [`fit_threshold`].
        threshold (`float`):
            Score below which a step is taken for wrong, from other rows.
        rule (`str`, *optional*, defaults to `"drop"`):
            See [`step_scores`].
        num_resamples (`int`, *optional*, defaults to `2000`):
            Bootstrap resamples: of the rows of each kind, as many as there are.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`FirstErrors`], with 95% intervals. They do not know of the rows that the threshold is from.

    Raises:
        ValueError: if a row is bad, or there are no solutions with an error or none without.

    Example:

    ```python
    >>> from dapo_trl.first_errors import measure_first_errors

    >>> rows = [{"critic_values": [0.5, 0.5, 0.25], "first_error": 1}, {"critic_values": [0.5, 0.5], "first_error": -1}]
    >>> rows += [{"critic_values": [0.5, 0.5], "first_error": 0}]
    >>> found = measure_first_errors(rows, threshold=-0.1)
    >>> found.erroneous.mean, found.correct.mean, round(found.f1.mean, 3)
    (0.5, 1.0, 0.667)

    ```
    """
    at = np.array([threshold], dtype=np.float64)
    intervals = _intervals(rows, rule)
    sizes = [len(kind) for kind in intervals]  # erroneous, correct
    shares = [float(_share_within(kind, at)[0]) for kind in intervals]
    rng = np.random.default_rng(seed)
    # of right and wrong answers, a resample's number of right ones is all that counts
    draws = [rng.binomial(n, p, num_resamples) / n for n, p in zip(sizes, shares, strict=True)]
    f1 = float(_f1(*(np.array(share) for share in shares)))
    return FirstErrors(
        f1=Estimate.from_draws(f1, _f1(*draws)),
        erroneous=Estimate.from_draws(shares[0], draws[0]),
        correct=Estimate.from_draws(shares[1], draws[1]),
        num_erroneous=sizes[0],
        num_correct=sizes[1],
        threshold=float(threshold),
        rule=rule,
    )


def evaluate_first_errors(
    fit_rows: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], rule: str = "drop"
) -> FirstErrors:
    """
    The threshold from one set of solutions, the measures on another.

    Args:
        fit_rows (sequence of `dict`):
            Solution rows with `problem_id`, as for [`fit_threshold`], which the threshold is chosen on.
        rows (sequence of `dict`):
            Others, which are measured.
        rule (`str`, *optional*, defaults to `"drop"`):
            See [`step_scores`].

    Returns:
        [`FirstErrors`].

    Raises:
        ValueError: if a row is in both, has no `problem_id` or is bad, or either lacks a kind of solutions.

    Example:

    ```python
    >>> from dapo_trl.first_errors import evaluate_first_errors

    >>> wrong = {"critic_values": [0.5, 0.5, 0.1], "first_error": 1}
    >>> right = {"critic_values": [0.5, 0.6, 0.9], "first_error": -1}
    >>> rows = [row | {"problem_id": f"{row['first_error']}, {part}"} for part in "ab" for row in (wrong, right)]
    >>> evaluate_first_errors(rows[:2], rows[2:]).f1.mean
    1.0

    ```
    """
    fitted, measured = (_ids(part, name) for part, name in ((fit_rows, "fit_rows"), (rows, "rows")))
    if shared := fitted.keys() & measured.keys():
        first = min(shared, key=measured.__getitem__)
        raise ValueError(
            f"{len(shared)} solutions are in `fit_rows` and in `rows`, such as {first!r} (row {measured[first]}): a "
            "threshold that was chosen on them would flatter the critic. Choose it on others."
        )
    return measure_first_errors(rows, fit_threshold(fit_rows, rule), rule)


def _ids(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    """Where each solution is."""
    ids: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row.get("problem_id") is None:
            raise ValueError(
                f"Row {index} of `{name}` has no `problem_id`, so that nobody knows if others are the same."
            )
        ids.setdefault(row["problem_id"], index)
    return ids


def _intervals(rows: Iterable[Mapping[str, Any]], rule: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Thresholds by which each solution is judged rightly: above the first number, and up to the second.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: shapes `(N, 2)` for those with an error and those without.
    """
    kinds: tuple[list[list[float]], list[list[float]]] = ([], [])
    for index, row in enumerate(rows):
        if missing := [name for name in _COLUMNS if row.get(name) is None]:
            raise ValueError(
                f"Row {index} has no {', '.join(map(repr, missing))}. `dapo_trl.readers.read_processbench` reads "
                "labels, `StepCriticTrainer.predict_values` adds values."
            )
        try:
            scores, label = step_scores(row["critic_values"], rule), row["first_error"]
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        if label != int(label) or not -1 <= label < len(scores):
            raise ValueError(
                f"Row {index}: `first_error` is {label}, but the solution has {len(scores)} steps: expected -1 (all "
                f"right) to {len(scores) - 1}."
            )
        before = scores[: int(label)] if label >= 0 else scores
        low = scores[int(label)] if label >= 0 else -np.inf
        kinds[0 if label >= 0 else 1].append([low, before.min(initial=np.inf)])
    for kind, what in zip(kinds, ("with a wrong step (`first_error` of 0 or more)", "without one (-1)"), strict=True):
        if not kind:
            raise ValueError(f"There are no solutions {what}, of which one accuracy of F1 is. Add some.")
    return np.array(kinds[0]), np.array(kinds[1])


def _share_within(intervals: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of the intervals that each threshold lies in."""
    low, high = intervals[intervals[:, 0] < intervals[:, 1]].T
    begun = np.searchsorted(np.sort(low), thresholds, side="left")  # low < threshold
    ended = np.searchsorted(np.sort(high), thresholds, side="left")  # high < threshold
    return (begun - ended) / len(intervals)


def _f1(erroneous: np.ndarray, correct: np.ndarray) -> np.ndarray:
    total = erroneous + correct
    return np.divide(2 * erroneous * correct, total, out=np.zeros_like(total), where=total > 0)
