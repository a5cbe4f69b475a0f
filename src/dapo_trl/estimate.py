"""
What a run would cost, before anything is sampled: tokens and GPU-hours of each stage, from a recipe and assumptions.

    problems with signal P', solutions kept k, steps K, tokens of a solution L, completions of a state n
    states        S = 1 + k (K - 1) (1 - shared)        a problem
    completions   S n (1 - reuse) (1 - adaptive)        a problem, each with L (K + 1) / 2K tokens on average
    training      6 FLOPs per parameter and token, 8 with gradient checkpointing, 2 fewer for an adapter
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dapo_trl.assumptions import Assumptions, read_assumptions, with_parameters
from dapo_trl.recipe_arguments import RecipeArguments


if TYPE_CHECKING:
    from dapo_trl.recipe import Recipe


GENERATION_UTILIZATION = 0.3  # of the GPU's FLOPs, by a server of continuous batches
SECONDS_PER_TOKEN = 25e-6  # of a server besides arithmetic: 1.5B parameters make about 20,000 tokens a second, 7B 6,500
SECONDS_PER_STEP = 0.03  # of generation in process, whatever the batch
MEAN_OCCUPANCY = 0.5  # of a batch generated in process: its sequences end at different times
TRAINING_UTILIZATION = 0.35
HELD_OUT = 0.1  # of the problems, on which the critic is measured


@dataclass(frozen=True)
class StageCost:
    """
    What a stage costs.

    Attributes:
        tokens_generated (`float`), tokens_trained (`float`), tokens_scored (`float`):
            Tokens sampled; through forward and backward pass; through a forward pass only.
        gpu_hours (`float`):
            Time that GPUs work.
        hours (`float`):
            Time that passes.
    """

    tokens_generated: float = 0.0
    tokens_trained: float = 0.0
    tokens_scored: float = 0.0
    gpu_hours: float = 0.0
    hours: float = 0.0

    def __add__(self, other: "StageCost") -> "StageCost":
        return StageCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, number: int) -> "StageCost":
        return StageCost(*(getattr(self, field.name) * number for field in fields(self)))


def estimate(recipe: "Recipe") -> dict[str, Any]:
    """
    Tokens and GPU-hours of all stages of a recipe. Nothing is loaded but, if its size is not given, the model's
    configuration, and the problems if `num_train_problems` is not.

    Args:
        recipe ([`~dapo_trl.recipe.Recipe`]):
            The run.

    Returns:
        `dict`: `stages` (name -> [`StageCost`]), `total` ([`StageCost`]), `states` and `completions` of a problem with
        signal, `tokens_per_second` by engine, and `assumptions` ([`~dapo_trl.assumptions.Assumptions`], complete).

    Raises:
        ValueError: if an assumption is bad, or the size of the model is neither given nor found out.
    """
    plan = _Plan(recipe)
    iterations = recipe.arguments.iterations
    stages = {
        "evaluation before": plan.evaluation(after=False),
        "solutions": plan.solutions() * iterations,
        "completions": plan.completions() * iterations,
    }
    if recipe.arguments.values != "monte_carlo":
        num_critics = recipe.arguments.num_critics
        trainings = num_critics * (iterations if recipe.arguments.later_critics == "train" else 1)
        stages |= {"critic": plan.critic() * trainings, "scoring": plan.scoring() * iterations * num_critics}
    num_policies = iterations * (2 if recipe.arguments.values == "both" else 1)
    stages |= {"policy": plan.policy() * num_policies, "evaluation after": plan.evaluation(after=True) * num_policies}
    return {
        "stages": stages,
        "total": sum(stages.values(), StageCost()),
        "states": plan.num_states,
        "completions": plan.num_completions,
        "tokens_per_second": plan.rates(),
        "assumptions": plan.assumed,
    }


class _Plan:
    """The numbers of a recipe that its stages share. All tokens are those of one iteration."""

    def __init__(self, recipe: "Recipe") -> None:
        a = self.arguments = recipe.arguments
        self.assumed = with_parameters(read_assumptions(a), recipe)
        self.is_adapter = bool(recipe.model_config.use_peft)
        assumed = self.assumed
        num_problems = len(recipe.problems["train"]) if a.num_train_problems is None else a.num_train_problems
        wanted = math.inf if a.num_problems_with_signal is None else a.num_problems_with_signal
        self.num_sampled = min(num_problems, wanted / assumed.signal)
        self.num_kept = self.num_sampled * assumed.signal
        self.solution_tokens = assumed.solution_tokens or 0.0
        distinct = 1 - assumed.shared
        self.num_states = 1 + a.num_kept * (assumed.steps - 1) * distinct
        drawn = (1 - assumed.reuse) * (1 - (assumed.adaptive or 0.0))
        self.num_completions = self.num_states * a.num_completions * drawn
        self.kept_tokens = a.num_kept * self.solution_tokens * distinct  # of a problem's kept solutions, as a tree
        self.num_rows = self.num_states * assumed.contrast  # state rows of a problem that are trained on

    # ---- Stages ----

    def evaluation(self, after: bool) -> StageCost:
        a = self.arguments
        # the servers have the policy before training only; in process, one process samples
        is_in_process = a.engine != "openai" or after
        engine = self._engine_after if after else a.engine
        tokens = a.num_test_problems * (1 + a.eval_k) * self.solution_tokens
        return self._generation(tokens, engine, 1 if is_in_process else self.assumed.num_generation_gpus)

    def solutions(self) -> StageCost:
        tokens = self.num_sampled * self.arguments.num_solutions * self.solution_tokens
        return self._generation(tokens, self.arguments.engine, self.assumed.num_generation_gpus)

    def completions(self) -> StageCost:
        steps = self.assumed.steps
        tokens = self.num_kept * self.num_completions * self.solution_tokens * (steps + 1) / (2 * steps)
        return self._generation(tokens, self.arguments.engine, self.assumed.num_generation_gpus)

    def critic(self) -> StageCost:
        given, num_problems = self.arguments.critic, self.num_kept * (1 - HELD_OUT)
        num_rows, tree = float(self.arguments.num_kept), self.kept_tokens
        if self.arguments.critic_states == "candidates":  # each a row of its own, whose last step alone is new
            num_candidates = self.num_rows * self.assumed.siblings
            num_rows += num_candidates
            tree += num_candidates * self.solution_tokens / self.assumed.steps
        tokens = num_problems * self._row_tokens(given, num_rows, num_rows, tree, self.solution_tokens)
        tokens *= self._passes(given, num_problems * num_rows)
        return self._training(tokens, 0.0, self.assumed.critic_parameters, given)

    def scoring(self) -> StageCost:
        given, num_rows = self.arguments.critic, self.arguments.num_kept
        solutions = self._row_tokens(given, num_rows, num_rows, self.kept_tokens, self.solution_tokens)
        tokens = self.num_kept * (solutions + self._state_tokens(given, 1.0))
        return self._training(0.0, tokens, self.assumed.critic_parameters, given)

    def policy(self) -> StageCost:
        given = self.arguments.policy
        if self.arguments.anchor_states:  # as if there were nothing to compare at all other states
            num_rows, tokens = self.num_states, self._anchored_tokens(given)
        else:
            num_rows, tokens = self.num_rows, self._state_tokens(given, self.assumed.contrast)
        tokens *= self.num_kept
        passes = self._passes(given, self.num_kept * num_rows)
        num_reference = 1.0 if given.get("precompute_ref_log_probs", True) else passes
        return self._training(tokens * passes, tokens * num_reference, self.assumed.num_parameters, given)

    # ---- Tokens ----

    def _state_tokens(self, given: dict[str, Any], share: float) -> float:
        """Tokens of a problem's state rows, of which a share is used."""
        steps, num_rows = self.assumed.steps, self.num_states * share
        # Prefixes reach to the last state that is used: so many lie behind it, if each is used with this chance.
        unused = (1 - share) / share * (1 - (1 - share) ** steps)
        prefixes = self.kept_tokens * max(steps - 1 - unused, 0.0) / steps
        num_siblings = num_rows * self.assumed.siblings
        tree = prefixes + num_siblings * self.solution_tokens / steps
        return self._row_tokens(given, num_rows, num_rows + num_siblings, tree, self.solution_tokens / 2)

    def _anchored_tokens(self, given: dict[str, Any]) -> float:
        """Tokens of a problem's states, all of which are used, and of the next steps that no kept solution takes."""
        num_siblings = self.num_rows * self.assumed.siblings
        tree = self.kept_tokens + num_siblings * self.solution_tokens / self.assumed.steps
        num_steps = self.num_states + num_siblings
        return self._row_tokens(given, self.num_states, num_steps, tree, self.solution_tokens / 2)

    def _row_tokens(
        self, given: dict[str, Any], num_rows: float, num_sequences: float, tree: float, path: float
    ) -> float:
        """Tokens of a problem's rows: each once, but for the path to where a batch cuts its tree; or padded."""
        if given.get("layout", "tree") == "padded":
            return num_sequences * (self.assumed.prompt_tokens + path)
        cuts = max(num_rows / int(given.get("per_device_train_batch_size", 8)) - 1, 0.0)
        return self.assumed.prompt_tokens + tree + cuts * (self.assumed.prompt_tokens + path)

    def _passes(self, given: dict[str, Any], num_rows: float) -> float:
        """How often training goes over its rows."""
        max_steps = int(given.get("max_steps", -1))
        if max_steps <= 0:
            return float(given.get("num_train_epochs", 1.0))
        batch = int(given.get("per_device_train_batch_size", 8)) * int(given.get("gradient_accumulation_steps", 1))
        return max_steps * batch * self.assumed.num_gpus / num_rows

    # ---- Time ----

    def _generation(self, tokens: float, engine: str, num_gpus: float | None) -> StageCost:
        hours = tokens / self._tokens_per_second(engine) / 3600
        return StageCost(tokens_generated=tokens, gpu_hours=hours, hours=hours / (num_gpus or 1))

    def rates(self) -> dict[str, float]:
        """Tokens per second and GPU of the engines that the run uses: the trained policy of servers runs in process."""
        engine = self.arguments.engine
        return {name: self._tokens_per_second(name) for name in dict.fromkeys((engine, self._engine_after))}

    @property
    def _engine_after(self) -> str:
        return "transformers" if self.arguments.engine == "openai" else self.arguments.engine

    def _tokens_per_second(self, engine: str) -> float:
        if self.assumed.generation_tokens_per_second is not None:
            return self.assumed.generation_tokens_per_second
        flops = GENERATION_UTILIZATION * self.assumed.gpu_tflops * 1e12
        rate = 1 / (2 * (self.assumed.num_parameters or 0.0) / flops + SECONDS_PER_TOKEN)
        if engine != "transformers":
            return rate
        return min(rate, MEAN_OCCUPANCY * self.arguments.generation_batch_size / SECONDS_PER_STEP)

    def _training(
        self, trained: float, scored: float, num_parameters: float | None, given: dict[str, Any]
    ) -> StageCost:
        flops_per_token = 6 + 2 * bool(given.get("gradient_checkpointing", True)) - 2 * self.is_adapter
        flops = (flops_per_token * trained + 2 * scored) * (num_parameters or 0.0)
        hours = flops / (TRAINING_UTILIZATION * self.assumed.gpu_tflops * 1e12) / 3600
        return StageCost(0.0, trained, scored, hours, hours / self.assumed.num_gpus)


