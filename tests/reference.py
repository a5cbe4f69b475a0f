"""
The numeric functions once more, the slow way: plain Python loops over float64 numbers, written from the equations.

Nothing here imports the package, so that a mistake in one of the two shows as a difference.
"""

import itertools
import math
from collections.abc import Hashable, Sequence


def dapo_loss(
    logps: Sequence[float],
    ref_logps: Sequence[float],
    advantages: Sequence[float],
    beta: float,
    weights: Sequence[float] | None = None,
) -> float:
    """Mean over pairs of half the squared distance between log-ratio and target."""
    total, total_weight = 0.0, 0.0
    for i in range(len(logps)):
        weight = 1.0 if weights is None else weights[i]
        residual = advantages[i] / beta - (logps[i] - ref_logps[i])
        total += weight * residual * residual / 2
        total_weight += weight
    return total / total_weight


def listwise_loss(
    logps: Sequence[float],
    ref_logps: Sequence[float],
    values: Sequence[float],
    states: Sequence[int],
    value_power: float,
    ref_power: float,
) -> float:
    """Mean over states of the KL divergence of the policy's shares of the candidates from the targets' shares."""
    divergences = []
    for state in sorted(set(states)):
        members = [i for i in range(len(states)) if states[i] == state]
        scores = [math.exp(ref_logps[i]) ** ref_power * (values[i] + 0.001) ** value_power for i in members]
        shares = [math.exp(logps[i]) for i in members]
        divergence = 0.0
        for score, share in zip(scores, shares, strict=True):
            q, p = score / sum(scores), share / sum(shares)
            divergence += q * (math.log(q) - math.log(p))
        divergences.append(divergence)
    return sum(divergences) / len(divergences)


def log_partition(advantages: Sequence[float], beta: float, counts: Sequence[int], kind: str) -> float:
    """Log of the mean of exp(A/beta) over all samples; or half the variance of A/beta above its mean."""
    targets = [a / beta for a, count in zip(advantages, counts, strict=True) for _ in range(count)]
    mean = sum(targets) / len(targets)
    if kind == "gaussian":
        return mean + sum((t - mean) ** 2 for t in targets) / len(targets) / 2
    return math.log(sum(math.exp(t) for t in targets) / len(targets))


def kernel_value(successes: Sequence[float], rollouts: Sequence[int], bandwidth: float) -> tuple[float, float]:
    """Weighted mean of the outcomes of one state over iterations, and its effective sample size, outcome by outcome."""
    total, weights = 0.0, []
    for j in range(1, len(successes) + 1):
        u = (len(successes) - j) / (len(successes) * bandwidth)
        weight = 1 - u if u < 1 else 0.0
        for number in range(rollouts[j - 1]):
            total += weight * (number < successes[j - 1])
            weights.append(weight)
    return total / sum(weights), sum(weights) ** 2 / sum(weight * weight for weight in weights)


def batch_value(i: int, values: Sequence[float], outcomes: Sequence[float], groups: Sequence[object]) -> float:
    """The value of state i, times what the states of other groups have succeeded more often than expected."""
    found = expected = 0.0
    for j in range(len(values)):
        if groups[j] != groups[i] and 0.02 < values[j] < 0.98:
            found += outcomes[j] / (1 - values[j])
            expected += values[j] / (1 - values[j])
    if expected == 0 or not 0.02 < values[i] < 0.98:
        return values[i]
    return min(max(values[i] * found / expected, 0.0), 1.0)


def critic_loss(
    logits: Sequence[float], successes: Sequence[float], rollouts: Sequence[float], weighting: str = "rollouts"
) -> float:
    """Mean over rollouts (or states) of the negative log-likelihood of the outcomes."""
    total, total_weight = 0.0, 0.0
    for logit, k, n in zip(logits, successes, rollouts, strict=True):
        value = 1 / (1 + math.exp(-logit))
        weight = n if weighting == "rollouts" else 1.0
        total -= weight * (k * math.log(value) + (n - k) * math.log(1 - value)) / n
        total_weight += weight
    return total / total_weight


