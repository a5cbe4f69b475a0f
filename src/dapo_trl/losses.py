"""
The two losses of Direct Advantage Policy Optimization, and a listwise one, as pure functions of tensors.

Shapes: P pairs (state, action), S states. The losses are means over *everything the optimizer step sees*: a caller
that splits a step into micro-batches asks for `reduction="sum"` and divides by the total weight itself.
"""

import math

import torch
import torch.nn.functional as F


_LEAST_VALUE = 1e-3  # added to the values of listwise targets: no candidate is asked to become impossible


def dapo_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    advantages: torch.Tensor,
    beta: float,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""
    Direct Advantage Policy Optimization loss: each step's log-ratio is regressed onto its scaled advantage.

    $$
    L = \frac{1}{2} \, \mathrm{mean}_{(s, a)} \left( \frac{\hat A(s, a)}{\beta}
        - \log \frac{\pi(a \mid s)}{\pi_\mathrm{ref}(a \mid s)} \right)^2
    $$

    where log pi(a|s) is the plain sum of the step's token log-probabilities, in nats. There is no clipping, no
    log-partition and no extra KL term. Source: arXiv 2412.18279, policy objective; the advantage and the reference are
    constants.

    Args:
        logps (`torch.Tensor` of shape `(P,)`):
            Log-probability of each step under the policy.
        ref_logps (`torch.Tensor` of shape `(P,)`):
            Log-probability of each step under the reference policy.
        advantages (`torch.Tensor` of shape `(P,)`):
            Advantage of each step, in units of the success probability: in [-1, 1].
        beta (`float`):
            Scale of the target. A small beta asks for a large log-ratio.
        weights (`torch.Tensor` of shape `(P,)`, *optional*):
            Weight of each pair in the mean. `None` weighs every pair the same, as the paper does.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (weighted mean over pairs), `"sum"` (weighted sum over pairs) or `"none"` (one value a pair,
            weight included).

    Returns:
        `torch.Tensor`: the loss in float32 (float64 for float64 input), a scalar or of shape `(P,)`.

    Raises:
        ValueError: if `beta` is not positive, shapes differ, or `reduction` is unknown.

    Example:

    ```python
    >>> import torch
    >>> from dapo_trl.losses import dapo_loss

    >>> zeros = torch.zeros(2)
    >>> dapo_loss(zeros, zeros, torch.tensor([0.5, -0.5]), beta=0.1)  # targets of 5 and -5 nats, none of it reached
    tensor(12.5000)

    ```
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}. The paper uses 0.01 or 0.02.")
    _check_same_shape(logps=logps, ref_logps=ref_logps, advantages=advantages, weights=weights)
    target = _at_least_float32(advantages) / beta
    log_ratio = _at_least_float32(logps) - _at_least_float32(ref_logps)
    return _reduce(0.5 * (target - log_ratio) ** 2, weights, reduction)


