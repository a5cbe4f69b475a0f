"""
What the two trainers have in common: rows prepared, laid out, scored and evaluated, cards written.
"""

import copy
import time
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, gather_object, tqdm
from datasets import Dataset, concatenate_datasets
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.data import SequentialSampler
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.base_trainer import _BaseTrainer

from dapo_trl.cards import CardContents, hub_dataset, save_model_card
from dapo_trl.collators import split_rows
from dapo_trl.dataset_checks import check_rows_fit_model
from dapo_trl.layouts import _LayoutMixin
from dapo_trl.metrics import RatioMetrics, gather_uneven
from dapo_trl.modeling import transformers_model
from dapo_trl.samplers import FilledSampler, PromptGroupSampler, group_rows


logger = get_logger(__name__)


class _StepTrainer(_LayoutMixin, _BaseTrainer):
    """
    Base of [`DAPOTrainer`] and [`StepCriticTrainer`]: TRL's trainer base on rows that hold several steps each.

    A subclass says how rows are prepared (`_prepare_dataset`), what is read from the model (`_score`), what the loss is
    (`compute_loss`, which with `return_outputs` gives a dictionary) and what an evaluation collects of it
    (`_predictions`).
    """

    pipeline_tag: str  # what the Hub shall offer the model for
    loss_is_scaled_for_ga: Any = True  # by the weight of the whole optimizer step, see `_get_num_items_in_batch`

    _weight_columns: tuple[str, ...]  # a row with zeros there counts nothing

    # types that the parent classes leave wider, or infer from a first value of `None`
    args: Any
    model: Any
    data_collator: Any
    train_dataset: Any
    processing_class: PreTrainedTokenizerBase
    _signature_columns: Any

    def __init__(self, data_collator: Any, default_collator: Callable[..., Any], **kwargs: Any) -> None:
        self._metrics = {"train": RatioMetrics(), "eval": RatioMetrics()}
        self._uncounted_tokens: list[torch.Tensor] = []
        self._num_tokens_since_log = 0
        self._seconds_since_log = 0.0
        self._clock: float | None = None  # start of the stretch of training under way
        self.card_contents = CardContents()
        self._groups: list[list[int]] | None = None
        self._attention = ""
        self.layout: str | None = None
        args = kwargs["args"]
        self._has_own_collator = data_collator is not None
        collator = data_collator or default_collator(
            kwargs["processing_class"].pad_token_id, args.pad_to_multiple_of, "padded", args.max_tokens_per_row
        )
        super().__init__(data_collator=collator, **kwargs)
        self.model.add_model_tags(list(self._tag_names))

    # ---- For the subclasses ----

    @abstractmethod
    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> Dataset:
        """Checked and tokenized rows; what was left out goes to `preprocessing_report`."""

    @abstractmethod
    def _predictions(
        self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `compute_metrics` gets of a batch: predictions and labels, with the same first dimension."""

    @abstractmethod
    def _score(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is read from the model for a batch, one number per pair or state, float32."""

    def _collected_metrics(self) -> dict[str, float]:
        """What was collected in an evaluation, without the prefix."""
        return self._metrics["eval"].pop(self.accelerator)

    # ---- Data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Problems at random, the rows of one problem together; other strategies are `Trainer`'s own."""
        if self.args.train_sampling_strategy != "random" or "prompt_key" not in self.train_dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        if self._groups is None:
            self._groups = group_rows(self.train_dataset)
        args = self.args
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        return PromptGroupSampler(self._groups, args.train_batch_size, step_size, seed)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """The batches of `Trainer`; where it would repeat rows to fill the last ones, with rows that count nothing."""
        load = partial(super()._get_dataloader, description=description, batch_size=batch_size)
        multiple = batch_size * self.accelerator.num_processes
        fills_itself = is_training and self.args.train_sampling_strategy == "batch_rebalance"
        if (
            self.accelerator.num_processes == 1
            or not isinstance(dataset, Dataset)
            or len(dataset) % multiple == 0
            or self.args.dataloader_drop_last
            or fills_itself
        ):
            return load(dataset, sampler_fn=sampler_fn, is_training=is_training, dataloader_key=dataloader_key)
        sampler = (sampler_fn(dataset) if sampler_fn is not None else None) or SequentialSampler(dataset)
        filled = FilledSampler(sampler, len(dataset), multiple)
        dataset = concatenate_datasets([dataset, self._filler(dataset)])
        return load(dataset, sampler_fn=lambda _: filled, is_training=is_training, dataloader_key=dataloader_key)

    def _filler(self, dataset: Dataset) -> Dataset:
        """A short row without weight."""
        lengths = dataset["length"]
        row = dataset[min(range(len(dataset)), key=lengths.__getitem__)]
        weightless = {name: [0.0] * len(row[name]) for name in self._weight_columns}
        return Dataset.from_list([row | weightless], features=dataset.features)

    def _prepare_datasets(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        args: Any,
        model_configs: list[PretrainedConfig],
    ) -> tuple[Any, Any]:
        """The data sets as given at construction, prepared for models of these configurations."""
        self.preprocessing_report: dict[str, dict[str, int]] = {}
        self.hub_dataset = hub_dataset(train_dataset)
        if eval_dataset is None and args.eval_strategy != "no":
            raise ValueError(
                f"`eval_strategy={str(args.eval_strategy.value)!r}` needs an `eval_dataset`. Give one, or set "
                '`eval_strategy="no"`.'
            )

        def prepare(rows: Any, name: str) -> Any:
            prepared = self._prepare_dataset(rows, processing_class, args, name)
            for config in model_configs:
                check_rows_fit_model(prepared, config, name)
            return prepared

        if train_dataset is not None:
            train_dataset = prepare(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            if "train" in eval_dataset:
                raise ValueError("`eval_dataset` has a part named 'train', as the training set is called. Rename it.")
            eval_dataset = {name: prepare(part, name) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "eval")
        return train_dataset, eval_dataset

    def _prepare_if_raw(self, dataset: Any, name: str) -> Any:
        """A data set given to `evaluate` or `predict`: prepared, unless it is already."""
        if not isinstance(dataset, Dataset) or "branches" in dataset.column_names:
            return dataset
        prepared = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        check_rows_fit_model(prepared, self.model.config, name)
        return prepared

    def _placed_model(self) -> torch.nn.Module:
        """
        The model as it can be called: DeepSpeed and FSDP place weights when training starts, or here, to score only.
        With FSDP it is a copy, as the optimizer needs the weights as they are.
        """
        if self.is_deepspeed_enabled and self.deepspeed is None:
            return prepare_deepspeed(self.model, self.accelerator)
        if self._awaits_sharding():
            return self._sharded(copy.deepcopy(self.model).requires_grad_(False))
        return self.model

    def _sharded(self, model: Any) -> Any:
        """
        A model to score with, sharded by FSDP. With `cpu_ram_efficient_loading` the first process alone has loaded its
        weights (transformers 5.19), or those of a new head: it sends them.
        """
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.cpu_ram_efficient_loading and not getattr(transformers_model(model), "is_quantized", False):
            weights = {}
            for name, value in model.state_dict().items():
                is_first, device = self.accelerator.is_main_process, self.accelerator.device
                placed = value.to(device) if is_first else torch.empty_like(value, device=device)
                weights[name] = broadcast(placed.contiguous()).to("cpu")
            model.load_state_dict(weights, assign=True)
            transformers_model(model).tie_weights()
        return prepare_fsdp(model, self.accelerator)

    def _awaits_sharding(self) -> bool:
        """Whether FSDP has yet to shard the weights: until then they are on the CPU, unless they are quantized."""
        is_sharded = isinstance(self.model, FSDPModule | FullyShardedDataParallel)
        is_quantized = getattr(transformers_model(self.model), "is_quantized", False)
        return self.is_fsdp_enabled and not is_sharded and not is_quantized

    def _score_rows(
        self,
        order: list[int],
        batch_size: int,
        desc: str,
        score: Callable[[list[int]], list[list[float]]],
    ) -> list[list[float]]:
        """
        Score rows in batches, over all processes.

        Args:
            order (`list[int]`):
                All rows, so that neighbours are alike: of similar length, or with long prefixes in common.
            batch_size (`int`):
                Rows per batch.
            desc (`str`):
                Label of the progress bar.
            score (`Callable[[list[int]], list[list[float]]]`):
                Scores of the rows with the given indices.

        Returns:
            `list[list[float]]`: scores of all rows, by index, in every process.
        """
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every process scores as many batches: weights that are sharded are gathered by all of them together.
        batches += batches[:1] * (-len(batches) % processes)
        computed: list[tuple[int, list[float]]] = []
        with torch.no_grad():
            for indices in tqdm(batches[rank::processes], desc=desc):
                computed += zip(indices, score(indices), strict=True)
        scores = dict(gather_object(computed))
        return [scores[index] for index in range(len(order))]

    # ---- Trainer hooks ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """
        The loop of `Trainer`, with batches of uneven size gathered as they are, and metrics that are means over all
        pairs or states: `Trainer` itself takes means of means over batches.
        """
        self.gather_function = partial(gather_uneven, self.accelerator)  # the loop sets it back at its end
        self._metrics["eval"].clear()
        self.stop_clock()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        exact = {f"{prefix}_{name}": value for name, value in self._collected_metrics().items()}
        return output._replace(metrics=(output.metrics or {}) | exact)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of an optimizer step; from here on, time counts as training."""
        if self._clock is None:
            self._clock = time.perf_counter()
        self._mend_optimizer()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The step of `Trainer`; tokens are counted."""
        if "num_tokens" in inputs:
            self._record_batch(inputs)
            tokens, pair_tokens = inputs["num_tokens"], inputs["num_pair_tokens"]
            self._uncounted_tokens.append(tokens)
            self._metrics["train"].add("tokens/saved", (pair_tokens - tokens).float(), pair_tokens.float())
        parts = split_rows(inputs) if self._runs_rows_apart and not self._compares_pairs else [inputs]
        losses = [super(_StepTrainer, self).training_step(model, part, *args, **kwargs) for part in parts]
        return torch.stack(losses).sum()

    @property
    def _compares_pairs(self) -> bool:
        """Whether the loss compares pairs of a state with each other, which the rows of a batch may part."""
        return False

    def _record_batch(self, inputs: dict[str, torch.Tensor]) -> None:
        """Metrics of a batch as a whole, before its rows part."""

    def stop_clock(self) -> None:
        """What follows does not count as training, up to the next optimizer step: `tokens/per_second` leaves it out."""
        if self._clock is not None:
            self._seconds_since_log += time.perf_counter() - self._clock
            self._clock = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of training, collected since the last log, to what is logged."""
        if self.model.training:
            logs.update(self._metrics["train"].pop(self.accelerator))
            logs.update(self._token_metrics())
        super().log(logs, start_time)

    def _token_metrics(self) -> dict[str, float]:
        self._count_tokens()
        if not self._num_tokens_since_log:
            return {}
        if self._clock is not None:
            self.stop_clock()
            self._clock = time.perf_counter()
        metrics = {"num_tokens": float(self.state.num_input_tokens_seen)}
        if self._seconds_since_log:
            metrics["tokens/per_second"] = self._num_tokens_since_log / self._seconds_since_log
        self._num_tokens_since_log, self._seconds_since_log = 0, 0.0
        return metrics

    def _count_tokens(self) -> None:
        """Add what this and all other processes have trained on to the state, which checkpoints keep."""
        if not self._uncounted_tokens:
            return
        own = torch.stack(self._uncounted_tokens).sum().to(self.accelerator.device)
        tokens = int(self.accelerator.reduce(own, reduction="sum"))
        self.state.num_input_tokens_seen += tokens
        self._num_tokens_since_log += tokens
        self._uncounted_tokens.clear()

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """`Trainer` would count padding, or rows of an attention mask that trees do not have."""

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss, predictions and labels of a batch; the batches have no labels that `Trainer` would look for."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, *self._predictions(outputs, inputs))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Evaluate on the data set given at construction, or on other rows.

        Args:
            eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
                Rows to evaluate on, in any format that the trainer takes.
            ignore_keys (`list[str]`, *optional*):
                Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics' names.

        Returns:
            `dict[str, float]`: metrics.

        Raises:
            ValueError: if a row is bad, or, for [`DAPOTrainer`], the reference was freed.
        """
        if isinstance(eval_dataset, dict):
            results: dict[str, float] = {}
            for name, part in eval_dataset.items():
                results |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return results
        return super().evaluate(self._prepare_if_raw(eval_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Predictions, labels and metrics of rows: what `compute_metrics` gets.

        Args:
            test_dataset ([`~datasets.Dataset`]):
                Rows, in any format that the trainer takes.
            ignore_keys (`list[str]`, *optional*):
                Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`):
                Prefix of the metrics' names.

        Returns:
            [`~transformers.trainer_utils.PredictionOutput`].
        """
        return super().predict(self._prepare_if_raw(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    # transformers and TRL name the arguments differently, so no signature with names fits both.
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        Write the model card to `args.output_dir`.

        Args:
            *args:
                The same without names, in the order of `kwargs`.
            **kwargs:
                `model_name` (`str`), `tags` (`str` or `list[str]`) besides the trainer's own, and the fields of
                [`~dapo_trl.cards.CardContents`], such as `dataset_name` and `critic_name`; all optional. They can be
                passed to `push_to_hub` too.
        """
        save_model_card(self, super().create_model_card, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._mend_optimizer()
        super()._load_optimizer_and_scheduler(checkpoint)

    def _mend_optimizer(self) -> None:
        """
        Give the optimizer all parameters. accelerate (1.15) finds them by the address of their part in this process,
        and takes parameters without any for one another: a critic's head has a single row, on the first process.
        """
        if not self.is_fsdp_enabled or self.optimizer is None:
            return
        named = {name: part for name, part in self.model_wrapped.named_parameters() if part.requires_grad}
        groups = self.optimizer.param_groups
        if {id(part) for group in groups for part in group["params"]} == set(map(id, named.values())):
            return
        decayed = set(self.get_decay_parameter_names(self.model_wrapped))
        wanted = [[part for name, part in named.items() if (name in decayed) == is_decayed] for is_decayed in (1, 0)]
        if [len(group["params"]) for group in groups] != list(map(len, wanted)):
            raise ValueError(
                "FSDP left parameters out of the optimizer, whose groups are of your own making. Use one that "
                "`args.optim` names, or DeepSpeed."
            )
        for group, parts in zip(groups, wanted, strict=True):
            group["params"] = parts

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.stop_clock()
        self._count_tokens()
        name = self.args.hub_model_id or Path(self.args.output_dir or "").name
        self.create_model_card(model_name=name.split("/")[-1])
        super()._save_checkpoint(model, trial)


def default_output_dir(model: Any, suffix: str) -> str:
    """
    Folder for a trainer without configuration, as TRL's trainers name theirs.

    Args:
        model (`str` or model):
            Name, path or instance.
        suffix (`str`):
            What the trainer makes of it.

    Returns:
        `str`: such as `"Qwen2-0.5B-DAPO"`.
    """
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{Path(name).name or type(model).__name__}-{suffix}"
