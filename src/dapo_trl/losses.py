"""
The two losses of Direct Advantage Policy Optimization, as pure functions of tensors.

Shapes: P pairs (state, action), S states. Both losses are means over *everything the optimizer step sees*: a caller
that splits a step into micro-batches asks for `reduction="sum"` and divides by the total weight itself.
"""

import torch
import torch.nn.functional as F


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