def listwise_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    values: torch.Tensor,
    state_index: torch.Tensor,
    weights: torch.Tensor | None = None,
    value_power: float = 1.0,
    ref_power: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""
    Listwise distillation: among the candidates of a state, the policy is drawn towards a distribution that prefers
    those of high value.

    $$
    L = \mathrm{mean}_s \; \mathrm{KL}(q_s \,\|\, p_s), \qquad
    q_s(a) \propto \pi_\mathrm{ref}(a \mid s)^{w_1} \, (V(s \circ a) + \epsilon)^{w_2}, \qquad
    p_s = \mathrm{softmax}_a \log \pi(a \mid s)
    $$

    Only the candidates' shares among each other count: what they have together of the policy's probability is not
    asked for. Where the powers are 1 and the candidates are all actions, $q = \pi_\mathrm{ref} V / E[V]$ has at least
    the reference's success in every state. Source: the listwise distillation of DriveDPO (arXiv 2509.17940), whose
    similarity to an expert is the reference's probability here; epsilon is 0.001.

    Args:
        logps (`torch.Tensor` of shape `(P,)`):
            Log-probability of each step under the policy.
        ref_logps (`torch.Tensor` of shape `(P,)`):
            Log-probability of each step under the reference policy.
        values (`torch.Tensor` of shape `(P,)`):
            Value of the state that each step leads to, in [0, 1].
        state_index (`torch.Tensor` of shape `(P,)`, int64):
            State of each pair: numbers from 0.
        weights (`torch.Tensor` of shape `(P,)`, *optional*):
            Pairs of weight 0 are left out of their state; other weights do not matter, as the reference's
            probability says how frequent a candidate is. `None` leaves none out.
        value_power (`float`, *optional*, defaults to `1.0`):
            w_2: 0 asks for no change (with `ref_power` 1), infinity would ask for the best candidate only.
        ref_power (`float`, *optional*, defaults to `1.0`):
            w_1: 0 forgets the reference.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over states with candidates, `"sum"` over them, or `"none"` (one value a state, 0 without
            candidates).

    Returns:
        `torch.Tensor`: the loss in nats, float32 (float64 for float64 input), a scalar or of shape `(S,)`.

    Raises:
        ValueError: if shapes differ, a power is negative, or `reduction` is unknown.

    Example:

    ```python
    >>> import torch
    >>> from dapo_trl.losses import listwise_loss

    >>> logps, state = torch.tensor([0.5, 0.5]).log(), torch.tensor([0, 0])
    >>> listwise_loss(logps, logps, torch.tensor([0.6, 0.6]), state)  # no candidate is better than the other
    tensor(0.)
    >>> listwise_loss(logps, logps, torch.tensor([1.0, 0.0]), state)  # q is 0.999 and 0.001
    tensor(0.6853)

    ```
    """
    _check_same_shape(logps=logps, ref_logps=ref_logps, values=values, state_index=state_index, weights=weights)
    if not (0 <= value_power < math.inf and 0 <= ref_power < math.inf):
        raise ValueError(f"Powers must be 0 or more, and finite, got {value_power=} and {ref_power=}.")
    logps, ref_logps, values = map(_at_least_float32, (logps, ref_logps, values))
    if weights is not None:
        kept = weights > 0
        logps, ref_logps, values = logps[kept], ref_logps[kept], values[kept]
    else:
        kept = torch.ones_like(state_index, dtype=torch.bool)
    num_states = int(state_index.max()) + 1 if len(state_index) else 0
    states = state_index[kept]
    log_q = _log_softmax_by(states, ref_power * ref_logps + value_power * (values + _LEAST_VALUE).log(), num_states)
    log_p = _log_softmax_by(states, logps, num_states)
    losses = torch.zeros(num_states, dtype=log_p.dtype, device=log_p.device)
    losses = losses.index_add(0, states, log_q.exp() * (log_q - log_p))
    counted = torch.zeros_like(losses).index_fill(0, states, 1.0)
    return _reduce(losses, counted, reduction)


def critic_loss(
    logits: torch.Tensor,
    successes: torch.Tensor,
    rollouts: torch.Tensor,
    weighting: str = "rollouts",
    reduction: str = "mean",
) -> torch.Tensor:
    r"""
    Binomial negative log-likelihood of the Monte Carlo counts: the soft binary cross-entropy weighted by its rollouts.

    With k successes in n rollouts of a state and V = sigmoid(logit), each state contributes

    $$
    n \left[ -\frac{k}{n} \log V - \left(1 - \frac{k}{n}\right) \log (1 - V) \right]
    $$

    so that a state seen 16 times counts as much as 16 states seen once. `weighting="uniform"` gives every state the
    same weight, which is the paper's form (arXiv 2412.18279, critic training: cross-entropy on the mean correctness).

    Args:
        logits (`torch.Tensor` of shape `(S,)`):
            Logit of the value of each state.
        successes (`torch.Tensor` of shape `(S,)`):
            Number of rollouts from each state that ended correct; need not be whole.
        rollouts (`torch.Tensor` of shape `(S,)`):
            Number of rollouts from each state. A state without any has no weight.
        weighting (`str`, *optional*, defaults to `"rollouts"`):
            `"rollouts"` or `"uniform"`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` (weighted mean over states), `"sum"` (weighted sum over states) or `"none"` (one value a state,
            weight included).

    Returns:
        `torch.Tensor`: the loss in nats, float32 (float64 for float64 input), a scalar or of shape `(S,)`.

    Raises:
        ValueError: if shapes differ, or `weighting` or `reduction` is unknown.

    Example:

    ```python
    >>> import torch
    >>> from dapo_trl.losses import critic_loss

    >>> critic_loss(torch.zeros(2), torch.tensor([1.0, 4.0]), torch.tensor([4.0, 4.0]))  # V = 1/2 everywhere: log 2
    tensor(0.6931)

    ```
    """
    _check_same_shape(logits=logits, successes=successes, rollouts=rollouts)
    logits = _at_least_float32(logits)
    targets = successes.to(logits.dtype) / rollouts.to(logits.dtype).clamp(min=torch.finfo(logits.dtype).tiny)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _reduce(losses, critic_weights(rollouts, weighting), reduction)


def critic_weights(rollouts: torch.Tensor, weighting: str) -> torch.Tensor:
    """
    Weight of each state in the critic's mean.

    Args:
        rollouts (`torch.Tensor` of shape `(S,)`):
            Number of rollouts from each state.
        weighting (`str`):
            `"rollouts"` (the counts themselves) or `"uniform"` (one, or zero for a state without rollouts).

    Returns:
        `torch.Tensor` of shape `(S,)`.

    Raises:
        ValueError: if `weighting` is unknown.
    """
    if weighting == "rollouts":
        return rollouts
    if weighting == "uniform":
        return (rollouts > 0).to(rollouts.dtype)
    raise ValueError(f"`weighting` must be 'rollouts' or 'uniform', got {weighting!r}.")


def _log_softmax_by(groups: torch.Tensor, scores: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Log-softmax of scores within groups: shapes `(P,)`."""
    most = torch.full((num_groups,), -torch.inf, dtype=scores.dtype, device=scores.device)
    most = most.scatter_reduce(0, groups, scores.detach(), reduce="amax")
    shifted = scores - most[groups]
    total = torch.zeros_like(most).index_add(0, groups, shifted.exp())
    return shifted - total[groups].log()


def _reduce(losses: torch.Tensor, weights: torch.Tensor | None, reduction: str) -> torch.Tensor:
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    if reduction == "none":
        return losses * weights
    if reduction == "sum":
        return (losses * weights).sum()
    if reduction == "mean":
        return (losses * weights).sum() / weights.sum()
    raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none', got {reduction!r}.")


def _check_same_shape(**tensors: torch.Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"All tensors must have the same shape, one entry a pair or state, got {shapes}.")


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
