r"""
What the paper proves about the loss, on tabular problems small enough to compute everything exactly.

The loss of one state, with actions drawn from a distribution nu and u(a) = log(pi(a) / pi_ref(a)), is

    L(pi) = 1/2 E_{a~nu} (A(a)/beta - u(a))^2,

computed by `dapo_loss` throughout. The objective is success under a KL penalty of strength beta:

    V_pi(s) = E_{a~pi} [V_pi(s∘a) - beta u(a)],    V_pi(solution) = its reward.

A(s, a) = V_k(s∘a) - V_k(s) is the exact advantage of the generating policy pi_k in this objective. Where pi_k is the
reference, as in the paper, there is no penalty: V_k is the probability of success and V_k(s) the mean of V_k(s∘a) over
a ~ pi_ref. The tests hold this case and the wider one of pi_k away from pi_ref. In both, how much better than pi_k a
policy is in one state is

    I_s(pi) = E_{a~pi} [A(s, a) - beta u(a)],    I_s(pi_k) = 0.

Shapes: N problems of one state each; C actions of a state. Float64, fixed seeds.
"""

import math

import pytest
import torch

from dapo_trl.losses import dapo_loss
from dapo_trl.targets import log_partition


N = 200  # problems per configuration

# Actions of a state and beta: up to targets of 100 nats at the paper's beta.
configurations = pytest.mark.parametrize(("num_actions", "beta"), [(2, 0.01), (3, 0.1), (5, 1.0), (16, 0.05)])
generators = pytest.mark.parametrize("generator_is_reference", [True, False])


class Problems:
    """Random states: log-probabilities of pi_ref, pi_k and nu, and exact advantages of pi_k; each of shape (N, C)."""

    def __init__(self, num_actions: int, beta: float, generator_is_reference: bool = True, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)

        def logits():
            return torch.randn(N, num_actions, dtype=torch.float64, generator=rng)

        self.beta = beta
        self.ref_logps = logits().log_softmax(-1)
        self.logps_k = self.ref_logps if generator_is_reference else (self.ref_logps + logits()).log_softmax(-1)
        self.nu = logits().softmax(-1)
        next_values = torch.rand(N, num_actions, dtype=torch.float64, generator=rng)
        penalty = beta * (self.logps_k - self.ref_logps)
        self.advantages = next_values - (self.logps_k.exp() * (next_values - penalty)).sum(-1, keepdim=True)

    def losses(self, logps: torch.Tensor, nu: torch.Tensor | None = None) -> torch.Tensor:
        """L(pi) of each problem, shape (N,)."""
        return losses(logps, self.ref_logps, self.advantages, self.beta, self.nu if nu is None else nu)

    def improvements(self, logps: torch.Tensor) -> torch.Tensor:
        """I_s(pi) of each problem, shape (N,)."""
        return improvements(logps, self.ref_logps, self.advantages, self.beta)

    def minimisers(self) -> torch.Tensor:
        """log pi+ of each problem, shape (N, C)."""
        return minimisers(self.ref_logps, self.advantages, self.beta, self.nu)

    def soft_optima(self) -> torch.Tensor:
        """log of pi_ref exp(A/beta) / Z, which maximises I_s, shape (N, C)."""
        return (self.ref_logps + self.advantages / self.beta).log_softmax(-1)


def losses(logps, ref_logps, advantages, beta, nu) -> torch.Tensor:
    pairs = [x.flatten() for x in (logps, ref_logps, advantages)]
    return dapo_loss(*pairs, beta, nu.flatten(), reduction="none").view_as(logps).sum(-1)


def improvements(logps, ref_logps, advantages, beta) -> torch.Tensor:
    return (logps.exp() * (advantages - beta * (logps - ref_logps))).sum(-1)


