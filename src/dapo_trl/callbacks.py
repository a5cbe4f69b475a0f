"""
What can be watched while a model trains: the policy's accuracy on held-out problems, the critic's values of solutions.
"""

import contextlib
import html
import random
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.models import unwrap_model_for_generation

from dapo_trl.engines import Engine, SamplingConfig
from dapo_trl.engines.transformers import TransformersEngine
from dapo_trl.evaluation import Outcomes, attempt_problems, pass_at_k
from dapo_trl.inspection import color
from dapo_trl.modeling import transformers_model
from dapo_trl.step_critic_trainer import StepCriticTrainer
from dapo_trl.step_trainer import _StepTrainer


logger = get_logger(__name__)


class AccuracyCallback(TrainerCallback):
    """
    Measures the policy's accuracy on held-out problems while it trains.

    It does so at every evaluation, or every `every_n_steps` steps, and logs `eval_accuracy/greedy`, and with `k` also
    `eval_accuracy/mean_at_k` and `eval_accuracy/pass_at_k`; see `docs/metrics.md`. The numbers join the metrics of the
    evaluation, so that `metric_for_best_model="eval_accuracy/greedy"` with `load_best_model_at_end=True` keeps the most
    accurate checkpoint. Training goes on as if nothing had been measured: random states and modes are restored.

    Several processes share the problems. Weights that DeepSpeed ZeRO-3 has sharded are gathered meanwhile, so each
    device must have room for all of them. It works with any [`~transformers.Trainer`] of a causal language model.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl import AccuracyCallback, DAPOConfig, DAPOTrainer, SamplingConfig, math_reward

    >>> row = {"prompt": "4 - 7 max 2\\n", "prefix": [], "candidates": ["4 - 7 = 7\\n", "4 - 7 = 3\\n"]}
    >>> states = Dataset.from_list([row | {"advantages": [0.4, -0.6]}])
    >>> problems = Dataset.from_list([{"prompt": "9 - 1 min 6\\n", "answer": "6"}])
    >>> kwargs = {"max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    >>> args = DAPOConfig("runs/doctest", **kwargs)
    >>> trainer = DAPOTrainer(model="examples/student", args=args, train_dataset=states, eval_dataset=states)
    >>> trainer.add_callback(AccuracyCallback(trainer, problems, math_reward, SamplingConfig(max_new_tokens=64)))
    >>> 0 <= trainer.evaluate()["eval_accuracy/greedy"] <= 1
    {'eval_...}
    True

    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that the callback will be added to. Add it before an [`~transformers.EarlyStoppingCallback`] that
            shall act on it.
        problems ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns that the reward function takes.
        reward_function (`Callable`):
            TRL reward function; a reward of at least 1/2 counts as correct.
        sampling ([`~dapo_trl.engines.SamplingConfig`], *optional*):
            How to sample. `None` takes the defaults: temperature 1, up to 1,024 tokens.
        k (`int`, *optional*, defaults to `0`):
            Samples per problem, besides greedy decoding; 0 for none.
        is_greedy (`bool`, *optional*, defaults to `True`):
            Whether to decode greedily.
        every_n_steps (`int`, *optional*):
            Measure every so many steps, instead of at each evaluation. An evaluation at such a step has the numbers
            too.
        make_engine (`Callable[[PreTrainedModel], Engine]`, *optional*):
            Gets the policy, without what wraps it for training, and gives the engine that samples from it. `None` takes
            [`TransformersEngine`]. An engine with weights of its own, such as a server, must be given the new ones
            here.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences that the default engine generates at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples: the same at every measurement.

    Raises:
        ValueError: if there is nothing to measure or to measure it with, the trainer's model cannot generate, or its
            weights are sharded by FSDP and `make_engine` is not given.
    """

    def __init__(
        self,
        trainer: Trainer,
        problems: Dataset,
        reward_function: Callable[..., list[float | None]],
        sampling: SamplingConfig | None = None,
        k: int = 0,
        is_greedy: bool = True,
        every_n_steps: int | None = None,
        make_engine: Callable[[PreTrainedModel], Engine] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self._trainer: Any = trainer  # transformers declares its attributes in part only
        if len(problems) == 0:
            raise ValueError("There is no problem to measure accuracy on: `problems` is empty.")
        if k < 0 or not (k or is_greedy):
            raise ValueError(f"There is nothing to measure with {k=} and {is_greedy=}. Set `k` to 1 or more.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self._refuse_trainer(make_engine is None)
        self.problems = problems
        self.reward_function = reward_function
        self.sampling = sampling
        self.k = k
        self.is_greedy = is_greedy
        self.every_n_steps = every_n_steps
        self.make_engine = make_engine or self._default_engine
        self.batch_size = batch_size
        self.seed = seed
        self._is_training = False
        self._last: tuple[int, dict[str, float]] | None = None  # step and what was measured there, in training

    def _refuse_trainer(self, needs_weights: bool) -> None:
        model = transformers_model(self._trainer.model)
        if not model.can_generate():
            raise ValueError(
                f"`AccuracyCallback` measures a policy, but the trainer's model is a {type(model).__name__}, which "
                "generates nothing. Add it to the trainer of the policy."
            )
        if needs_weights and self._trainer.is_fsdp_enabled:
            raise ValueError(
                "`AccuracyCallback` cannot sample from weights that FSDP has sharded: the processes would have to "
                "generate the same number of tokens. Pass `make_engine` with an engine that has weights of its own, "
                "train with DeepSpeed ZeRO, or measure the checkpoints with `dapo-trl eval`."
            )

    # ---- Events ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Training begins: what is measured at a step holds until the next one."""
        self._is_training = True
        callbacks = self._trainer.callback_handler.callbacks
        names = [name for name in self._metric_names() if name.endswith(args.metric_for_best_model or "loss")]
        stops_early = any(isinstance(other, EarlyStoppingCallback) for other in callbacks[: callbacks.index(self)])
        if names and stops_early:
            raise ValueError(
                f"`EarlyStoppingCallback` looks for {names[0]!r} before it is measured. Add it after "
                "`AccuracyCallback`: `trainer.remove_callback(EarlyStoppingCallback)`, then add it again."
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Training ends: from here on the weights may change without a step."""
        self._is_training = False
        self._last = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, if it is time."""
        if self.every_n_steps and state.global_step % self.every_n_steps == 0:
            self._measure(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add accuracies to the metrics of an evaluation; of several evaluation sets, measured with the first."""
        is_known = self._is_training and self._last is not None and self._last[0] == state.global_step
        if not is_known:
            if self.every_n_steps:
                return
            self._measure(state.global_step)
        if metrics is not None and self._last is not None:
            metrics.update(self._last[1])

    # ---- Measurement ----

    def _measure(self, step: int) -> None:
        """Measure and log."""
        trainer = self._trainer
        if isinstance(trainer, _StepTrainer):
            trainer.stop_clock()
        accelerator = trainer.accelerator
        own = range(accelerator.process_index, len(self.problems), accelerator.num_processes)
        wrapped, kwargs = trainer.model_wrapped, trainer.args.gradient_checkpointing_kwargs
        with _undisturbed(trainer.model):
            with unwrap_model_for_generation(wrapped, accelerator, gradient_checkpointing_kwargs=kwargs) as model:
                part = attempt_problems(
                    self.problems.select(own),
                    self.make_engine(model),
                    self.reward_function,
                    self.sampling,
                    self.k,
                    self.seed,
                    self.is_greedy,
                    own,
                    show_progress=accelerator.is_main_process and not trainer.args.disable_tqdm,
                )
            measured = self._metrics(Outcomes.merge(gather_object([part])))
            self._last = step, measured
            awaits_log = trainer.control.should_log
            trainer.log(dict(measured))  # in evaluation mode, so that trainers do not take it for a log of training
            trainer.control.should_log = awaits_log  # or this step's own log would be taken for done

    def _default_engine(self, model: PreTrainedModel) -> Engine:
        return TransformersEngine(model, self._trainer.processing_class, self.batch_size)

    def _metric_names(self) -> list[str]:
        names = ["greedy"] * self.is_greedy + ["mean_at_k", "pass_at_k"] * bool(self.k) + ["truncated", "not_judged"]
        return [f"eval_accuracy/{name}" for name in names]

    def _metrics(self, outcomes: Outcomes) -> dict[str, float]:
        num_solutions = len(self.problems) * (self.k + self.is_greedy)
        values = [outcomes.truncated / num_solutions, outcomes.not_judged / num_solutions]
        if self.k:
            passed = [pass_at_k(self.k, sum(group), self.k) for group in outcomes.sampled]
            values = [float(np.mean(outcomes.sampled)), float(np.mean(passed)), *values]
        if self.is_greedy:
            values = [float(np.mean(outcomes.greedy)), *values]
        return dict(zip(self._metric_names(), values, strict=True))


class SolutionTableCallback(TrainerCallback):
    """
    Logs a table of solutions, each step coloured by the critic's value, at every evaluation.

    Weights & Biases gets the steps in colour, Trackio, whose tables hold text, with the values behind them. Other
    destinations of `report_to` have no tables: that is logged once.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl import SolutionTableCallback, StepCriticConfig, StepCriticTrainer

    >>> row = {"prompt": "4 - 7 max 2\\n", "completions": ["4 - 7 = 3\\n", "3 max 2 = 3\\n", "#### 3"]}
    >>> solutions = Dataset.from_list([row | {"values": [0.5, 0.1, 0.0, 0.0]}])
    >>> args = StepCriticConfig("runs/doctest", bf16=False, use_cpu=True, report_to="none")
    >>> trainer = StepCriticTrainer(model="examples/student", args=args, train_dataset=solutions)
    >>> trainer.add_callback(SolutionTableCallback(trainer, solutions))

    ```

    Args:
        trainer ([`StepCriticTrainer`]):
            Trainer that the callback will be added to.
        solutions ([`~datasets.Dataset`]):
            Solution rows, such as those to evaluate on.
        num_solutions (`int`, *optional*, defaults to `8`):
            Rows of the table, from the beginning.

    Raises:
        TypeError: if `trainer` is not the critic's.
        ValueError: if there is no solution.
    """

    columns: tuple[str, ...] = ("step", "prompt", "solution", "values", "outcome")

    def __init__(self, trainer: StepCriticTrainer, solutions: Dataset, num_solutions: int = 8) -> None:
        if not isinstance(trainer, StepCriticTrainer):
            raise TypeError(
                f"`SolutionTableCallback` shows a critic's values, so it needs a `StepCriticTrainer`, got "
                f"{type(trainer).__name__}."
            )
        if len(solutions) == 0 or num_solutions < 1:
            raise ValueError(f"There is no solution to show: {len(solutions)} `solutions`, {num_solutions=}.")
        self._trainer = trainer
        self.solutions = solutions.select(range(min(num_solutions, len(solutions))))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say so if there is nowhere to log tables to."""
        if not _take_tables(args):
            logger.warning(
                f"`SolutionTableCallback` logs nothing: `report_to={args.report_to}` takes no tables. Weights & Biases "
                'and Trackio do: `report_to="wandb"`.'
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Value the solutions and log them."""
        destinations = _take_tables(args)
        if not destinations:
            return
        with _undisturbed(self._trainer.model):
            valued = self._trainer.predict_values(self.solutions)
        if not state.is_world_process_zero:
            return
        for name in destinations:
            self._log(name, state.global_step, valued)

    def _log(self, destination: str, step: int, valued: Dataset) -> None:
        module = import_module(destination)
        rows = []
        for row in valued:
            values = row["critic_values"]
            text = solution_html(row["completions"], values) if destination == "wandb" else _plain(row, values)
            shown = module.Html(text, inject=False) if destination == "wandb" else text
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            values_text = " ".join(f"{value:.2f}" for value in values)
            rows.append([step, prompt, shown, values_text, (row.get("values") or [None])[-1]])
        table = module.Table(columns=list(self.columns), data=rows)
        module.log({"eval/solutions": table, "train/global_step": step})


def _take_tables(args: TrainingArguments) -> list[str]:
    """Those of `report_to` that tables can be logged to."""
    return [name for name in ("wandb", "trackio") if name in (args.report_to or [])]


def solution_html(steps: Sequence[str], values: Sequence[float]) -> str:
    """
    A solution as HTML, each step on the colour of the state that it leads to: red for 0, yellow for 1/2, green for 1.

    Args:
        steps (sequence of `str`, length K):
            Steps.
        values (sequence of `float`, length K+1):
            Values of the states, in [0, 1], from the one before the first step.

    Returns:
        `str`.

    Raises:
        ValueError: if there is not one value more than there are steps.

    Example:

    ```python
    >>> from dapo_trl.callbacks import solution_html

    >>> solution_html(["1 < 2"], [0.5, 1.0])
    '<pre ...><span style="background: #1a985055" title="1.00">1 &lt; 2</span></pre>'

    ```
    """
    if len(values) != len(steps) + 1:
        raise ValueError(f"{len(steps)} steps lead to {len(steps) + 1} states, but there are {len(values)} values.")
    spans = []
    for step, value in zip(steps, values[1:], strict=True):
        background: Any = color(value).color
        spans.append(
            f'<span style="background: {background.triplet.hex}55" title="{value:.2f}">{html.escape(step)}</span>'
        )
    return f'<pre style="white-space: pre-wrap">{"".join(spans)}</pre>'


def _plain(row: dict[str, Any], values: Sequence[float]) -> str:
    """A solution as text, with the value of the state after each step."""
    pairs = zip(row["completions"], values[1:], strict=True)
    return "\n".join(f"{step.rstrip()} [{value:.2f}]" for step, value in pairs)


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; leaves each module in the mode it was in, and the random states as they were."""
    training = [module for module in model.modules() if module.training]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(states[0])
            np.random.set_state(states[1])