# ---- What a person sees ----


def print_estimate(recipe: "Recipe") -> None:
    """
    Print what a recipe would cost, with everything that was taken for granted.

    Args:
        recipe ([`~dapo_trl.recipe.Recipe`]):
            The run.
    """
    from accelerate import PartialState
    from rich.table import Table

    from dapo_trl.summary import console

    if not PartialState().is_main_process:
        return
    cost = estimate(recipe)
    table = Table("stage", title="Estimate")
    for name in ("tokens generated", "tokens trained", "tokens scored", "GPU-hours", "hours"):
        table.add_column(name, justify="right")
    for name, stage in cost["stages"].items():
        table.add_row(name, *_cells(stage))
    table.add_section()
    table.add_row("together", *_cells(cost["total"]))
    console.print(table)
    for line in [cost_line(cost), "", *_footer(recipe.arguments, cost)]:
        console.print(line, markup=False, highlight=False)


def cost_line(cost: dict[str, Any]) -> str:
    """
    What a run costs, in a sentence.

    Args:
        cost (`dict`):
            What [`estimate`] gave.

    Returns:
        `str`.
    """
    generated, trained, scored, gpu_hours, hours = _cells(cost["total"])
    return f"{generated} tokens generated, {trained} trained, {scored} scored; {gpu_hours} GPU-hours, {hours} hours."


