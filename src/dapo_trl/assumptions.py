"""
What an estimate of a run takes for granted: the section `estimate` of a recipe, and what follows from the rest of it.
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from dapo_trl.recipe_arguments import RecipeArguments


if TYPE_CHECKING:
    from dapo_trl.recipe import Recipe


@dataclass(frozen=True)
class Assumptions:
    """
    What an estimate takes for granted; the section `estimate` of a recipe.

    Args:
        num_parameters (`float`, *optional*):
            Parameters of the policy. By default counted from its configuration, without loading weights.
        critic_parameters (`float`, *optional*):
            Parameters of the critic. By default those of the policy, or counted if it has a backbone of its own.
        prompt_tokens (`float`, *optional*, defaults to `150`):
            Mean length of a prompt.
        solution_tokens (`float`, *optional*):
            Mean length of a solution. `None` takes a third of `max_new_tokens`.
        steps (`float`, *optional*, defaults to `20`):
            Steps of a solution.
        signal (`float`, *optional*, defaults to `0.8`):
            Share of the problems with right and wrong solutions: only they get completions.
        shared (`float`, *optional*, defaults to `0.0`):
            Share of a kept solution's states, besides the prompt, that another kept one has too.
        reuse (`float`, *optional*, defaults to `0.3`):
            Share of the completions that need not be drawn, because those of earlier states pass through.
        adaptive (`float`, *optional*):
            Share of the rest that adaptive budgets save. `None` takes 0 without `min_completions`, otherwise half of
            what they could save.
        contrast (`float`, *optional*, defaults to `0.5`):
            Share of the states whose next steps differ enough in advantage to be trained on.
        siblings (`float`, *optional*, defaults to `3.0`):
            Different next steps of such a state that no kept solution took.
        num_gpus (`float`, *optional*, defaults to `1`):
            GPUs of the run.
        num_generation_gpus (`float`, *optional*):
            GPUs that sample. `None` takes those of the run; set it where servers sample.
        gpu_tflops (`float`, *optional*, defaults to `400`):
            10^12 FLOPs a second that a GPU reaches in matrix products: 400 for one with 80 GB like an H100 in bf16,
            whose data sheet says 989.
        generation_tokens_per_second (`float`, *optional*):
            Of each GPU that samples. `None` derives it from the parameters, the engine and `gpu_tflops`.

    Raises:
        ValueError: if a number is out of range.
    """

    num_parameters: float | None = None
    critic_parameters: float | None = None
    prompt_tokens: float = 150
    solution_tokens: float | None = None
    steps: float = 20
    signal: float = 0.8
    shared: float = 0.0
    reuse: float = 0.3
    adaptive: float | None = None
    contrast: float = 0.5
    siblings: float = 3.0
    num_gpus: float = 1
    num_generation_gpus: float | None = None
    gpu_tflops: float = 400
    generation_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if name in ("signal", "contrast") and not 0 < value <= 1:
                raise ValueError(f"`estimate.{name}` is a share above 0 and up to 1, got {value}.")
            if name in ("shared", "reuse", "adaptive") and not 0 <= value < 1:
                raise ValueError(f"`estimate.{name}` is a share from 0 to below 1, got {value}.")
            if name == "siblings" and value < 0:
                raise ValueError(f"`estimate.siblings` must not be negative, got {value}.")
            if name not in ("signal", "contrast", "shared", "reuse", "adaptive", "siblings") and not value > 0:
                raise ValueError(f"`estimate.{name}` must be positive, got {value}.")


def read_assumptions(arguments: RecipeArguments) -> Assumptions:
    """
    Assumptions of a recipe, with what follows from its other settings filled in, but for numbers of parameters.

    Args:
        arguments ([`~dapo_trl.recipe_arguments.RecipeArguments`]):
            The recipe.

    Returns:
        [`Assumptions`].

    Raises:
        ValueError: if the section `estimate` has an unknown name, or a number that cannot be.
    """
    known = [field.name for field in fields(Assumptions)]
    if unknown := [name for name in arguments.estimate if name not in known]:
        raise ValueError(f"`estimate` has no setting {unknown[0]!r}. There are: {', '.join(known)}.")
    given = {name: _number(name, value) for name, value in arguments.estimate.items() if value is not None}
    could_save = 1 - (arguments.min_completions or arguments.num_completions) / arguments.num_completions
    derived = {
        "solution_tokens": arguments.max_new_tokens / 3,
        "adaptive": 0.5 * could_save,
        "num_generation_gpus": given.get("num_gpus", 1),
    }
    return Assumptions(**{**derived, **given})


def _number(name: str, value: Any) -> float:
    try:  # YAML reads 7.6e9, without a sign, as text
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`estimate.{name}` must be a number, got {value!r}.") from None


def count_parameters(model: str, trust_remote_code: bool = False, revision: str | None = None) -> int:
    """
    Number of a model's parameters, from its configuration: no weights are loaded.

    Args:
        model (`str`):
            Name or path.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow models with Python code of their own.
        revision (`str`, *optional*):
            Branch, tag or commit of a model on the Hub.

    Returns:
        `int`.

    Raises:
        ValueError: if the configuration cannot be read.

    Example:

    ```python
    >>> from dapo_trl.assumptions import count_parameters

    >>> count_parameters("examples/student")
    249536

    ```
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The configuration of {model!r} cannot be read here ({type(error).__name__}). Say how large the model "
            "is: `estimate: {num_parameters: 7.6e9}` in the recipe, and `critic_parameters` if the critic differs."
        ) from error
    return sum(parameter.numel() for parameter in empty.parameters())


def with_parameters(assumed: Assumptions, recipe: "Recipe") -> Assumptions:
    """
    Assumptions with the numbers of parameters, counted where they are not given.

    Args:
        assumed ([`Assumptions`]):
            What is known.
        recipe ([`~dapo_trl.recipe.Recipe`]):
            Says which models.

    Returns:
        [`Assumptions`].

    Raises:
        ValueError: if the size of a model is neither given nor found out.
    """
    given = {name: value for name, value in asdict(assumed).items() if value is not None}
    arguments, trusted = recipe.arguments, recipe.arguments.trust_remote_code
    policy = given.get("num_parameters") or count_parameters(recipe.model, trusted, recipe.revision_of(recipe.model))
    critic = given.get("critic_parameters") or policy
    own = arguments.critic_model_name_or_path
    if own and own != recipe.model and "critic_parameters" not in given and arguments.values != "monte_carlo":
        critic = count_parameters(own, trusted)
    return Assumptions(**given | {"num_parameters": policy, "critic_parameters": critic})
