"""
[`DAPOTrainer`]: the policy of Direct Advantage Policy Optimization.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction
from trl.models import prepare_deepspeed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, get_config_model_id, use_adapter

from dapo_trl.cards import PAPER, POLICY_TAGS, POLICY_TEMPLATE
from dapo_trl.collators import DataCollatorForStepPolicy
from dapo_trl.dapo_config import DAPOConfig
from dapo_trl.loading import check_policy, check_reference, load_policy, load_tokenizer
from dapo_trl.losses import dapo_loss, listwise_loss
from dapo_trl.metrics import RatioMetrics
from dapo_trl.model_checks import refuse_adapted_head
from dapo_trl.modeling import (
    add_adapter,
    backbone_outputs_at,
    set_padding,
    transformers_model,
    warn_of_low_precision,
)
from dapo_trl.preprocessing import prepare_policy_dataset
from dapo_trl.ref_logps import add_ref_logps, check_ref_model, model_fingerprint
from dapo_trl.samplers import group_rows
from dapo_trl.step_trainer import _StepTrainer, default_output_dir
from dapo_trl.targets import excess_nats, reachable_beta


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)

_UNREACHABLE_SHARE = 0.05  # of the pairs; more are worth a warning


class DAPOTrainer(_StepTrainer):
    """
    Trainer for Direct Advantage Policy Optimization ([arXiv 2412.18279](https://huggingface.co/papers/2412.18279),
    NeurIPS 2025): offline, step-level RL. Not ByteDance's DAPO (arXiv 2503.14476), which TRL offers as a loss of its
    `GRPOTrainer`.

    The policy regresses the log-ratio of every reasoning step onto its scaled advantage, see
    [`~dapo_trl.losses.dapo_loss`]. Advantages come with the data: from a step critic ([`StepCriticTrainer`]), from
    Monte Carlo values, or from anywhere else.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl import DAPOConfig, DAPOTrainer

    >>> row = {"prompt": "4 - 7 max 2\\n", "prefix": [], "candidates": ["4 - 7 = 7\\n", "4 - 7 = 3\\n"]}
    >>> dataset = Dataset.from_list([row | {"advantages": [0.4, -0.6]}])
    >>> args = DAPOConfig("runs/doctest", max_steps=1, bf16=False, use_cpu=True, report_to="none", save_strategy="no")
    >>> trainer = DAPOTrainer(model="examples/student", args=args, train_dataset=dataset)
    >>> trainer.train().global_step
    {'train_runtime': ...}
    1

    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to train: a name on the Hub, the path of a folder, or an instance.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference policy. `None` takes `model` as it is before training: the base model under a new adapter, or the
            adapter as it was loaded. Pass the model that sampled the data if that is another one.
        args ([`DAPOConfig`], *optional*):
            Configuration. `None` takes the defaults.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Makes a batch of tokenized rows. Defaults to [`~dapo_trl.collators.DataCollatorForStepPolicy`].
        train_dataset ([`~datasets.Dataset`]):
            State rows, solution rows or TRL preference rows, standard or conversational; see `docs/formats.md`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Data to evaluate on, in any of the same formats.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. `None` loads the model's own. Without a padding token, its end token pads.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Own metrics at evaluation. `predictions` are the log-ratios of all pairs, `label_ids` their advantages.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks besides the default ones. For accuracy on held-out problems while training, and the most accurate
            checkpoint kept, `add_callback` an [`AccuracyCallback`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning-rate scheduler; `None` for AdamW and a linear decay.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of all weights. The reference is then the model with the adapter switched off.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a row or an argument cannot be used; the message names it and the cure.
    """

    _tag_names = POLICY_TAGS
    _name = "DAPO"
    pipeline_tag = "text-generation"
    _paper = PAPER
    _template_file: Any = POLICY_TEMPLATE
    _weight_columns = ("advantages", "weights")

    args: DAPOConfig
    ref_model: torch.nn.Module | None

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DAPOConfig | None = None,
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
        args = _default_args(args, model)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required. Pass the rows to learn from, see `docs/formats.md`.")
        # What can be refused without weights comes first.
        model_config = check_policy(model, args, quantization_config, peft_config)
        check_reference(ref_model, model)
        processing_class = load_tokenizer(processing_class, model, args)
        self._given = {
            "train": train_dataset,
            **(eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}),
        }
        self._ref_fingerprint = ""
        model_configs = [model_config] if ref_model is None else [model_config, transformers_model(ref_model).config]
        train_dataset, eval_dataset = self._prepare_datasets(
            train_dataset, eval_dataset, processing_class, args, model_configs
        )
        set_seed(args.seed)  # adapters start from random weights
        model = load_policy(model, args, quantization_config)
        set_padding(model, processing_class)
        continues_adapter = is_peft_model(model)
        model = add_adapter(model, peft_config, args)
        refuse_adapted_head(model)
        warn_of_low_precision(model, args)
        self._has_reference_adapter = continues_adapter and ref_model is None and not args.precompute_ref_log_probs
        if self._has_reference_adapter:
            _add_reference_adapter(model)
        self._reference_is_base = ref_model is None and is_peft_model(model) and not continues_adapter
        self._reference_is_policy = ref_model is None and not self._reference_is_base  # as it was before training
        if args.disable_dropout:
            disable_dropout_in_model(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            default_collator=DataCollatorForStepPolicy,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.ref_model = self._prepare_ref_model(ref_model)
        add_fused_lm_head(transformers_model(self.model))
        self._before_training()

    def with_ref_logps(self, name: str = "train") -> Dataset:
        """
        The rows as they were given, with the reference's log-probabilities beside them.

        The columns can be saved, published, and given to another trainer on another machine, which then computes
        nothing. It refuses them if its reference policy, tokenizer or rows are others.

        Args:
            name (`str`, *optional*, defaults to `"train"`):
                `"train"`; `"eval"`, or the name of one of several evaluation sets.

        Returns:
            [`~datasets.Dataset`]: the rows with `ref_logps` (one number per step, in nats) and `ref_fingerprint`. Rows
            that are not trained on, say for `min_advantage_gap`, have null.

        Raises:
            ValueError: if there is no such data set, or the reference's log-probabilities were not precomputed.
        """
        if self._given.get(name) is None:
            known = [other for other, rows in self._given.items() if rows is not None]
            raise ValueError(f"There is no data set {name!r}, only {', '.join(map(repr, known))}.")
        if not self.args.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs=False` computes the reference's log-probabilities in every step and keeps "
                "none. Set it to `True`."
            )
        rows: Any = self.train_dataset if name == "train" else self.eval_dataset
        prepared = rows[name] if isinstance(rows, dict) else rows
        return add_ref_logps(self._given[name], prepared, self._ref_fingerprint, self.processing_class)

    # ---- Data ----

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: DAPOConfig, name: str
    ) -> Dataset:
        if not args.precompute_ref_log_probs and "ref_logps" in getattr(dataset, "column_names", ()):
            logger.warning(
                f"`{name}_dataset` has `ref_logps`, which `precompute_ref_log_probs=False` does not use: the reference "
                "is run in every step."
            )
            dataset = dataset.remove_columns("ref_logps")
        max_length, limit_name = args.length_limit
        prepared, self.preprocessing_report[name] = prepare_policy_dataset(
            dataset,
            processing_class,
            name=name,
            max_length=max_length,
            limit_name=limit_name,
            min_advantage_gap=args.min_advantage_gap,
            duplicate_weights=args.duplicate_weights,
            reliability_weights=args.reliability_weights,
            min_reliability=args.min_reliability,
            num_proc=args.dataset_num_proc,
            log_partition=args.log_partition,
            beta=args.beta,
            loss_type=args.loss_type,
        )
        return prepared

    def _prepare_if_raw(self, dataset: Any, name: str) -> Any:
        prepared = super()._prepare_if_raw(dataset, name)
        if prepared is dataset:
            return prepared
        self._settle_layout(prepared, [self.model])
        if not self.args.precompute_ref_log_probs:
            return prepared
        check_ref_model(dataset, self._ref_fingerprint, name)
        if "ref_logps" in prepared.column_names:
            return prepared
        is_untrained_policy = self._reference_is_policy and self.state.global_step == 0
        if not (self._reference_is_base or is_untrained_policy):
            raise ValueError(
                "The reference was freed when its log-probabilities had been computed, and `model` is not, or no "
                "longer, the same. Give this data set as `eval_dataset` at construction, or set "
                "`precompute_ref_log_probs=False`."
            )
        return self._precompute(prepared, self.args.per_device_eval_batch_size, name)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["context_ids", "branches", "advantages", "weights", "ref_logps", "length"]
            self._signature_columns += ["values"] if self.args.loss_type == "listwise" else []

    # ---- Reference policy ----

    def _prepare_ref_model(self, ref_model: PreTrainedModel | None) -> torch.nn.Module | None:
        """The reference as a model of its own, or `None` where the policy itself can stand in for it."""
        if ref_model is None:
            # The adapter is switched off or swapped; or the policy has not been trained yet. Under FSDP the policy is
            # placed and sharded only when training starts, so that what scores before that is a copy.
            is_early = self.args.precompute_ref_log_probs
            if not (is_early and self._awaits_sharding()) and (is_early or is_peft_model(self.model)):
                return None
            ref_model = self._copy_policy()
        if self.args.disable_dropout:
            disable_dropout_in_model(ref_model)
        add_fused_lm_head(transformers_model(ref_model))
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(ref_model, self.accelerator)
        if self.is_fsdp_enabled:
            return self._sharded(ref_model)
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    def _copy_policy(self) -> Any:
        """The policy as it is now, frozen; of a new adapter, the model without it."""
        if not _is_partitioned(self.model):
            copied = copy.deepcopy(self.model).requires_grad_(False)
            return copied.unload() if self._reference_is_base else copied
        # Each process holds a part of the weights, so that the copy is loaded again from where the policy came from.
        path = get_config_model_id(self.model.config)
        cure = "Pass `ref_model`, or leave `precompute_ref_log_probs=True`."
        if not path:
            raise ValueError(f"A policy that was built in memory cannot be copied once it is sharded. {cure}")
        reference = load_policy(path, self.args)
        if model_fingerprint(reference) != model_fingerprint(self.model):
            raise ValueError(
                f"`model` is not what {path!r} holds: it was changed, or loaded with another dtype, and cannot be "
                f"copied once it is sharded. {cure}"
            )
        return reference

    @contextlib.contextmanager
    def _reference(self) -> Iterator[torch.nn.Module]:
        """The model that scores as the reference, without gradients."""
        checkpointing: Any = self.args.gradient_checkpointing_kwargs  # read by now, if given as JSON
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, checkpointing),
            contextlib.ExitStack() as stack,
        ):
            if self.ref_model is None and is_peft_model(self.model):
                policy = self.accelerator.unwrap_model(self.model)
                if self._reference_is_base:
                    stack.enter_context(use_adapter(policy, None))
                elif self._has_reference_adapter:
                    stack.enter_context(use_adapter(policy, "ref"))
            model = self.ref_model if self.ref_model is not None else self.model
            was_training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(was_training)

    def _before_training(self) -> None:
        """Settle the layout, score all rows with the reference, once, and free it."""
        engine = self._placed_model() if self.ref_model is None and self.is_deepspeed_enabled else None
        with self._reference() as reference:
            models = [engine or reference]
            if models[0] is not self.model and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                models.append(self.model)
            parts = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            for rows in (self.train_dataset, *(part for part in parts if part is not None)):
                self._settle_layout(rows, models)
            args = self.args
            if not args.precompute_ref_log_probs:
                return
            self._ref_fingerprint = model_fingerprint(reference)
        for name, dataset in self._given.items():
            if dataset is not None:
                check_ref_model(dataset, self._ref_fingerprint, name)
        train_batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        eval_batch_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        self.train_dataset = self._precompute(self.train_dataset, train_batch_size, "train", engine)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._precompute(part, eval_batch_size, name, engine) for name, part in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._precompute(self.eval_dataset, eval_batch_size, "eval", engine)
        if args.loss_type == "squared":
            self._report_unreachable_targets()
        # accelerate keeps every model it has prepared
        self.accelerator._models = [model for model in self.accelerator._models if model is not self.ref_model]
        self.ref_model = None

    def _precompute(
        self, dataset: Dataset, batch_size: int, name: str, engine: torch.nn.Module | None = None
    ) -> Dataset:
        if "ref_logps" in dataset.column_names:  # checked when the rows were prepared
            return dataset
        with self._reference() as reference:

            def score(indices: list[int]) -> list[list[float]]:
                batch = self.data_collator([dataset[index] for index in indices])
                logps = self._score_without_gradients(engine or reference, self._prepare_inputs(batch)).cpu()
                return [logps[batch["state_index"].cpu() == row].tolist() for row in range(len(indices))]

            if self.layout == "tree":
                order = [index for group in group_rows(dataset) for index in group]
            else:
                lengths = dataset["length"]
                order = sorted(range(len(dataset)), key=lengths.__getitem__)
            logps = self._score_rows(order, batch_size, f"Reference log-probabilities ({name})", score)
        return dataset.add_column("ref_logps", logps)

    def _report_unreachable_targets(self) -> None:
        """Count the pairs that are asked for a probability above 1, and say so if they are many."""
        columns = self.train_dataset.select_columns(["advantages", "ref_logps"])
        advantages, ref_logps = (
            [number for row in columns[name] for number in row] for name in ("advantages", "ref_logps")
        )
        excess = excess_nats(advantages, ref_logps, self.args.beta)
        beyond = excess[excess > 0]
        self.preprocessing_report["train"]["targets_unreachable"] = len(beyond)
        if len(beyond) > _UNREACHABLE_SHARE * len(excess):
            beta = reachable_beta(advantages, ref_logps, _UNREACHABLE_SHARE)
            logger.warning(
                f"`beta={self.args.beta}` asks {len(beyond)} of {len(excess)} pairs ({len(beyond) / len(excess):.0%}) "
                f"for a probability above 1: advantage / beta exceeds what the reference leaves by "
                f"{np.median(beyond):.1f} nats in the median, {beyond.max():.1f} at most. They pull until training "
                "stops: learning rate and number of steps decide how far, as in the paper. With "
                f"`beta={beta:.2g}` it would be {_UNREACHABLE_SHARE:.0%} of them."
            )

    # ---- Loss ----

    def _score(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probability of each pair's step, shape (P,), float32: the sum over the step's tokens."""
        # Hidden states are gathered where an action token is predicted, so that the LM head runs there only.
        with self.accelerator.autocast(), backbone_outputs_at(model, inputs["parent_index"]):
            output = model(
                **self._model_inputs(model, inputs),
                shift_labels=inputs["child_ids"][None],
                use_cache=False,
                fused_lm_head=True,
            )
        # a model split over devices may end on another one
        log_probs = output.log_probs[0].float().to(inputs["pair_index"].device)
        logps = torch.zeros_like(inputs["advantages"])
        return logps.index_add(0, inputs["pair_index"], log_probs[inputs["token_index"]])

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Total weight of the loss in the optimizer step, over its micro-batches and all processes."""
        weight = sum((self._loss_weight(batch) for batch in batch_samples), torch.zeros(())).to(device)
        return self.accelerator.reduce(weight, reduction="sum")

    @property
    def _compares_pairs(self) -> bool:
        return self.args.loss_type == "listwise"

    def _loss_weight(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the loss of a batch is a mean over: the weights of its pairs; listwise, its states."""
        return _num_states(inputs).float() if self._compares_pairs else inputs["weights"].sum()

    def _loss_sum(self, logps: torch.Tensor, ref_logps: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        args, weights = self.args, inputs["weights"]
        if not self._compares_pairs:
            return dapo_loss(logps, ref_logps, inputs["advantages"], args.beta, weights, reduction="sum")
        powers = (args.value_power, args.ref_power)
        return listwise_loss(logps, ref_logps, inputs["values"], inputs["state_index"], weights, *powers, "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Loss of a batch: the mean over the pairs, or listwise over the states, of the whole optimizer step.

        Args:
            model (`torch.nn.Module`):
                The policy.
            inputs (`dict[str, torch.Tensor]`):
                A batch of [`~dapo_trl.collators.DataCollatorForStepPolicy`].
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the log-ratios too.
            num_items_in_batch (`torch.Tensor`, *optional*):
                Total weight of the optimizer step. `None`, as at evaluation, takes this batch's.

        Returns:
            `torch.Tensor` or `tuple`: the loss, and `{"log_ratios": ...}` of shape `(P,)`.
        """
        score = self._score if torch.is_grad_enabled() else self._score_without_gradients
        logps = score(model, inputs)
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None:
            with self._reference() as reference:
                ref_logps = self._score_without_gradients(reference, inputs)
        loss_sum = self._loss_sum(logps, ref_logps, inputs)
        if num_items_in_batch is None:
            loss = loss_sum / self._loss_weight(inputs).clamp(min=torch.finfo(torch.float32).tiny)
        else:
            # Gradients are averaged over processes, each of which holds a part of the sum.
            loss = loss_sum * self.accelerator.num_processes / num_items_in_batch
        log_ratios = (logps - ref_logps).detach()
        self._record(inputs, log_ratios, loss_sum)
        return (loss, {"log_ratios": log_ratios}) if return_outputs else loss

    def _record(self, inputs: dict[str, torch.Tensor], log_ratios: torch.Tensor, loss_sum: torch.Tensor) -> None:
        """Metrics of a batch; `docs/metrics.md` says what each is and what is healthy."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        advantages, weights = inputs["advantages"], inputs["weights"]
        positive, negative = advantages > 0, advantages < 0
        decided = (positive | negative) & (log_ratios != 0)  # before the first step every log-ratio is 0
        metrics.add("sign_accuracy", (log_ratios.sign() == advantages.sign())[decided].sum(), decided.sum())
        metrics.add("log_ratios/positive", log_ratios[positive].sum(), positive.sum())
        metrics.add("log_ratios/negative", log_ratios[negative].sum(), negative.sum())
        metrics.add("kl", -(weights * log_ratios).sum(), weights.sum())
        if not self._compares_pairs:
            targets = advantages / self.args.beta
            metrics.add("target_reached", (log_ratios * targets).sum(), (targets**2).sum())
        if mode == "eval":
            metrics.add("loss", loss_sum, self._loss_weight(inputs))
            self._record_gap(metrics, inputs)

    def _record_batch(self, inputs: dict[str, torch.Tensor]) -> None:
        metrics = self._metrics["train"]
        self._record_gap(metrics, inputs)
        # Counts are per optimizer step: a micro-batch is a fraction of one.
        share = torch.tensor(1.0 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes))
        metrics.add("pairs", (inputs["weights"] > 0).sum(), share)
        metrics.add("states", _num_states(inputs), share)

    def _record_gap(self, metrics: RatioMetrics, inputs: dict[str, torch.Tensor]) -> None:
        advantages = inputs["advantages"]
        bounds = [
            advantages.new_zeros(int(inputs["state_index"][-1]) + 1).scatter_reduce(
                0, inputs["state_index"], advantages, reduce=reduce, include_self=False
            )
            for reduce in ("amax", "amin")
        ]
        metrics.add("advantage_gap", (bounds[0] - bounds[1]).sum(), _num_states(inputs))

    # ---- Trainer hooks ----

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # The frozen copy of an adapter is made anew when training goes on. `Trainer` (transformers 5.19) would find it
        # in a folder of its own and load nothing else.
        if not self._has_reference_adapter:
            super()._save(*args, **kwargs)
            return
        adapters = self.accelerator.unwrap_model(self.model).peft_config
        copied = adapters.pop("ref")
        try:
            super()._save(*args, **kwargs)
        finally:
            adapters["ref"] = copied

    def _predictions(
        self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counted = inputs["weights"] > 0
        return outputs["log_ratios"][counted], inputs["advantages"][counted]


def _num_states(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of a batch, without those that only fill it up."""
    counted = torch.zeros_like(inputs["weights"]).index_add(0, inputs["state_index"], inputs["weights"])
    return (counted > 0).sum()


def _default_args(args: DAPOConfig | None, model: Any) -> DAPOConfig:
    if args is None:
        return DAPOConfig(default_output_dir(model, "DAPO"))
    if not isinstance(args, DAPOConfig):
        raise TypeError(
            f"`args` must be a `DAPOConfig`, got {type(args).__name__}. `DPOConfig` arguments that exist here keep "
            "their names: replace the class."
        )
    return args


def _add_reference_adapter(model: Any) -> None:
    """Freeze a copy of the adapter that training goes on with: it is the reference."""
    model.add_adapter("ref", model.peft_config[model.active_adapter])
    for name, parameter in model.named_parameters():
        if f".{model.active_adapter}." in name:
            twin = model.get_parameter(name.replace(f".{model.active_adapter}.", ".ref."))
            twin.data.copy_(parameter.data)


def _is_partitioned(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has shared out the weights already, as it does while a model is loaded."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