def _cells(stage: StageCost) -> list[str]:
    tokens = (stage.tokens_generated, stage.tokens_trained, stage.tokens_scored)
    return [*map(_large, tokens), *map(_short, (stage.gpu_hours, stage.hours))]


def _large(number: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= 0.9995 * size:
            return _short(number / size) + unit
    return _short(number)


def _short(number: float) -> str:
    """Three digits at most, which is more than an estimate is worth."""
    if number == 0:
        return "-"
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2g}"


def _footer(arguments: RecipeArguments, cost: dict[str, Any]) -> list[str]:
    a: Assumptions = cost["assumptions"]
    used = f"{a.contrast:.0%} of the states are trained on,"
    if arguments.anchor_states:
        used = f"All states are trained on, {a.contrast:.0%} of them"
    rates = {engine: f"{cost['tokens_per_second'][engine]:,.0f}" for engine in cost["tokens_per_second"]}
    speeds = ", ".join(f"{rate} with the engine {engine!r}" for engine, rate in rates.items())
    lines = [
        f"Policy of {_large(a.num_parameters or 0)} parameters, critic of {_large(a.critic_parameters or 0)}.",
        f"A prompt has {a.prompt_tokens:,.0f} tokens, a solution {a.solution_tokens:,.0f} tokens in {a.steps:g} steps.",
        f"{a.signal:.0%} of the problems have right and wrong solutions; each of these has {cost['states']:,.0f} "
        f"states ({a.shared:.0%} of those of kept solutions shared) and draws {cost['completions']:,.0f} completions "
        f"({a.reuse:.0%} saved by reuse, {a.adaptive or 0:.0%} of the rest by adaptive budgets).",
        f"{used} with {a.siblings:g} next steps each that no kept solution took. Tokens that rows of a batch "
        "share are counted once under the layout 'tree'.",
        f"Tokens generated a second and GPU: {speeds}.",
        "Training takes 6 FLOPs per parameter and token, 8 with gradient checkpointing, 2 fewer for an adapter; "
        f"scoring 2; at {TRAINING_UTILIZATION:.0%} of {a.gpu_tflops:g} TFLOPS.",
        f"GPUs that train: {a.num_gpus:g}; that sample: {a.num_generation_gpus or 0:g}; evaluation in process uses 1. "
        "GPU-hours are those of GPUs at work. Not counted: reading prefixes, judging, loading, saving.",
        "Set what you know better in the recipe's section `estimate`; the manifest of a first shard tells.",
    ]
    return [f"- {line}" for line in lines]