def minimisers(ref_logps, advantages, beta, nu) -> torch.Tensor:
    r"""
    log pi+ of the exact minimiser of the loss, from its optimality condition.

    Minimising 1/2 sum_a nu (t - u)^2, t = A/beta, over u with sum_a pi_ref e^u = 1 gives, with a multiplier lambda,

        nu(a) (t(a) - u(a)) = lambda pi_ref(a) e^u(a) = lambda pi+(a).

    With w = t - u this is w e^w = lambda (pi_ref / nu) e^t, and y = log w solves

        e^y + y = log lambda + log(pi_ref / nu) + t,

    by Newton's method, since the left side is increasing and convex. As lambda grows from 0, sum_a pi_ref e^u falls
    from sum_a pi_ref e^t, which is at least 1 for an exact advantage (`test_multiplier_is_not_negative`), to 0;
    bisection finds the lambda at which it is 1. For lambda >= 0 the point is the only minimum: it also minimises a
    strictly convex function of u over the convex set sum_a pi_ref e^u <= 1.
    """
    targets = advantages / beta
    low = torch.full_like(targets[..., :1], -300.0)  # log lambda
    high = torch.full_like(low, 30.0)
    for _ in range(80):
        log_lambda = (low + high) / 2
        x = log_lambda + ref_logps - nu.log() + targets
        y = torch.minimum(x, x.clamp(min=1.0).log())
        for _ in range(10):
            y = y - (y.exp() + y - x) / (y.exp() + 1)
        logps = ref_logps + targets - y.exp()
        is_too_small = logps.logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(is_too_small, log_lambda, low), torch.where(is_too_small, high, log_lambda)
    return logps.log_softmax(-1)


def total_variation(logps: torch.Tensor, other_logps: torch.Tensor) -> torch.Tensor:
    return (logps.exp() - other_logps.exp()).abs().sum(-1) / 2


