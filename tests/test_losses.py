"""
The two losses: by hand, against slow loops, in their limits, their gradients, and what they refuse.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import reference
from dapo_trl.losses import critic_loss, critic_weights, dapo_loss, listwise_loss


def random_pairs(num_pairs: int = 12, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Log-probs of steps of up to 60 nats, reference log-probs nearby, advantages in [-1, 1], weights of 1 to 5."""
    generator = torch.Generator().manual_seed(seed)
    logps = -60 * torch.rand(num_pairs, dtype=torch.float64, generator=generator)
    ref_logps = logps + 2 * torch.randn(num_pairs, dtype=torch.float64, generator=generator)
    advantages = 2 * torch.rand(num_pairs, dtype=torch.float64, generator=generator) - 1
    weights = torch.randint(1, 6, (num_pairs,), generator=generator).double()
    return logps, ref_logps, advantages, weights


def random_states(num_states: int = 12, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits, and counts of 0 to n successes in n = 1 to 16 rollouts."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_states, dtype=torch.float64, generator=generator)
    rollouts = torch.randint(1, 17, (num_states,), generator=generator)
    successes = (torch.rand(num_states, generator=generator) * (rollouts + 1)).long()
    return logits, successes, rollouts


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class TestDapoLoss:
    def test_by_hand(self):
        """
        At beta = 1/2 the targets of advantages 1/2, -1/4, 0 are 1, -1/2, 0 nats. The log-ratios are -1 - -2 = 1,
        -3 - -1 = -2 and -4 - -3 = -1. Residuals 0, 3/2, 1; half squares 0, 9/8, 1/2; sum 13/8, mean 13/24. With
        weights 5, 2, 1 they are 0, 9/4, 1/2; sum 11/4, mean over a total weight of 8: 11/32.
        """
        pairs = (tensor(-1, -3, -4), tensor(-2, -1, -3), tensor(0.5, -0.25, 0), 0.5)
        assert dapo_loss(*pairs, reduction="none").tolist() == [0, 1.125, 0.5]
        assert dapo_loss(*pairs, reduction="sum").item() == 1.625
        assert dapo_loss(*pairs).item() == pytest.approx(13 / 24, rel=1e-15)
        weights = tensor(5, 2, 1)
        assert dapo_loss(*pairs, weights, reduction="none").tolist() == [0, 2.25, 0.5]
        assert dapo_loss(*pairs, weights, reduction="sum").item() == 2.75
        assert dapo_loss(*pairs, weights).item() == 11 / 32

    @pytest.mark.parametrize("beta", [0.01, 0.02, 0.5, 3.0])
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_loop(self, seed, beta):
        logps, ref_logps, advantages, weights = random_pairs(seed=seed)
        lists = (logps.tolist(), ref_logps.tolist(), advantages.tolist(), beta)
        for given in (None, weights):
            expected = reference.dapo_loss(*lists, None if given is None else given.tolist())
            total = len(logps) if given is None else weights.sum().item()
            assert dapo_loss(logps, ref_logps, advantages, beta, given).item() == pytest.approx(expected, rel=1e-12)
            each = dapo_loss(logps, ref_logps, advantages, beta, given, reduction="none")
            summed = dapo_loss(logps, ref_logps, advantages, beta, given, reduction="sum")
            assert each.shape == logps.shape
            assert each.sum().item() == pytest.approx(expected * total, rel=1e-12)
            assert summed.item() == pytest.approx(expected * total, rel=1e-12)

    def test_zero_exactly_where_every_target_is_met(self):
        _, ref_logps, advantages, _ = random_pairs()
        met = ref_logps + advantages / 0.1
        assert dapo_loss(met, ref_logps, advantages, 0.1).item() == pytest.approx(0, abs=1e-20)
        assert dapo_loss(met + tensor(*[0.1] * 12), ref_logps, advantages, 0.1).item() == pytest.approx(0.005)

    def test_at_the_reference_it_is_the_squared_target(self):
        """pi = pi_ref: L = mean(A^2) / (2 beta^2), whatever the log-probabilities are."""
        logps, _, advantages, _ = random_pairs()
        expected = (advantages**2).mean().item() / (2 * 0.02**2)
        assert dapo_loss(logps, logps, advantages, 0.02).item() == pytest.approx(expected, rel=1e-12)

    def test_large_beta_is_a_pull_to_the_reference(self):
        """beta -> infinity: the targets vanish, and L = mean(log-ratio^2) / 2."""
        logps, ref_logps, advantages, _ = random_pairs()
        expected = ((logps - ref_logps) ** 2).mean().item() / 2
        assert dapo_loss(logps, ref_logps, advantages, 1e12).item() == pytest.approx(expected, rel=1e-9)
        assert dapo_loss(logps, ref_logps, advantages, 1.0).item() != pytest.approx(expected, rel=1e-3)

    def test_only_advantage_over_beta_counts(self):
        logps, ref_logps, advantages, weights = random_pairs()
        loss = dapo_loss(logps, ref_logps, advantages, 0.02, weights).item()
        assert dapo_loss(logps, ref_logps, advantages / 8, 0.02 / 8, weights).item() == pytest.approx(loss, rel=1e-12)

    def test_two_opposite_actions_are_the_preference_loss_ipo(self):
        """
        On two actions of advantages a and -a with log-ratios x and y, the residuals are p = a/beta - x and, up to sign,
        q = a/beta + y, and (p^2 + q^2) / 4 = ((p + q)^2 + (p - q)^2) / 8, that is

            L = ((x - y) - 2a/beta)^2 / 8 + (x + y)^2 / 8.

        The first term is the loss of IPO (Azar et al. 2023), which wants x - y to be 1 / (2 tau), for
        tau = beta / (4a); the second ties the sum of the log-ratios, which a preference loss leaves free.
        """
        generator = torch.Generator().manual_seed(0)
        for x, y in (3 * torch.randn(50, 2, dtype=torch.float64, generator=generator)).tolist():
            tau = 0.1 / (4 * 0.3)
            ipo = (x - y - 1 / (2 * tau)) ** 2
            loss = dapo_loss(tensor(x, y), tensor(0, 0), tensor(0.3, -0.3), 0.1).item()
            assert loss == pytest.approx(ipo / 8 + (x + y) ** 2 / 8, rel=1e-12)

    def test_weights_are_repetitions(self):
        """A pair of weight 3 is the same as that pair three times; equal weights are no weights."""
        logps, ref_logps, advantages, weights = random_pairs()
        repeated = [x.repeat_interleave(weights.long()) for x in (logps, ref_logps, advantages)]
        loss = dapo_loss(logps, ref_logps, advantages, 0.1, weights).item()
        assert loss == pytest.approx(dapo_loss(*repeated, 0.1).item(), rel=1e-12)
        equal = dapo_loss(logps, ref_logps, advantages, 0.1, torch.full_like(weights, 7.0)).item()
        assert equal == pytest.approx(dapo_loss(logps, ref_logps, advantages, 0.1).item(), rel=1e-12)
        assert equal != pytest.approx(loss, rel=1e-3)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_gradient(self, reduction):
        """Autograd equals finite differences, and by hand: -(target - log-ratio) times the share of the pair."""
        logps, ref_logps, advantages, weights = random_pairs()
        logps.requires_grad_()
        for given in (None, weights):
            assert torch.autograd.gradcheck(
                lambda x, w=given: dapo_loss(x, ref_logps, advantages, 0.5, w, reduction), logps
            )
            (gradient,) = torch.autograd.grad(
                dapo_loss(logps, ref_logps, advantages, 0.5, given, reduction).sum(), logps
            )
            shares = torch.ones(12, dtype=torch.float64) if given is None else weights
            shares = shares / shares.sum() if reduction == "mean" else shares
            expected = -(advantages / 0.5 - (logps.detach() - ref_logps)) * shares
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("cuts", [[12], [6, 6], [1, 11], [5, 4, 3], [1] * 12])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_micro_batches(self, cuts, weighted):
        """Sums over micro-batches of any size, divided by the total weight, give the mean and its gradient."""
        logps, ref_logps, advantages, weights = random_pairs()
        weights = weights if weighted else torch.ones_like(weights)
        whole = logps.clone().requires_grad_()
        mean = dapo_loss(whole, ref_logps, advantages, 0.1, weights)
        mean.backward()
        parts, loss = logps.clone().requires_grad_(), 0.0
        for part in torch.arange(12).split(cuts):
            some = dapo_loss(
                parts[part], ref_logps[part], advantages[part], 0.1, weights[part] if weighted else None, "sum"
            )
            (some / weights.sum()).backward()
            loss += some.item() / weights.sum().item()
        assert loss == pytest.approx(mean.item(), rel=1e-12)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-14)

    def test_mean_of_means_would_be_something_else(self):
        """The control of `test_micro_batches`: averaging the means of unequal micro-batches is a different loss."""
        logps, ref_logps, advantages, _ = random_pairs()
        means = [
            dapo_loss(logps[part], ref_logps[part], advantages[part], 0.1).item()
            for part in torch.arange(12).split([1, 11])
        ]
        assert sum(means) / 2 != pytest.approx(dapo_loss(logps, ref_logps, advantages, 0.1).item(), rel=1e-2)

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_computes_in_float32_at_least(self, dtype, expected):
        """
        Advantage 1/2 at beta 1/1024 asks for 512 nats; 512^2 / 2 = 131,072 is beyond float16's largest number, 65,504.
        The log-ratio -512 - -511 = -1 makes it 513^2 / 2 = 131,584.5, which bfloat16 does not hold.
        """
        logps, ref_logps, advantages = (torch.tensor([x], dtype=dtype) for x in (-512.0, -511.0, 0.5))
        if dtype is torch.bfloat16:
            ref_logps = torch.tensor([-511.0])  # a cached column comes in float32; bfloat16 would make it -512
        loss = dapo_loss(logps, ref_logps, advantages, 1 / 1024)
        assert loss.dtype == expected
        assert loss.item() == 131_584.5

    @pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
    def test_refuses_beta(self, beta):
        with pytest.raises(ValueError, match=rf"`beta` must be positive, got {beta}\. The paper uses 0.01 or 0.02\."):
            dapo_loss(*random_pairs()[:3], beta)

    @pytest.mark.parametrize("name", ["logps", "ref_logps", "advantages", "weights"])
    def test_refuses_shapes_that_differ(self, name):
        """Also where they would broadcast: a column against a row would silently pair everything with everything."""
        pairs = dict(zip(("logps", "ref_logps", "advantages", "weights"), random_pairs(), strict=True))
        for shape in ((12, 1), (1,), ()):
            wrong = pairs | {name: torch.zeros(shape, dtype=torch.float64)}
            with pytest.raises(ValueError, match=r"All tensors must have the same shape, one entry a pair") as error:
                dapo_loss(**wrong, beta=0.1)
            assert f"'{name}': {shape}" in str(error.value)

    def test_refuses_reduction(self):
        with pytest.raises(ValueError, match="`reduction` must be 'mean', 'sum' or 'none', got 'average'"):
            dapo_loss(*random_pairs()[:3], 0.1, reduction="average")


