"""
[`StepCriticTrainer`]: the critic of Direct Advantage Policy Optimization.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction
from trl.trainer.utils import disable_dropout_in_model

from dapo_trl.cards import CRITIC_TAGS, CRITIC_TEMPLATE, PAPER
from dapo_trl.collators import DataCollatorForStepCritic
from dapo_trl.dataset_checks import check_fingerprint
from dapo_trl.diagnostics import TOLD_APART, critic_metrics, sibling_ranking
from dapo_trl.formats import check_dataset
from dapo_trl.loading import check_critic, load_critic, load_tokenizer
from dapo_trl.losses import critic_loss, critic_weights
from dapo_trl.modeling import (
    add_adapter,
    check_head_is_trained,
    critic_adapter,
    set_padding,
    warn_of_low_precision,
)
from dapo_trl.preprocessing import prepare_critic_dataset
from dapo_trl.step_critic_config import StepCriticConfig
from dapo_trl.step_trainer import _StepTrainer, default_output_dir
from dapo_trl.tokenized_rows import prompt_key, row_length, tokenize_row


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)


class StepCriticTrainer(_StepTrainer):
    """
    Trainer for the step critic of Direct Advantage Policy Optimization ([arXiv
    2412.18279](https://huggingface.co/papers/2412.18279), NeurIPS 2025). Not ByteDance's DAPO (arXiv 2503.14476).

    The critic predicts the value of every state of a solution: the probability that the reference policy, continuing
    from there, ends correct. It is a token classifier with one label, read at the last token of the prompt and of every
    step, all states of a solution from one forward pass, and learns from soft Monte Carlo values by
    [`~dapo_trl.losses.critic_loss`]. It is a value function, not a process reward model: do not sum it as a reward.

    Evaluation reports `bce`, `bce_constant`, `skill`, `brier` and `calibration_error`, see
    [`~dapo_trl.diagnostics.critic_metrics`]; and where rows share a beginning and then take different steps, how well
    the critic orders these, see [`~dapo_trl.diagnostics.sibling_ranking`]. Whether a policy should be trained on its
    values, which `dapo-trl run` decides by held-out problems, [`~dapo_trl.diagnosis.diagnose`] tells of rows that
    [`predict_values`] valued.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl import StepCriticConfig, StepCriticTrainer

    >>> row = {"prompt": "4 - 7 max 2\\n", "completions": ["4 - 7 = 3\\n", "3 max 2 = 3\\n", "#### 3"]}
    >>> dataset = Dataset.from_list([row | {"values": [0.5, 0.1, 0.0, 0.0]}])
    >>> kwargs = {"max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    >>> args = StepCriticConfig("runs/doctest", **kwargs)
    >>> trainer = StepCriticTrainer(model="examples/student", args=args, train_dataset=dataset)
    >>> trainer.train().global_step
    {'train_runtime': ...}
    1
    >>> len(trainer.predict_values(dataset)[0]["critic_values"])
    4

    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name or path of a causal language model, whose backbone gets a new scalar head, or of a step critic to go on
            with; or an instance of `AutoModelForTokenClassification` with one label.
        args ([`StepCriticConfig`], *optional*):
            Configuration. `None` takes the defaults.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Makes a batch of tokenized rows. Defaults to [`~dapo_trl.collators.DataCollatorForStepCritic`].
        train_dataset ([`~datasets.Dataset`], *optional*):
            Solution rows, standard or conversational; see `docs/formats.md`. May be omitted for a trainer that only
            evaluates or predicts.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Solution rows to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. `None` loads the model's own. Without a padding token, its end token pads.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Own metrics at evaluation instead of the default ones. `predictions` are the logits of all states,
            `label_ids` of shape `(S, 2)` their successes and rollouts.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks besides the default ones. For a table of solutions coloured by the critic's values, `add_callback`
            a [`SolutionTableCallback`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning-rate scheduler; `None` for AdamW and a linear decay.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of all weights. The scalar head is trained and saved beside it.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a row or an argument cannot be used; the message names it and the cure.
    """

    _tag_names = CRITIC_TAGS
    _name = "Step Critic"
    pipeline_tag = "token-classification"
    _paper = PAPER
    _template_file: Any = CRITIC_TEMPLATE
    _weight_columns = ("successes", "rollouts")

    args: StepCriticConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: StepCriticConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ) -> None:
        if args is None:
            args = StepCriticConfig(default_output_dir(model, "StepCritic"))
        elif not isinstance(args, StepCriticConfig):
            raise TypeError(f"`args` must be a `StepCriticConfig`, got {type(args).__name__}.")
        # What can be refused without weights comes first.
        model_config = check_critic(model, args, quantization_config, peft_config)
        processing_class = load_tokenizer(processing_class, model, args)
        train_dataset, eval_dataset = self._prepare_datasets(
            train_dataset, eval_dataset, processing_class, args, [model_config]
        )
        set_seed(args.seed)  # the head starts from random weights
        model = load_critic(model, args, quantization_config)
        set_padding(model, processing_class)
        model = add_adapter(model, critic_adapter(peft_config), args)
        check_head_is_trained(model)
        warn_of_low_precision(model, args)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self._evaluated_states: list[tuple[tuple[int, int], list[float]]] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            default_collator=DataCollatorForStepCritic,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._compute_critic_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        given = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        known = [rows for rows in given if rows is not None]
        # A sharded copy, before FSDP shards it for training, would be made only to try the layout.
        models = [self.model if self._awaits_sharding() else self._placed_model()] if known else []
        for rows in known:
            self._settle_layout(rows, models)

    def predict_values(self, dataset: Dataset, batch_size: int | None = None) -> Dataset:
        """
        Add the critic's values to rows.

        Args:
            dataset ([`~datasets.Dataset`]):
                Solution rows or state rows. Values of their own are not needed and stay untouched.
            batch_size (`int`, *optional*):
                Rows per batch. `None` takes `per_device_eval_batch_size`.

        Returns:
            [`~datasets.Dataset`]: the rows with a column `critic_values`, in [0, 1]: for a solution the values of its
            K+1 states, for a state row one value per candidate, of the state that it leads to. The values of candidates
            that end the solution are guesses like all others; [`add_advantages`] replaces them by the true `rewards`.

        Raises:
            ValueError: if the rows are of another format, or one is longer than `max_length` or
                `max_tokens_per_row`.
        """
        row_format = _format_to_predict(dataset)
        check_fingerprint(dataset, self.processing_class)
        rows = [
            tokenize_row(row, row_format, self.processing_class)
            | {"context_is_state": row_format == "solution", "prompt_key": prompt_key(row)}
            for row in dataset
        ]
        lengths = [row_length(row) for row in rows]
        max_length, limit_name = self.args.length_limit
        if max_length is not None and max(lengths) > max_length:
            index = lengths.index(max(lengths))
            raise ValueError(
                f"Row {index} has {lengths[index]} tokens, more than `{limit_name}={max_length}`. Raise "
                f"`{limit_name}` or leave the row out: every state needs a value."
            )

        def score(indices: list[int]) -> list[list[float]]:
            inputs = self._prepare_inputs(self.data_collator([rows[index] for index in indices]))
            values = torch.sigmoid(self._score_without_gradients(model, inputs)).cpu()
            sizes = [sum(map(len, rows[i]["branches"])) + rows[i]["context_is_state"] for i in indices]
            return [part.tolist() for part in values.split(sizes)]

        model = self._placed_model()
        self._settle_layout(rows, [model])
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        if self.layout == "tree":
            order = sorted(order, key=lambda index: (rows[index]["prompt_key"], rows[index]["context_ids"]))
        was_training = self.model.training
        self.model.eval()
        values = self._score_rows(order, batch_size or self.args.per_device_eval_batch_size, "Critic values", score)
        self.model.train(was_training)
        if "critic_values" in dataset.column_names:
            dataset = dataset.remove_columns("critic_values")
        return dataset.add_column("critic_values", values)

    # ---- Data ----

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: StepCriticConfig, name: str
    ) -> Dataset:
        max_length, limit_name = args.length_limit
        prepared, self.preprocessing_report[name] = prepare_critic_dataset(
            dataset,
            processing_class,
            name=name,
            max_length=max_length,
            limit_name=limit_name,
            num_proc=args.dataset_num_proc,
        )
        return prepared

    def _prepare_if_raw(self, dataset: Any, name: str) -> Any:
        prepared = super()._prepare_if_raw(dataset, name)
        if prepared is not dataset:
            self._settle_layout(prepared, [self.model])
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["context_ids", "branches", "successes", "rollouts", "state_keys", "length"]

    # ---- Loss ----

    def _score(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logit of the value of each state, shape (S,), float32."""
        with self.accelerator.autocast():
            logits = model(**self._model_inputs(model, inputs), use_cache=False).logits
        return logits.flatten()[inputs["state_places"].to(logits.device)].float()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Total weight of the states of the optimizer step, over its micro-batches and all processes."""
        weights = [critic_weights(batch["rollouts"], self.args.state_weights).sum() for batch in batch_samples]
        return self.accelerator.reduce(sum(weights, torch.zeros(())).to(device), reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Loss of a batch: the weighted mean over the states of the whole optimizer step.

        Args:
            model (`torch.nn.Module`):
                The critic.
            inputs (`dict[str, torch.Tensor]`):
                A batch of [`~dapo_trl.collators.DataCollatorForStepCritic`].
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the logits too.
            num_items_in_batch (`torch.Tensor`, *optional*):
                Total weight of the states of the optimizer step. `None`, as at evaluation, takes this batch's.

        Returns:
            `torch.Tensor` or `tuple`: the loss, and `{"logits": ...}` of shape `(S,)`.
        """
        score = self._score if torch.is_grad_enabled() else self._score_without_gradients
        logits, rollouts = score(model, inputs), inputs["rollouts"]
        loss_sum = critic_loss(logits, inputs["successes"], rollouts, self.args.state_weights, reduction="sum")
        weight = critic_weights(rollouts, self.args.state_weights).sum()
        if not self.model.training:
            self._metrics["eval"].add("loss", loss_sum, weight)
        if num_items_in_batch is None:
            loss = loss_sum / weight.clamp(min=torch.finfo(torch.float32).tiny)
        else:
            # Gradients are averaged over processes, each of which holds a part of the sum.
            loss = loss_sum * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"logits": logits.detach()}) if return_outputs else loss

    # ---- Trainer hooks ----

    def _predictions(
        self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counted = inputs["rollouts"] > 0
        logits = outputs["logits"][counted]
        counts = torch.stack((inputs["successes"], inputs["rollouts"]), dim=1)[counted]
        if "state_keys" in inputs:  # a data collator of the user's own may have left them out
            keys = map(tuple, inputs["state_keys"][counted].tolist())
            self._evaluated_states += zip(keys, torch.cat((logits[:, None], counts), dim=1).tolist(), strict=True)
        return logits, counts

    def _collected_metrics(self) -> dict[str, float]:
        ranking, num_pairs = _rank_siblings(gather_object(self._evaluated_states))
        self._evaluated_states = []
        siblings = {"sibling_ranking": ranking, "sibling_pairs": float(num_pairs)} if num_pairs else {}
        return super()._collected_metrics() | siblings

    def _compute_critic_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        values = 1 / (1 + np.exp(-np.asarray(prediction.predictions, dtype=np.float64)))
        successes, rollouts = np.asarray(prediction.label_ids, dtype=np.float64).T
        return critic_metrics(values, successes, rollouts) | {"states": float(len(values))}


def _rank_siblings(states: list[tuple[tuple[int, int], list[float]]]) -> tuple[float, int]:
    """Ranking of evaluated states, given as keys, and logit, successes and rollouts; each state counts once."""
    known: dict[tuple[int, int], list[float]] = {}
    for keys, values in states:
        if keys[0] and values[2] > known.get(keys, [0.0] * 3)[2]:
            known[keys] = values
    families: dict[int, list[list[float]]] = defaultdict(list)
    for (before, _), values in known.items():
        families[before].append(values)
    predicted = [[logit for logit, _, _ in family] for family in families.values()]
    reference = [[successes / rollouts for _, successes, rollouts in family] for family in families.values()]
    return sibling_ranking(predicted, reference, min_difference=TOLD_APART)


def _format_to_predict(dataset: Dataset) -> str:
    """Rows to be valued need no values yet, so only their steps decide what they are."""
    if len(dataset) == 0:
        raise ValueError("There is no row to predict values for: the data set is empty.")
    columns = set(dataset.column_names)
    if {"prompt", "prefix", "candidates"} <= columns:
        return "state"
    if {"prompt", "completions"} <= columns:
        return "solution"
    return check_dataset(dataset).format
