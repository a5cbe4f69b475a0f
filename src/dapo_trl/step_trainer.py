"""
What the two trainers have in common: rows prepared, scored and evaluated, cards written.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, tqdm
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput
from trl.trainer.base_trainer import _BaseTrainer

from dapo_trl.cards import save_model_card
from dapo_trl.metrics import RatioMetrics, gather_uneven


class _StepTrainer(_BaseTrainer):
    """
    Base of [`DAPOTrainer`] and [`StepCriticTrainer`]: TRL's trainer base on rows that hold several steps each.

    A subclass says how rows are prepared (`_prepare_dataset`), what their loss is (`compute_loss`, which with
    `return_outputs` gives a dictionary) and what an evaluation collects of it (`_predictions`).
    """

    loss_is_scaled_for_ga: Any = True  # by the weight of the whole optimizer step, see `_get_num_items_in_batch`

    # types that the parent classes leave wider, or infer from a first value of `None`
    args: Any
    model: Any
    processing_class: PreTrainedTokenizerBase
    _signature_columns: Any

    def __init__(self, **kwargs: Any) -> None:
        self._metrics = {"train": RatioMetrics(), "eval": RatioMetrics()}
        super().__init__(**kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "`nn.DataParallel` is not supported, and several GPUs are visible to this one process. Start the "
                "script with `accelerate launch`, or set `CUDA_VISIBLE_DEVICES` to a single one."
            )
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

    # ---- Data ----

    def _prepare_datasets(
        self, train_dataset: Any, eval_dataset: Any, processing_class: PreTrainedTokenizerBase, args: Any
    ) -> tuple[Any, Any]:
        """The data sets as given at construction, prepared."""
        self.preprocessing_report: dict[str, dict[str, int]] = {}
        if train_dataset is not None:
            train_dataset = self._prepare_dataset(train_dataset, processing_class, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(part, processing_class, args, name) for name, part in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, processing_class, args, "eval")
        return train_dataset, eval_dataset

    def _prepare_if_raw(self, dataset: Any, name: str) -> Any:
        """A data set given to `evaluate` or `predict`: prepared, unless it is already."""
        if not isinstance(dataset, Dataset) or "branches" in dataset.column_names:
            return dataset
        return self._prepare_dataset(dataset, self.processing_class, self.args, name)

    def _score_rows(
        self,
        lengths: list[int],
        batch_size: int,
        desc: str,
        score: Callable[[list[int]], list[list[float]]],
    ) -> list[list[float]]:
        """
        Score rows in batches of similar length, over all processes.

        Args:
            lengths (`list[int]`):
                Length of each row in tokens.
            batch_size (`int`):
                Rows per batch.
            desc (`str`):
                Label of the progress bar.
            score (`Callable[[list[int]], list[list[float]]]`):
                Scores of the rows with the given indices.

        Returns:
            `list[list[float]]`: scores of all rows, in their order, in every process.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every process scores as many rows: weights that are sharded are gathered by all of them together. Rows are
        # dealt out in turn, so that every process has short and long ones.
        order += order[: -len(order) % processes]
        own = order[rank::processes]
        computed: list[tuple[int, list[float]]] = []
        with torch.no_grad():
            for start in tqdm(range(0, len(own), batch_size), desc=desc):
                indices = own[start : start + batch_size]
                computed += zip(indices, score(indices), strict=True)
        scores = dict(gather_object(computed))
        return [scores[index] for index in range(len(lengths))]

    # ---- Trainer hooks ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """
        The loop of `Trainer`, with batches of uneven size gathered as they are, and metrics that are means over all
        pairs or states: `Trainer` itself takes means of means over batches.
        """
        self.gather_function = partial(gather_uneven, self.accelerator)  # the loop sets it back at its end
        self._metrics["eval"].clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        collected = self._metrics["eval"].pop(self.accelerator)
        exact = {f"{prefix}_{name}": value for name, value in collected.items()}
        return output._replace(metrics=(output.metrics or {}) | exact)

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
                `model_name` (`str`), `dataset_name` (`str`), `tags` (`str` or `list[str]`) besides the trainer's own,
                and `results` (`dict`), rows of the table of results; all optional, see
                [`~dapo_trl.cards.save_model_card`].
        """
        save_model_card(self, super().create_model_card, *args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
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
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return f"{Path(name).name or type(model).__name__}-{suffix}"


def row_length(row: dict[str, Any]) -> int:
    """
    Longest sequence of a tokenized row.

    Args:
        row (`dict`):
            Tokenized row.

    Returns:
        `int`: tokens, context included.
    """
    return len(row["context_ids"]) + max(sum(map(len, branch)) for branch in row["branches"])