class TestListwiseLoss:
    @staticmethod
    def random_states(num_states: int = 6, num_candidates: int = 4, seed: int = 0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        logps, ref_logps = -5 * torch.rand(2, num_states * num_candidates, dtype=torch.float64, generator=generator)
        values = torch.rand(num_states * num_candidates, dtype=torch.float64, generator=generator)
        return logps, ref_logps, values, torch.arange(num_states).repeat_interleave(num_candidates)

    def test_by_hand(self):
        """
        Two states of two candidates, of equal probability under policy and reference. Values 0.999 and 0.249 are, with
        epsilon, 1 and 1/4, so that q = 4/5, 1/5 and KL = log 2 - H(q) = 0.8 log 1.6 + 0.2 log 0.4; squared they are 1
        and 1/16, q = 16/17, 1/17. Equal values: q = p, and KL = 0. The mean is over the two states.
        """
        logps, state = tensor(0.5, 0.5, 0.1, 0.1).log(), torch.tensor([0, 0, 1, 1])
        values = tensor(0.999, 0.249, 0.5, 0.5)
        expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
        each = listwise_loss(logps, logps, values, state, reduction="none").tolist()
        assert each == [pytest.approx(expected, rel=1e-12), pytest.approx(0, abs=1e-15)]
        assert listwise_loss(logps, logps, values, state).item() == pytest.approx(expected / 2, rel=1e-12)
        assert listwise_loss(logps, logps, values, state, reduction="sum").item() == pytest.approx(expected, rel=1e-12)
        squared = listwise_loss(logps, logps, values, state, value_power=2.0, reduction="sum").item()
        assert squared == pytest.approx(16 / 17 * math.log(32 / 17) + 1 / 17 * math.log(2 / 17), rel=1e-12)

    @pytest.mark.parametrize("powers", [(1.0, 1.0), (4.0, 0.1), (0.0, 1.0), (1.0, 0.0)])
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_loop(self, seed, powers):
        given = self.random_states(seed=seed)
        expected = reference.listwise_loss(*(x.tolist() for x in given), *powers)
        loss = listwise_loss(*given, None, *powers)
        assert loss.item() == pytest.approx(expected, rel=1e-11) and loss.item() > 0.01

    def test_equal_values_ask_for_nothing_at_the_reference(self):
        """Gradient 0; not so where the reference counts for less than the policy's own probability."""
        _, ref_logps, values, state = self.random_states()
        logps = ref_logps.clone().requires_grad_()

        def gradient(values, **powers):
            return torch.autograd.grad(listwise_loss(logps, ref_logps, values, state, **powers), logps)[0]

        equal = torch.full_like(values, 0.3)
        assert gradient(equal).abs().max() < 1e-15
        assert gradient(values, value_power=0.0).abs().max() < 1e-15
        assert gradient(values).abs().max() > 1e-3
        assert gradient(equal, ref_power=0.5).abs().max() > 1e-3

    def test_only_shares_among_the_candidates_count(self):
        logps, ref_logps, values, state = self.random_states()
        shifted = listwise_loss(logps + state, ref_logps - 3.0 * state, values, state)
        assert shifted.item() == pytest.approx(listwise_loss(logps, ref_logps, values, state).item(), rel=1e-12)

    def test_pairs_without_weight_are_not_there(self):
        """Nor is a state that has no other pairs: it counts in no mean."""
        given = self.random_states()
        kept = given[3] != 2
        kept[0] = False
        weighted = listwise_loss(*given, kept.double() * 3)
        alone = listwise_loss(*(x[kept] for x in given))
        assert weighted.item() == pytest.approx(alone.item(), rel=1e-12)
        assert listwise_loss(*given, kept.double(), reduction="none")[2].item() == 0
        assert listwise_loss(*given).item() != pytest.approx(alone.item(), rel=1e-3)

    def test_its_minimum_is_no_worse_than_the_reference(self):
        """q = pi_ref V / E[V] over all actions succeeds with E[V^2] / E[V] >= E[V]; here V includes the epsilon."""
        _, ref_logps, values, state = self.random_states(num_states=50)
        ref_logps = ref_logps.view(50, 4).log_softmax(-1)
        logps = (ref_logps + (values.view(50, 4) + 1e-3).log()).log_softmax(-1)
        assert listwise_loss(logps.flatten(), ref_logps.flatten(), values, state).item() == pytest.approx(0, abs=1e-14)
        success = [(x.exp() * values.view(50, 4)).sum(-1) for x in (logps, ref_logps)]
        assert (success[0] > success[1]).all()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_gradient(self, reduction):
        """Autograd equals finite differences; by hand the gradient of KL(q || p) is p - q."""
        logps, ref_logps, values, state = self.random_states()
        logps.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: listwise_loss(x, ref_logps, values, state, reduction=reduction), logps
        )
        (gradient,) = torch.autograd.grad(listwise_loss(logps, ref_logps, values, state, reduction="sum"), logps)
        q = (ref_logps.view(6, 4).exp() * (values.view(6, 4) + 1e-3)).flatten()
        p = logps.detach().exp()
        shares = [x / x.view(6, 4).sum(-1).repeat_interleave(4) for x in (p, q)]
        torch.testing.assert_close(gradient, shares[0] - shares[1], rtol=1e-10, atol=1e-12)

    def test_extreme_probabilities_stay_finite(self):
        logps, state = torch.tensor([0.0, -400.0]), torch.tensor([0, 0])
        loss = listwise_loss(logps.requires_grad_(), logps.detach(), torch.tensor([0.0, 1.0]), state)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logps)[0]).all()

    @pytest.mark.parametrize("name", ["logps", "ref_logps", "values", "state_index"])
    def test_refuses_shapes_that_differ(self, name):
        given = dict(zip(("logps", "ref_logps", "values", "state_index"), self.random_states(), strict=True))
        with pytest.raises(ValueError, match="same shape"):
            listwise_loss(**given | {name: given[name][:-1]})

    def test_refuses_options(self):
        given = self.random_states()
        with pytest.raises(ValueError, match="Powers must be 0 or more"):
            listwise_loss(*given, value_power=-1.0)
        with pytest.raises(ValueError, match="`reduction` must be"):
            listwise_loss(*given, reduction="max")