class TestGradientIdentity:
    r"""
    On-policy, grad L(pi_k) = -1/beta grad I_s(pi_k), for any pi_k, any reference and any A that is held fixed.

    The actions are drawn from nu = pi_k, which is no function of the parameters. Left side, at pi = pi_k:

        grad L = -sum_a pi_k(a) (A(a)/beta - u_k(a)) grad log pi(a).

    Right side, by the product rule and grad pi = pi grad log pi:

        grad I_s = sum_a pi (A - beta u) grad log pi - beta sum_a pi grad log pi,

    whose last sum is the gradient of sum_a pi = 1, so zero. At pi = pi_k what is left is -beta times the left side.
    Where pi_k = pi_ref, u_k = 0 and both are the plain policy gradient E[A grad log pi] up to -1/beta.
    """

    @staticmethod
    def gradients(problems: Problems, logits: torch.Tensor, nu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of L with actions from nu, and of I_s, with respect to the logits of pi."""
        logits = logits.detach().requires_grad_()
        logps = logits.log_softmax(-1)
        (of_loss,) = torch.autograd.grad(problems.losses(logps, nu).sum(), logits, retain_graph=True)
        (of_improvement,) = torch.autograd.grad(problems.improvements(logps).sum(), logits)
        return of_loss, of_improvement

    @configurations
    @generators
    def test_identity(self, num_actions, beta, generator_is_reference):
        problems = Problems(num_actions, beta, generator_is_reference)
        of_loss, of_improvement = self.gradients(problems, problems.logps_k, problems.logps_k.exp())
        torch.testing.assert_close(of_loss, -of_improvement / beta, rtol=1e-9, atol=1e-11)
        assert of_loss.abs().max() > 0.01

    @generators
    def test_of_the_mean(self, generator_is_reference):
        """The weights pi_k of a state sum to 1, so `reduction="mean"` is the mean over states; so is its gradient."""
        problems = Problems(5, 0.1, generator_is_reference)
        logits = problems.logps_k.clone().requires_grad_()
        pairs = [x.flatten() for x in (logits.log_softmax(-1), problems.ref_logps, problems.advantages)]
        dapo_loss(*pairs, 0.1, problems.logps_k.exp().flatten()).backward()
        _, of_improvement = self.gradients(problems, problems.logps_k, problems.nu)
        torch.testing.assert_close(logits.grad, -of_improvement / (0.1 * N), rtol=1e-9, atol=1e-13)

    def test_at_the_reference_it_is_the_policy_gradient(self):
        problems = Problems(5, 0.1)
        of_loss, _ = self.gradients(problems, problems.logps_k, problems.logps_k.exp())
        logits = problems.logps_k.clone().requires_grad_()
        surrogate = problems.logps_k.exp() * problems.advantages * logits.log_softmax(-1)
        surrogate.sum().backward()
        torch.testing.assert_close(of_loss, -logits.grad / 0.1, rtol=1e-9, atol=1e-11)

    @generators
    def test_a_baseline_does_not_matter(self, generator_is_reference):
        """E_{a~pi_k} grad log pi_k = 0: adding a constant to A changes neither gradient (but the minimiser)."""
        problems = Problems(5, 0.1, generator_is_reference)
        before = self.gradients(problems, problems.logps_k, problems.logps_k.exp())
        problems.advantages = problems.advantages + 0.37
        after = self.gradients(problems, problems.logps_k, problems.logps_k.exp())
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)

    @generators
    def test_needs_on_policy_weights_at_the_generator(self, generator_is_reference):
        """Controls: other weights (each unique action once), or a policy that has moved, give other gradients."""
        problems = Problems(5, 0.1, generator_is_reference)
        uniform = torch.full_like(problems.nu, 1 / 5)
        elsewhere = problems.logps_k + torch.linspace(-1, 1, 5, dtype=torch.float64)
        for logits, nu in ((problems.logps_k, uniform), (elsewhere, problems.logps_k.exp())):
            of_loss, of_improvement = self.gradients(problems, logits, nu)
            difference = (of_loss + of_improvement / 0.1).norm(dim=-1) / of_loss.norm(dim=-1)
            assert difference.median() > 0.1


class TestMinimiser:
    """The numbers that the other tests rest on: pi+ is what `dapo_loss` says is the minimum."""

    @configurations
    @generators
    def test_optimality(self, num_actions, beta, generator_is_reference):
        """The gradient of the loss vanishes at pi+, and nu (A/beta - u) is the same multiple of pi+ for all actions."""
        problems = Problems(num_actions, beta, generator_is_reference)
        logits = problems.minimisers().requires_grad_()
        (gradient,) = torch.autograd.grad(problems.losses(logits.log_softmax(-1)).sum(), logits)
        assert gradient.abs().max() < 1e-11 / beta
        residuals = problems.nu * (problems.advantages / beta - (logits.detach() - problems.ref_logps))
        multipliers = residuals.sum(-1, keepdim=True)
        torch.testing.assert_close(residuals, multipliers * logits.detach().exp(), rtol=1e-9, atol=1e-11 / beta)

    @configurations
    @generators
    @pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
    def test_nothing_near_is_lower(self, num_actions, beta, generator_is_reference, scale):
        problems = Problems(num_actions, beta, generator_is_reference)
        logps, rng = problems.minimisers(), torch.Generator().manual_seed(1)
        lowest = problems.losses(logps)
        for _ in range(20):
            noise = scale * torch.randn(logps.shape, dtype=torch.float64, generator=rng)
            assert (problems.losses((logps + noise).log_softmax(-1)) >= lowest - 1e-12 / beta**2).all()

    @pytest.mark.parametrize("beta", [0.2, 1.0])
    def test_descent_ends_there(self, beta):
        """A general optimizer that knows `dapo_loss` only, started from the reference, reaches the same policy."""
        problems = Problems(4, beta)
        logits = problems.ref_logps.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = problems.losses(logits.log_softmax(-1)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert total_variation(logits.detach().log_softmax(-1), problems.minimisers()).max() < 1e-6


class TestImprovementOfAState:
    """
    With nu > 0 and exact A, I_s(pi+) >= 0 = I_s(pi_k), with equality only where pi_k is already optimal.
    """

    @configurations
    @generators
    def test_never_falls(self, num_actions, beta, generator_is_reference):
        problems = Problems(num_actions, beta, generator_is_reference)
        assert problems.improvements(problems.logps_k).abs().max() < 1e-13
        gains = problems.improvements(problems.minimisers())
        assert (gains > 1e-12).all()
        assert (gains <= problems.improvements(problems.soft_optima()) + 1e-12).all()

    @configurations
    @generators
    def test_multiplier_is_not_negative(self, num_actions, beta, generator_is_reference):
        r"""
        Why it holds. By Jensen's inequality, with I_s(pi_k) = 0,

            sum_a pi_ref e^(A/beta) = E_{pi_k} e^(A/beta - u_k) >= e^(E_{pi_k}[A/beta - u_k]) = 1.

        If lambda were negative, u > A/beta for every action, so sum_a pi+ > sum_a pi_ref e^(A/beta) >= 1: impossible.
        So lambda >= 0, and putting A - beta u = beta lambda pi+ / nu into I_s gives

            I_s(pi+) = beta lambda sum_a pi+(a)^2 / nu(a) >= 0,

        zero only for lambda = 0, where the inequality is tight: A/beta = u_k, that is pi_k = pi_ref e^(A/beta).
        """
        problems = Problems(num_actions, beta, generator_is_reference)
        logps = problems.minimisers()
        partition = (problems.ref_logps + problems.advantages / beta).logsumexp(-1)
        multipliers = (problems.nu * (problems.advantages / beta - (logps - problems.ref_logps))).sum(-1)
        assert (partition > 0).all()
        assert (multipliers > 0).all()
        expected = beta * multipliers * (logps.exp() ** 2 / problems.nu).sum(-1)
        torch.testing.assert_close(problems.improvements(logps), expected, rtol=1e-8, atol=1e-12)

    @configurations
    def test_equality_at_the_optimum(self, num_actions, beta):
        """The optimum, pi_k = pi_ref e^(A/beta) with A = beta u_k, has a loss of zero and is its own minimiser."""
        problems = Problems(num_actions, beta, generator_is_reference=False)
        problems.advantages = beta * (problems.logps_k - problems.ref_logps)
        assert problems.losses(problems.logps_k).max() < 1e-20
        assert total_variation(problems.minimisers(), problems.logps_k).max() < 1e-12
        assert problems.improvements(problems.minimisers()).abs().max() < 1e-13

    def test_equality_where_all_actions_are_alike(self):
        """At the reference that means A = 0: there is nothing to gain, and pi+ stays."""
        problems = Problems(4, 0.1)
        problems.advantages = torch.zeros_like(problems.advantages)
        assert total_variation(problems.minimisers(), problems.ref_logps).max() < 1e-12

    def test_needs_the_exact_baseline(self):
        """
        Control: with A + c in place of A the targets are too high by c/beta, and no policy can meet them. For large c
        all residuals are about c/beta, and pi+ = nu (t - u) / lambda goes to nu, however bad that is: states get worse.
        """
        problems = Problems(4, 0.1)
        shifted = minimisers(problems.ref_logps, problems.advantages + 1.0, 0.1, problems.nu)
        assert (problems.improvements(shifted) < -0.01).sum() > N / 10
        limit = minimisers(problems.ref_logps, problems.advantages + 1e5, 0.1, problems.nu)
        assert total_variation(limit, problems.nu.log()).max() < 1e-4


class TestLogPartition:
    r"""
    With the exact log-partition the loss asks for the soft-optimal policy, pi* = pi_ref e^(A/beta) / Z: every residual
    A/beta - log Z - u* is zero, and a loss of zero for nu > 0 has one policy only.
    """

    @staticmethod
    def less_log_partition(problems: Problems, kind: str) -> torch.Tensor:
        """A - beta log Z, where the actions are samples as frequent as the reference takes them; shape (N, C)."""
        rows = zip(problems.advantages.tolist(), problems.ref_logps.exp().tolist(), strict=True)
        shifts = [problems.beta * log_partition(a, problems.beta, p, kind) for a, p in rows]
        return problems.advantages - torch.tensor(shifts, dtype=torch.float64)[:, None]

    @configurations
    def test_minimiser_is_soft_optimal(self, num_actions, beta):
        problems = Problems(num_actions, beta)
        problems.advantages = self.less_log_partition(problems, "sample")
        assert problems.losses(problems.soft_optima()).max() < 1e-18
        rng = torch.Generator().manual_seed(1)
        noise = 0.1 * torch.randn(problems.nu.shape, dtype=torch.float64, generator=rng)
        assert (problems.losses((problems.soft_optima() + noise).log_softmax(-1)) > 1e-8).all()

    def test_without_it_the_minimiser_is_another(self):
        problems = Problems(3, 0.1)
        assert total_variation(problems.minimisers(), problems.soft_optima()).median() > 0.02
        assert problems.losses(problems.soft_optima()).median() > 1e-2

    def test_descent_ends_there(self):
        problems = Problems(4, 0.3)
        optima, logits = problems.soft_optima(), problems.ref_logps.clone().requires_grad_()
        problems.advantages = self.less_log_partition(problems, "sample")
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = problems.losses(logits.log_softmax(-1)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert total_variation(logits.detach().log_softmax(-1), optima).max() < 1e-6

    def test_gaussian_is_near_for_large_beta_only(self):
        """
        Of random states with five actions, the error of log Z is 0.02 nats at most where beta is 1, 0.6 in the median
        where it is 0.1, and tens of nats at 0.02, where the Gaussian form is larger than any log-partition could be.
        """
        errors = {}
        for beta in (1.0, 0.1, 0.02):
            problems = Problems(5, beta)
            shifts = [self.less_log_partition(problems, kind)[:, 0] for kind in ("gaussian", "sample")]
            errors[beta] = (shifts[0] - shifts[1]).abs() / beta
        assert errors[1.0].max() < 0.02
        assert 0.3 < errors[0.1].median() < 1.0
        assert errors[0.02].median() > 20


class Trees:
    """
    Random step-level problems: complete trees of K steps with B actions each, rewards 0 or 1 at the end.

    A policy is a list of log-probabilities, one tensor of shape (num_trees, B^t, B) for the states at each time t < K;
    values are a list of tensors of shape (num_trees, B^t), t = 0..K.
    """

    def __init__(self, beta: float, num_trees: int = 50, num_steps: int = 4, num_actions: int = 3):
        self.rng = torch.Generator().manual_seed(0)
        self.beta = beta
        self.shapes = [(num_trees, num_actions**t, num_actions) for t in range(num_steps)]
        self.rewards = (torch.rand(num_trees, num_actions**num_steps, generator=self.rng) < 0.3).double()
        self.reference = self.random_policy()

    def random_policy(self) -> list[torch.Tensor]:
        return [torch.randn(s, dtype=torch.float64, generator=self.rng).log_softmax(-1) for s in self.shapes]

    def values(self, policy: list[torch.Tensor], beta: float | None = None) -> list[torch.Tensor]:
        """V_pi of every state, by backward recursion; `beta=0` gives the probability of success."""
        beta = self.beta if beta is None else beta
        values = [self.rewards]
        for logps, ref_logps in zip(reversed(policy), reversed(self.reference), strict=True):
            values.append((logps.exp() * (values[-1].view_as(logps) - beta * (logps - ref_logps))).sum(-1))
        return values[::-1]

    def advantages(self, policy: list[torch.Tensor]) -> list[torch.Tensor]:
        """A(s, a) = V_pi(s∘a) - V_pi(s)."""
        values = self.values(policy)
        return [after.view_as(p) - v[..., None] for p, v, after in zip(policy, values, values[1:], strict=False)]

    def optimal_values(self) -> list[torch.Tensor]:
        """V* = beta log E_{a~pi_ref} exp(V*(s∘a) / beta)."""
        values = [self.rewards]
        for ref_logps in reversed(self.reference):
            values.append(self.beta * (ref_logps + values[-1].view_as(ref_logps) / self.beta).logsumexp(-1))
        return values[::-1]

    def visits(self, policy: list[torch.Tensor]) -> list[torch.Tensor]:
        """Probability that a solution goes through each state."""
        visits = [torch.ones(self.shapes[0][:2], dtype=torch.float64)]
        for logps in policy[:-1]:
            visits.append((visits[-1][..., None] * logps.exp()).flatten(1))
        return visits

    def improved(self, policy: list[torch.Tensor]) -> list[torch.Tensor]:
        """pi+ in every state, from the exact advantages of `policy` and actions drawn from an arbitrary nu > 0."""
        nus = [logps.exp() for logps in self.random_policy()]
        states = zip(self.reference, self.advantages(policy), nus, strict=True)
        return [minimisers(ref_logps, advantages, self.beta, nu) for ref_logps, advantages, nu in states]


class TestImprovementOfAllStates:
    r"""
    If I_s(pi+) >= 0 in every state, no state loses: subtracting V_k(s) from the recursion of V_+ gives

        V_+(s) - V_k(s) = I_s(pi+) + E_{a~pi+} [V_+(s∘a) - V_k(s∘a)],

    so that the gain of a state is the sum of I over the states that pi+ visits from there.
    """

    @pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
    @generators
    def test_no_state_loses(self, beta, generator_is_reference):
        """Every state gains that is not optimal already; those whose solutions are all alike stay where they are."""
        trees = Trees(beta)
        policy = trees.reference if generator_is_reference else trees.random_policy()
        before, after, optimal = trees.values(policy), trees.values(trees.improved(policy)), trees.optimal_values()
        for v_k, v_plus, v_star in zip(before[:-1], after[:-1], optimal[:-1], strict=True):
            is_optimal = v_star - v_k < 1e-12
            assert (v_plus >= v_k - 1e-12).all()
            assert (v_plus <= v_star + 1e-12).all()
            assert (v_plus > v_k + 1e-9)[~is_optimal].all()
            assert (~is_optimal).any()
        # Some last steps make no difference. Off the reference, pi_k pays a penalty even there.
        assert is_optimal.any() == generator_is_reference

    @generators
    def test_gain_is_the_sum_of_improvements(self, generator_is_reference):
        trees = Trees(0.2)
        policy = trees.reference if generator_is_reference else trees.random_policy()
        improved = trees.improved(policy)
        gains = sum(
            (visits * improvements(logps, ref_logps, advantages, 0.2)).sum(-1)
            for visits, logps, ref_logps, advantages in zip(
                trees.visits(improved), improved, trees.reference, trees.advantages(policy), strict=True
            )
        )
        expected = trees.values(improved)[0] - trees.values(policy)[0]
        torch.testing.assert_close(gains, expected[:, 0], rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
    @generators
    def test_gradient_of_the_objective(self, beta, generator_is_reference):
        """
        `TestGradientIdentity` for whole solutions: over the states that pi_k visits and the actions it takes there,
        grad L(pi_k) = -1/beta grad V(s_0), because grad V(s_0) is the sum over visited states of grad I_s.
        """
        trees = Trees(beta)
        policy = trees.reference if generator_is_reference else trees.random_policy()
        logits = [logps.clone().requires_grad_() for logps in policy]
        of_value = torch.autograd.grad(trees.values([x.log_softmax(-1) for x in logits])[0].sum(), logits)
        loss = 0.0
        states = zip(trees.visits(policy), logits, trees.reference, trees.advantages(policy), strict=True)
        for visits, x, ref_logps, advantages in states:
            weights = visits[..., None] * x.detach().exp()
            pairs = [y.flatten() for y in (x.log_softmax(-1), ref_logps, advantages)]
            loss = loss + dapo_loss(*pairs, beta, weights.flatten(), reduction="sum")
        of_loss = torch.autograd.grad(loss, logits)
        for gradient, expected in zip(of_loss, of_value, strict=True):
            torch.testing.assert_close(gradient, -expected / beta, rtol=1e-8, atol=1e-11)

    def test_repeated_with_a_fixed_reference_it_goes_to_the_optimum(self):
        """V_k rises in every state and every round, and its distance to V* goes to zero."""
        trees = Trees(0.5, num_trees=20, num_steps=3)
        policy, optimal = trees.reference, trees.optimal_values()
        before = trees.values(policy)
        first_gap = (optimal[0] - before[0]).max()
        for _ in range(20):
            policy = trees.improved(policy)
            after = trees.values(policy)
            assert all((new >= old - 1e-12).all() for new, old in zip(after, before, strict=True))
            before = after
        assert (optimal[0] - before[0]).max() < 1e-6 * first_gap

    def test_repeated_with_the_new_policy_as_reference_success_rises(self):
        """
        The paper's iteration: pi+ becomes generator and reference. V_k is then the probability of success and V_+ that
        of pi+ minus its penalty, so that the probability of success rises in every state, by the penalty at least.
        """
        trees = Trees(0.5, num_trees=20, num_steps=3)
        before = trees.values(trees.reference, beta=0)
        for _ in range(20):
            improved = trees.improved(trees.reference)
            regularised, after = trees.values(improved), trees.values(improved, beta=0)
            for old, middle, new in zip(before, regularised, after, strict=True):
                assert (old - 1e-12 <= middle).all() and (middle <= new + 1e-12).all()
            trees.reference, before = improved, after
        assert (trees.rewards.amax(-1) == 1).all()  # every problem has a correct solution
        assert before[0].min() > 0.99


class TestNotSoftOptimal:
    """
    pi+ is not pi_ref exp(A/beta) / Z, the policy that maximises I_s: this loss has no log-partition to subtract.
    """

    def test_by_hand(self):
        r"""
        Two actions, pi_ref = nu = (1/2, 1/2), beta = 1 and advantages a, -a. For pi+ = (3/4, 1/4) the optimality
        condition asks for

            a - log(3/2) = 2 lambda 3/4   and   -a + log 2 = 2 lambda 1/4,

        whose sum is log(4/3) = 2 lambda, so that a = log 2 - log(4/3)/4 = 0.6212. The soft-optimal policy has odds of
        exp(2a) = 4 / sqrt(4/3) = 2 sqrt(3): a first probability of 2 sqrt(3) / (2 sqrt(3) + 1) = 0.776, not 0.75.
        """
        problems = Problems(2, 1.0)
        problems.ref_logps = problems.logps_k = torch.full((N, 2), math.log(1 / 2), dtype=torch.float64)
        problems.nu = problems.ref_logps.exp()
        a = math.log(2) - math.log(4 / 3) / 4
        problems.advantages = torch.tensor([a, -a], dtype=torch.float64).expand(N, 2)
        first = problems.minimisers().exp()[0, 0].item()
        soft = problems.soft_optima().exp()[0, 0].item()
        assert first == pytest.approx(3 / 4, rel=1e-12)
        assert soft == pytest.approx(2 * math.sqrt(3) / (2 * math.sqrt(3) + 1), rel=1e-12)
        assert problems.losses(problems.minimisers())[0] < problems.losses(problems.soft_optima())[0]

    @pytest.mark.parametrize(("num_actions", "beta"), [(2, 0.2), (3, 0.1), (5, 0.5), (16, 0.05)])
    @generators
    def test_each_is_best_at_its_own(self, num_actions, beta, generator_is_reference):
        """The two differ; pi+ has the lower loss, the soft-optimal policy the higher I_s, which is beta log Z."""
        problems = Problems(num_actions, beta, generator_is_reference)
        ours, soft = problems.minimisers(), problems.soft_optima()
        assert total_variation(ours, soft).median() > 0.01
        assert (problems.losses(ours) < problems.losses(soft)).all()
        assert (problems.improvements(soft) > problems.improvements(ours)).all()
        partition = (problems.ref_logps + problems.advantages / beta).logsumexp(-1)
        torch.testing.assert_close(problems.improvements(soft), beta * partition, rtol=1e-9, atol=1e-12)

    @configurations
    @generators
    def test_the_same_where_actions_are_drawn_from_the_optimum(self, num_actions, beta, generator_is_reference):
        """For nu = pi_ref exp(A/beta) / Z the condition says A/beta - u = lambda, a constant: the log-partition."""
        problems = Problems(num_actions, beta, generator_is_reference)
        soft = problems.soft_optima()
        problems.nu = soft.exp()
        assert total_variation(problems.minimisers(), soft).max() < 1e-10

    def test_the_same_to_first_order_for_large_beta(self):
        """
        Near the reference both are pi_ref (1 + A/beta): the multiplier is of second order in 1/beta, because the mean
        of A is 0. Twice the beta, half the distance to the reference, a quarter of the distance between the two.
        """
        between, moved = [], []
        for beta in (50.0, 100.0):
            problems = Problems(5, beta)
            ours, soft = problems.minimisers(), problems.soft_optima()
            between.append(total_variation(ours, soft).mean().item())
            moved.append(total_variation(ours, problems.ref_logps).mean().item())
        assert moved[1] / moved[0] == pytest.approx(1 / 2, rel=0.02)
        assert between[1] / between[0] == pytest.approx(1 / 4, rel=0.05)
