"""
Accuracy of a policy: pass@k against all subsets, bootstrap intervals against exact ones, a whole evaluation in memory.
"""

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset

import reference
from conftest import CHAT_TEMPLATE, make_tokenizer, shortened
from dapo_trl.engines import Completion, SamplingConfig, sample_seed
from dapo_trl.evaluation import Estimate, bootstrap_mean, evaluate_policy, pass_at_k
from dapo_trl.tokenization import encode_prompt
from dapo_trl.verifiers import math_reward


class TestPassAtK:
    def test_by_hand(self):
        """One correct of 4 is among 2 of them in 3 of 6 cases; 2 correct of 5 are missed by 3 in 1 of 10 cases."""
        assert pass_at_k(num_samples=4, num_correct=1, k=2) == 0.5
        assert pass_at_k(num_samples=5, num_correct=2, k=3) == pytest.approx(0.9, rel=1e-15)

    def test_equals_enumeration(self):
        """All k-subsets of up to 8 samples."""
        for n in range(1, 9):
            for c, k in itertools.product(range(n + 1), range(1, n + 1)):
                assert pass_at_k(n, c, k) == pytest.approx(reference.pass_at_k(n, c, k), abs=1e-15)

    @pytest.mark.parametrize("n", [1, 2, 7, 100])
    def test_limits(self, n):
        """k = 1 is the mean; k = n asks whether any sample is correct; none or all correct give exactly 0 or 1."""
        for c in range(n + 1):
            assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-15)
            assert pass_at_k(n, c, n) == float(c > 0)
        assert [pass_at_k(n, 0, k) for k in range(1, n + 1)] == [0.0] * n
        assert [pass_at_k(n, n, k) for k in range(1, n + 1)] == [1.0] * n

    @pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
    def test_is_unbiased(self, p):
        """
        Averaged over the binomial number of correct samples it is 1 - (1 - p)^k exactly; 1 - (1 - c/n)^k, which plugs
        the mean in, is not.
        """
        n, k = 10, 4
        chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        expected = 1 - (1 - p) ** k
        mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert mean == pytest.approx(expected, rel=1e-12)
        plugged_in = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
        assert plugged_in < expected - 1e-5

    def test_no_overflow(self):
        """
        Binomial coefficients of 2,000 samples are beyond float64. The chance to miss is that of k draws without
        replacement, one after the other; one correct sample is in either half with chance 1/2.
        """
        missed = math.prod((1000 - 500 - i) / (1000 - i) for i in range(8))
        assert pass_at_k(1000, 500, 8) == pytest.approx(1 - missed, rel=1e-12)
        assert pass_at_k(2000, 1, 1000) == 0.5

    @pytest.mark.parametrize(("n", "c", "k"), [(4, -1, 1), (4, 5, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
    def test_refuses_what_cannot_be(self, n, c, k):
        message = rf"Expected 0 <= num_correct <= num_samples .* got num_correct={c}, num_samples={n}, k={k}\."
        with pytest.raises(ValueError, match=message):
            pass_at_k(num_samples=n, num_correct=c, k=k)


class TestBootstrapMean:
    def test_by_hand(self):
        """
        Problems 0 and 1: a resample has a mean of 0, 1/2 or 1 with probability 1/4, 1/2 and 1/4, so that the 2.5%
        quantile is 0 and the 97.5% quantile is 1. Equal numbers leave no doubt.
        """
        assert bootstrap_mean([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)
        assert bootstrap_mean([0.25] * 10) == Estimate(0.25, 0.25, 0.25)

    @pytest.mark.parametrize(("n", "c"), [(10, 5), (20, 3), (50, 30), (200, 194)])
    def test_equals_binomial_quantiles(self, n, c):
        """c of n solved: the number solved in a resample is binomial, whose quantiles are known without resampling."""
        estimate = bootstrap_mean([1.0] * c + [0.0] * (n - c), num_resamples=20_000)
        assert estimate.mean == pytest.approx(c / n, rel=1e-15)
        assert estimate.low * n == pytest.approx(reference.binomial_quantile(n, c / n, 0.025))
        assert estimate.high * n == pytest.approx(reference.binomial_quantile(n, c / n, 0.975))

    def test_many_problems_give_the_normal_interval(self):
        values = np.random.default_rng(0).random(2_000)
        estimate = bootstrap_mean(values)
        half_width = 1.96 * values.std() / math.sqrt(2_000)
        assert estimate.high - estimate.mean == pytest.approx(half_width, rel=0.1)
        assert estimate.mean - estimate.low == pytest.approx(half_width, rel=0.1)

    def test_seed(self):
        """The same seed gives the same interval, whatever else draws random numbers; the mean has no seed."""
        values = [0.1, 0.2, 0.4, 0.8, 0.9]
        first = bootstrap_mean(values, seed=3, num_resamples=50)
        np.random.default_rng(3).random(7)
        assert bootstrap_mean(values, seed=3, num_resamples=50) == first
        assert bootstrap_mean(values, seed=4, num_resamples=50).low != first.low
        assert bootstrap_mean(values, seed=4, num_resamples=50).mean == first.mean

    def test_refuses_nothing(self):
        with pytest.raises(ValueError, match="There is no value to take a mean of"):
            bootstrap_mean([])

    def test_text(self):
        assert str(Estimate(0.4188, 0.4052, 0.4323)) == "41.9% [40.5%, 43.2%]"


class FakeEngine:
    """
    Answers from a table: prompt -> texts, the first of them for greedy decoding. A text that ends in "..." was cut.
    """

    name = "fake"

    def __init__(self, answers: dict[str, list[str]], chat_template: str | None = None):
        self.tokenizer = make_tokenizer(chat_template)
        self.answers = answers
        self.calls: list[tuple[list[list[int]], SamplingConfig]] = []

    def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
        self.calls.append((seeds, sampling))
        asked = [self.tokenizer.decode(prefix) for prefix in prefixes]
        texts = [
            self.answers[prompt][:1] if sampling.temperature == 0 else self.answers[prompt][1:] for prompt in asked
        ]
        limits = limits or [sampling.max_new_tokens] * len(prefixes)
        return [
            [shortened(self.complete(text), limit, self.tokenizer) for text in group[: len(own)]]
            for group, own, limit in zip(texts, seeds, limits, strict=True)
        ]

    def complete(self, text: str) -> Completion:
        ids = tuple(self.tokenizer(text).input_ids)
        if text.endswith("..."):
            return Completion(ids, text, "length")
        return Completion((*ids, self.tokenizer.eos_token_id), text, "stop")


PROBLEMS = Dataset.from_dict(
    {
        "prompt": ["4 + 5 = ?\n", "8 * 9 = ?\n", "half of one = ?\n", "What did the poem mean?\n"],
        # The last one is no answer that can be compared: a sentence of more than eight words.
        "answer": ["9", "72", "1/2", "it is about the sea and the sorrow of those who wait"],
    }
)
ANSWERS = {
    "4 + 5 = ?\n": ["#### 9", "#### 9", "#### 9", "#### 10"],
    "8 * 9 = ?\n": ["#### 71", "#### 72", "so it is\n#### 72...", "I do not know."],
    "half of one = ?\n": ["#### 0.5...", "#### 0.5", "#### 1/2", "#### 2/4"],
    "What did the poem mean?\n": ["#### 1", "#### 2", "nothing", "#### 3..."],
}


class TestEvaluatePolicy:
    def test_by_hand(self):
        """
        Greedy: 9 is right, 71 is wrong, 0.5 is right but was cut, the last cannot be judged: 1 of 4. Of three samples,
        2, 1 (the other 72 was cut), 3 and 0 are correct: mean 6/12, and three problems are solved at least once:
        3/4. Three completions were cut, the last problem's 1 + 3 were not judged, one of them was both. A token is a
        character, and the 13 of 16 completions that ended have an end token.
        """
        engine = FakeEngine(ANSWERS)
        evaluation = evaluate_policy(PROBLEMS, engine, math_reward, SamplingConfig(), k=3, seed=5)
        assert evaluation.greedy == bootstrap_mean([1, 0, 0, 0], seed=5)
        assert evaluation.mean_at_k == bootstrap_mean([2 / 3, 1 / 3, 1, 0], seed=5)
        assert evaluation.pass_at_k == bootstrap_mean([1, 1, 1, 0], seed=5)
        assert (evaluation.greedy.mean, evaluation.mean_at_k.mean, evaluation.pass_at_k.mean) == (0.25, 0.5, 0.75)
        assert (evaluation.k, evaluation.num_problems) == (3, 4)
        assert (evaluation.truncated, evaluation.not_judged) == (3, 4)
        assert evaluation.tokens == sum(len(text) for texts in ANSWERS.values() for text in texts) + 13

    def test_sampling(self):
        """One greedy completion, then k samples as configured; only the temperature of the first call differs."""
        engine, sampling = FakeEngine(ANSWERS), SamplingConfig(max_new_tokens=64, temperature=0.7, top_p=0.9, top_k=20)
        evaluate_policy(PROBLEMS, engine, math_reward, sampling, k=2, seed=7)
        greedy = SamplingConfig(max_new_tokens=64, temperature=0.0, top_p=0.9, top_k=20)
        seeds = [[sample_seed(7, problem, number) for number in range(2)] for problem in range(4)]
        assert engine.calls == [([own[:1] for own in seeds], greedy), (seeds, sampling)]

    def test_one_sample_is_its_own_pass(self):
        """k = 1: mean@1 and pass@1 are one number."""
        evaluation = evaluate_policy(PROBLEMS, FakeEngine(ANSWERS), math_reward, SamplingConfig(), k=1)
        assert evaluation.pass_at_k == evaluation.mean_at_k
        assert evaluation.mean_at_k.mean == 0.75

    def test_columns_reach_the_reward_function(self):
        """Every column, repeated for each completion of its row and in the order of the completions."""
        received = []

        def reward(prompts, completions, **columns):
            received.append((prompts, completions, columns))
            return [0.0] * len(completions)

        problems = PROBLEMS.select(range(2)).add_column("level", [1, 2])
        evaluate_policy(problems, FakeEngine(ANSWERS), reward, SamplingConfig(), k=2)
        first, second = problems["prompt"]
        assert received == [
            ([first, second], ["#### 9", "#### 71"], {"answer": ["9", "72"], "level": [1, 2]}),
            (
                [first, first, second, second],
                ["#### 9", "#### 9", "#### 72", "so it is\n#### 72..."],
                {"answer": ["9", "9", "72", "72"], "level": [1, 1, 2, 2]},
            ),
        ]

    def test_half_a_reward_is_correct(self):
        """Rewards of 1/2 and more count as correct, less does not, None is counted apart."""

        def reward(prompts, completions, **columns):
            return [0.5, 0.49, 1.0, None][: len(completions)] if len(completions) == 4 else [0.0] * len(completions)

        answers = {prompt: [text.removesuffix("...") for text in texts] for prompt, texts in ANSWERS.items()}
        evaluation = evaluate_policy(PROBLEMS, FakeEngine(answers), reward, SamplingConfig(), k=2)
        assert (evaluation.greedy.mean, evaluation.mean_at_k.mean) == (0.5, 0.0)
        assert (evaluation.truncated, evaluation.not_judged) == (0, 1)

    def test_conversations(self):
        """Messages in, messages to the reward function; the numbers are those of the same texts without a template."""
        messages = [[{"role": "user", "content": prompt}] for prompt in PROBLEMS["prompt"]]
        problems = Dataset.from_dict({"prompt": messages, "answer": PROBLEMS["answer"]})
        tokenizer = make_tokenizer(CHAT_TEMPLATE)
        rendered = [tokenizer.decode(encode_prompt(prompt, tokenizer)) for prompt in messages]
        answers = dict(zip(rendered, ANSWERS.values(), strict=True))
        received = []

        def reward(prompts, completions, **columns):
            received.extend(completions)
            return math_reward(prompts, completions, **columns)

        evaluation = evaluate_policy(problems, FakeEngine(answers, CHAT_TEMPLATE), reward, SamplingConfig(), k=3)
        assert evaluation == evaluate_policy(PROBLEMS, FakeEngine(ANSWERS), math_reward, SamplingConfig(), k=3)
        assert received[0] == [{"role": "assistant", "content": "#### 9"}]

    def test_refuses_an_empty_data_set(self):
        engine = FakeEngine(ANSWERS)
        with pytest.raises(ValueError, match="There is no problem to evaluate on: the data set is empty"):
            evaluate_policy(PROBLEMS.select([]), engine, math_reward, SamplingConfig())
        assert engine.calls == []

    @pytest.mark.parametrize("k", [0, -1])
    def test_refuses_k_before_sampling(self, k):
        engine = FakeEngine(ANSWERS)
        with pytest.raises(ValueError, match=f"`k` must be at least 1, got {k}"):
            evaluate_policy(PROBLEMS, engine, math_reward, SamplingConfig(), k=k)
        assert engine.calls == []