class TestCriticLoss:
    def test_by_hand(self):
        """
        Logits log 3 and 0 are values 3/4 and 1/2. One success in 4 rollouts costs log(4/3) + 3 log 4 = 4 log 4 - log 3;
        2 in 2 cost 2 log 2. The mean over 6 rollouts is (10 log 2 - log 3) / 6, that over 2 states with the same weight
        is ((2 log 2 - log(3)/4) + log 2) / 2 = (3 log 2 - log(3)/4) / 2.
        """
        states = (tensor(math.log(3), 0), tensor(1, 2), tensor(4, 2))
        each = [8 * math.log(2) - math.log(3), 2 * math.log(2)]
        assert critic_loss(*states, reduction="none").tolist() == pytest.approx(each, rel=1e-14)
        assert critic_loss(*states, reduction="sum").item() == pytest.approx(sum(each), rel=1e-14)
        assert critic_loss(*states).item() == pytest.approx((10 * math.log(2) - math.log(3)) / 6, rel=1e-14)
        uniform = (3 * math.log(2) - math.log(3) / 4) / 2
        assert critic_loss(*states, "uniform").item() == pytest.approx(uniform, rel=1e-14)
        assert critic_loss(*states, "uniform", "sum").item() == pytest.approx(2 * uniform, rel=1e-14)

    @pytest.mark.parametrize("weighting", ["rollouts", "uniform"])
    @pytest.mark.parametrize("seed", range(10))
    def test_equals_loop(self, seed, weighting):
        states = random_states(seed=seed)
        expected = reference.critic_loss(*(x.tolist() for x in states), weighting)
        total = critic_weights(states[2], weighting).sum().item()
        assert critic_loss(*states, weighting).item() == pytest.approx(expected, rel=1e-12)
        assert critic_loss(*states, weighting, "sum").item() == pytest.approx(expected * total, rel=1e-12)
        each = critic_loss(*states, weighting, "none")
        assert each.shape == (12,)
        assert each.sum().item() == pytest.approx(expected * total, rel=1e-12)

    def test_rollouts_are_single_outcomes(self):
        """k successes in n rollouts are n labels, k of them 1, at one logit: binary cross-entropy over all of them."""
        logits, successes, rollouts = random_states()
        labels = torch.cat([(torch.arange(n) < k).double() for k, n in zip(successes, rollouts, strict=True)])
        expected = F.binary_cross_entropy_with_logits(logits.repeat_interleave(rollouts), labels).item()
        assert critic_loss(logits, successes, rollouts).item() == pytest.approx(expected, rel=1e-12)
        assert critic_loss(logits, successes, rollouts, "uniform").item() != pytest.approx(expected, rel=1e-3)

    def test_weightings_agree_on_equal_counts(self):
        logits, successes, _ = random_states()
        rollouts = torch.full_like(successes, 16)
        by_rollouts = critic_loss(logits, successes, rollouts)
        assert by_rollouts.item() == pytest.approx(
            critic_loss(logits, successes, rollouts, "uniform").item(), rel=1e-12
        )

    def test_topping_up_counts_once(self):
        """A state in two shards of a and b rollouts is the same as that state with a + b rollouts."""
        logit = tensor(0.3)
        shards = critic_loss(tensor(0.3, 0.3), tensor(1, 5), tensor(4, 12)).item()
        assert shards == pytest.approx(critic_loss(logit, tensor(6), tensor(16)).item(), rel=1e-12)

    def test_best_logit_is_that_of_the_mean_outcome(self):
        """At V = k/n the gradient is zero and the loss is the entropy of the outcomes: not zero, unless all agree."""
        successes, rollouts = tensor(1, 8, 15), tensor(16, 16, 16)
        logits = torch.logit(successes / rollouts).requires_grad_()
        loss = critic_loss(logits, successes, rollouts)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
        entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (1 / 16, 1 / 2, 15 / 16)]
        assert loss.item() == pytest.approx(sum(entropies) / 3, rel=1e-12)

    def test_soft_targets_stay_soft(self):
        """A mean outcome of 0.75 is not rounded to a label; fractional successes (partial credit) are as good."""
        soft = critic_loss(tensor(0), tensor(0.75), tensor(1))
        assert soft.item() == pytest.approx(math.log(2))
        losses = [critic_loss(tensor(1), tensor(k), tensor(4)).item() for k in (0, 1, 2.5, 3, 4)]
        slopes = [(losses[i] - losses[0]) / k for i, k in enumerate((1, 2.5, 3, 4), start=1)]
        assert slopes == pytest.approx([-0.25] * 4)  # linear in k: each success saves logit / n nats

    @pytest.mark.parametrize("weighting", ["rollouts", "uniform"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_gradient(self, weighting, reduction):
        """Autograd equals finite differences, and the gradient by hand: (V - k/n) times the share of the state."""
        logits, successes, rollouts = random_states()
        logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: critic_loss(x, successes, rollouts, weighting, reduction), logits)
        (gradient,) = torch.autograd.grad(critic_loss(logits, successes, rollouts, weighting, reduction).sum(), logits)
        shares = critic_weights(rollouts, weighting).double()
        shares = shares / shares.sum() if reduction == "mean" else shares
        expected = (torch.sigmoid(logits.detach()) - successes / rollouts.double()) * shares
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("cuts", [[12], [6, 6], [1, 11], [5, 4, 3], [1] * 12])
    @pytest.mark.parametrize("weighting", ["rollouts", "uniform"])
    def test_micro_batches(self, cuts, weighting):
        """Sums over micro-batches of any size, divided by the total weight, give the mean and its gradient."""
        logits, successes, rollouts = random_states()
        whole, parts, loss = logits.clone().requires_grad_(), logits.clone().requires_grad_(), 0.0
        mean = critic_loss(whole, successes, rollouts, weighting)
        mean.backward()
        total = critic_weights(rollouts, weighting).sum()
        for part in torch.arange(12).split(cuts):
            some = critic_loss(parts[part], successes[part], rollouts[part], weighting, "sum")
            (some / total).backward()
            loss += some.item() / total.item()
        assert loss == pytest.approx(mean.item(), rel=1e-12)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-14)

    def test_extreme_logits_stay_finite(self):
        """Certain and right costs nothing, certain and wrong costs the logit; neither is infinite."""
        logits = tensor(1000, -1000, 1000, -1000).requires_grad_()
        losses = critic_loss(logits, tensor(4, 0, 0, 4), tensor(4, 4, 4, 4), "uniform", "none")
        assert losses.tolist() == [0, 0, 1000, 1000]
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient.tolist() == [0, 0, 1, -1]

    @pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_computes_in_float32_at_least(self, dtype, expected):
        """Logit 1 is exact in bfloat16, so its loss must be that of float32 to seven digits; counts may be integers."""
        loss = critic_loss(torch.ones(1, dtype=dtype), torch.tensor([1]), torch.tensor([3]))
        assert loss.dtype == expected
        assert loss.item() == pytest.approx(math.log(1 + math.e) - 1 / 3, rel=2e-7)

    @pytest.mark.parametrize("name", ["logits", "successes", "rollouts"])
    def test_refuses_shapes_that_differ(self, name):
        states = dict(zip(("logits", "successes", "rollouts"), random_states(), strict=True))
        with pytest.raises(
            ValueError, match=r"All tensors must have the same shape, one entry a pair or state"
        ) as error:
            critic_loss(**(states | {name: torch.ones(1)}))
        assert f"'{name}': (1,)" in str(error.value)

    def test_refuses_options(self):
        with pytest.raises(ValueError, match="`weighting` must be 'rollouts' or 'uniform', got 'counts'"):
            critic_loss(*random_states(), weighting="counts")
        with pytest.raises(ValueError, match="`reduction` must be 'mean', 'sum' or 'none', got None"):
            critic_loss(*random_states(), reduction=None)


class TestCriticWeights:
    def test_by_hand(self):
        rollouts = torch.tensor([16, 1, 4])
        assert critic_weights(rollouts, "rollouts").tolist() == [16, 1, 4]
        assert critic_weights(rollouts, "uniform").tolist() == [1, 1, 1]

    def test_refuses_weighting(self):
        with pytest.raises(ValueError, match="`weighting` must be 'rollouts' or 'uniform', got ''"):
            critic_weights(torch.ones(2), "")