def sibling_advantages(values: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Values minus their mean over all samples: a candidate that was sampled n times is listed n times."""
    samples = []
    for value, count in zip(values, counts, strict=True):
        for _ in range(count):
            samples.append(value)
    mean = math.fsum(samples) / len(samples)
    return [value - mean for value in values]


def step_advantages(values: Sequence[float]) -> list[float]:
    """What each step adds to the value of its state."""
    return [values[t] - values[t - 1] for t in range(1, len(values))]


def advantage_errors(errors: Sequence[float], counts: Sequence[int]) -> list[float]:
    """An advantage is a sum of the values with factors, its variance that of their variances with the squares."""
    found = []
    for i in range(len(errors)):
        variance = 0.0
        for j in range(len(errors)):
            factor = (1.0 if i == j else 0.0) - counts[j] / sum(counts)
            variance += factor**2 * errors[j] ** 2
        found.append(math.sqrt(variance))
    return found


def reliabilities(advantages: Sequence[float], errors: Sequence[float], posterior: bool) -> list[float]:
    """Signal over signal and noise; a posterior mean's own spread is the signal."""
    spread = math.fsum(a * a for a in advantages) / len(advantages)
    noise = math.fsum(e * e for e in errors) / len(errors)
    signal = spread if posterior else max(spread - noise, spread / 100)
    return [signal / (signal + e * e) for e in errors]


def prefix_counts(
    samples: Sequence[tuple[tuple[Hashable, ...], tuple[Hashable, ...], float]],
) -> dict[tuple[Hashable, ...], tuple[float, int]]:
    """State -> (successes, rollouts): for each state, look at every sample and ask whether it went through there."""
    states = set()
    for state, steps, _ in samples:
        for depth in range(len(steps) + 1):
            states.add(state + steps[:depth])
    counts = {}
    for state in states:
        successes, rollouts = 0.0, 0
        for start, steps, reward in samples:
            path = start + steps
            if len(start) <= len(state) and path[: len(state)] == state:
                successes += reward
                rollouts += 1
        counts[state] = (successes, rollouts)
    return counts


def critic_metrics(
    values: Sequence[float], successes: Sequence[int], rollouts: Sequence[int], num_bins: int = 10
) -> dict[str, float]:
    """Metrics over single outcomes: a state with k successes in n rollouts is n predictions, k of them of a success."""
    predictions, outcomes = [], []
    for value, k, n in zip(values, successes, rollouts, strict=True):
        for j in range(n):
            predictions.append(value)
            outcomes.append(1.0 if j < k else 0.0)
    base_rate = sum(outcomes) / len(outcomes)
    bce = _cross_entropy(predictions, outcomes)
    bce_constant = _cross_entropy([base_rate] * len(outcomes), outcomes)
    return {
        "bce": bce,
        "bce_constant": bce_constant,
        "skill": 1 - bce / bce_constant,
        "brier": sum((v - y) ** 2 for v, y in zip(predictions, outcomes, strict=True)) / len(outcomes),
        "calibration_error": expected_calibration_error(predictions, outcomes, num_bins),
    }


def _cross_entropy(predictions: Sequence[float], outcomes: Sequence[float]) -> float:
    total = 0.0
    for value, outcome in zip(predictions, outcomes, strict=True):
        total -= math.log(value) if outcome else math.log(1 - value)
    return total / len(outcomes)


def expected_calibration_error(predictions: Sequence[float], outcomes: Sequence[float], num_bins: int) -> float:
    """Share of the predictions in a bin times the distance of their mean to the mean outcome; the last bin has 1."""
    error = 0.0
    for i in range(num_bins):
        low, high = i / num_bins, (i + 1) / num_bins
        inside = [j for j, v in enumerate(predictions) if low <= v < high or (v == 1.0 and i == num_bins - 1)]
        if inside:
            confidence = sum(predictions[j] for j in inside) / len(inside)
            accuracy = sum(outcomes[j] for j in inside) / len(inside)
            error += len(inside) / len(predictions) * abs(confidence - accuracy)
    return error


def sibling_ranking(predicted: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Share of the pairs with different references that the prediction orders alike; tied predictions are a half."""
    score, pairs = 0.0, 0
    for p, r in zip(predicted, reference, strict=True):
        for i, j in itertools.combinations(range(len(p)), 2):
            if r[i] == r[j]:
                continue
            pairs += 1
            if p[i] == p[j]:
                score += 0.5
            elif (p[i] > p[j]) == (r[i] > r[j]):
                score += 1.0
    return score / pairs, pairs


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Share of all k-subsets of the samples that hold a correct one, by listing them."""
    is_correct = [i < num_correct for i in range(num_samples)]
    subsets = list(itertools.combinations(is_correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def binomial_quantile(num_trials: int, probability: float, level: float) -> int:
    """Smallest number of successes whose cumulative probability reaches a level."""
    cumulative = 0.0
    for successes in range(num_trials + 1):
        ways = math.comb(num_trials, successes)
        cumulative += ways * probability**successes * (1 - probability) ** (num_trials - successes)
        if cumulative >= level:
            return successes
    return num_trials


def sample_reference(logits: Sequence[float], uniform: float) -> int:
    """The token in whose share of [0, 1) a number falls; the shares are the softmax, one after the other."""
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    cumulative = 0.0
    for token, weight in enumerate(weights):
        cumulative += weight / total
        if uniform < cumulative:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


def predict_first_error(values: Sequence[float], threshold: float, rule: str) -> int:
    """Index of the first step whose value, or whose gain, is below the threshold; -1 without one."""
    for t in range(1, len(values)):
        score = values[t] - values[t - 1] if rule == "drop" else values[t]
        if score < threshold:
            return t - 1
    return -1


def first_error_f1(rows: Sequence[dict], threshold: float, rule: str) -> tuple[float, float, float]:
    """Harmonic mean of the accuracies on solutions with and without an error, and these two."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        label = row["first_error"]
        hits[label >= 0].append(predict_first_error(row["critic_values"], threshold, rule) == label)
    wrong, right = (sum(hits[kind]) / len(hits[kind]) for kind in (True, False))
    return (2 * wrong * right / (wrong + right) if wrong + right else 0.0), wrong, right
