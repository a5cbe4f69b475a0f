"""
Which of the two layouts of a batch a trainer uses: the one that is asked for, if its models can have it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from dapo_trl.collators import items_by_row, split_rows
from dapo_trl.modeling import transformers_model
from dapo_trl.tokenized_rows import row_length
from dapo_trl.tree_attention import ATTENTION_NAME, candidate_attentions, tree_arguments, tree_obstacle


logger = get_logger(__name__)

# Budgets of a row of trees: under dense attention, whose cost grows with its square; and on a CPU, whose caches longer
# rows leave. There a tree is cut only near its root: repeating a long path costs more than a long row. Measured on two
# cores at a width of 256; the optimum is flat.
_DENSE_ROW = 2048
_CPU_ROW = 4096


class _LayoutMixin:
    """
    The part of a trainer that knows layouts: tries them at start-up, and hands batches to a model accordingly.

    Attributes:
        layout (`str` or `None`):
            Layout in use, `"tree"` or `"padded"`: the one asked for, if the model can. `None` for a data collator that
            knows no layouts, and before any rows are known.
    """

    # of the trainer
    args: Any
    model: Any
    accelerator: Any
    data_collator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]]
    _score: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]

    # set by the trainer before anything here is called
    layout: str | None
    _attention: str
    _has_own_collator: bool

    def _settle_layout(self, rows: Sequence[Any], models: Sequence[Any]) -> None:
        """
        Take the layout that was asked for, if the models can: a small sample is scored both ways.

        Args:
            rows (`Sequence`):
                Tokenized rows.
            models (`Sequence`):
                Models that shall score trees, as they will be called. `self.model` counts as one of them even if it
                cannot be called yet and another stands in for it.
        """
        wanted = getattr(self.data_collator, "layout", None) if self._has_own_collator else self.args.layout
        if self.layout == "padded":
            return
        if wanted != "tree":
            self.layout = wanted
            return
        sample, longest = _sample(rows)
        if self.layout == "tree":  # other rows: they may be longer
            reason = next((why for model in models if (why := tree_obstacle(transformers_model(model), longest))), None)
        else:
            reason = self._try_trees(sample, longest, models)
        if reason is None:
            self.layout = "tree"
            self._set_row_budget(longest)
            return
        name = type(transformers_model(self.model)).__name__
        if self._has_own_collator:
            raise ValueError(
                f"`data_collator` lays rows out as trees, but {name} cannot have it: {reason}. Make it with "
                '`layout="padded"`.'
            )
        self.layout = "padded"
        self._use_layout("padded")
        logger.warning(
            f'`layout="tree"` was asked for, but {name} cannot have it: {reason}. The layout is padded: every step is '
            "learned from as before, but shared prefixes are computed again for each sequence. Set "
            '`layout="padded"` to silence this.'
        )

    def _try_trees(self, sample: list[Any], longest: int, models: Sequence[Any]) -> str | None:
        """Set trees up; the reason, if that cannot be done."""
        if (self.is_deepspeed_enabled or self.is_fsdp_enabled) and any(model is self.model for model in models):
            return "DeepSpeed and FSDP place its weights only when training starts, so that it cannot be tried"
        plain = [transformers_model(model) for model in [*models, self.model]]
        before = [model.config.get_text_config()._attn_implementation for model in plain]
        for model in plain:
            if reason := tree_obstacle(model, longest):
                return reason
        reason = "its reference policy has another attention implementation"
        for attention in candidate_attentions(plain[0]):
            if any(attention not in candidate_attentions(model) for model in plain):
                continue
            if attention != "dense":
                for model in plain:
                    model.set_attn_implementation(ATTENTION_NAME)
            self._use_layout("tree", attention)
            reasons = [reason for model in models if (reason := self._check_trees(model, sample))]
            reasons = [reason for reason in gather_object(reasons) if reason]
            if not reasons:
                return None
            reason = reasons[0]
            for model, implementation in zip(plain, before, strict=True):
                model.set_attn_implementation(implementation)
        return reason

    def _check_trees(self, model: Any, sample: list[Any]) -> str | None:
        """Score a sample both ways, and once under a wrong rule, which must show; what is wrong, if anything is."""
        was_training = model.training
        model.eval()
        try:
            self.data_collator.layout = "padded"
            alone = self._score_sample(model, sample)
            self.data_collator.layout = "tree"
            in_tree = self._score_sample(model, sample)
            in_sequence = self._score_sample(model, sample, ignore_branches=True)
        except Exception as error:  # whatever a model of unknown architecture may object to
            return f"scoring a sample failed with {type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        difference = (in_tree - alone).abs()
        excess = difference - self._tolerance(alone.abs())
        if not bool((excess <= 0).all()):
            worst = int(excess.argmax())
            return (
                f"it scores the same tokens differently in a tree ({in_tree[worst]:.4f}) and alone "
                f"({alone[worst]:.4f}), so it does not honour the attention mask or the positions"
            )
        control = float((in_sequence - alone).abs().max())
        if control <= 2 * float(difference.max()):
            return (
                f"its scores do not show whether it honours the attention mask: they differ by {difference.max():.2g} "
                f"from those of separate sequences, and by {control:.2g} if every token sees all before it"
            )
        return None

    def _score_sample(self, model: Any, sample: list[Any], ignore_branches: bool = False) -> torch.Tensor:
        inputs = self._prepare_inputs(self.data_collator(sample))
        if ignore_branches:
            inputs["subtree_end"] = torch.full_like(inputs["subtree_end"], inputs["subtree_end"].shape[1])
        return self._score_without_gradients(model, inputs).double()

    def _tolerance(self, scores: torch.Tensor) -> torch.Tensor:
        """Difference that rounding explains. In half precision the errors of a step's tokens add up at random."""
        dtype = transformers_model(self.model).dtype
        is_half = dtype in (torch.bfloat16, torch.float16) or self.accelerator.mixed_precision in ("bf16", "fp16")
        return 5e-2 * (1 + scores.sqrt()) if is_half else 1e-4 * (1 + scores)

    def _set_row_budget(self, longest: int) -> None:
        """Unless it is given: what suits the attention and the device, and holds the longest sequence."""
        if self.args.max_tokens_per_row is not None or self._has_own_collator:
            return
        collator = self.data_collator
        if self._attention == "dense":
            collator.max_tokens_per_row = max(collator.max_tokens_per_row or _DENSE_ROW, longest)
        elif self.model.device.type == "cpu":
            collator.max_tokens_per_row, collator.max_repeat = _CPU_ROW, _CPU_ROW // 32

    def _use_layout(self, layout: str, attention: str = "") -> None:
        self._attention = attention
        self.data_collator.layout = layout
        self.data_collator.flex_rows = attention == "flex"

    def _model_inputs(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the model's forward takes of a batch."""
        if "subtree_end" not in inputs:
            return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        plain = transformers_model(model)
        width = getattr(plain.config.get_text_config(), "hidden_size", 256)
        tree = tree_arguments(inputs["subtree_end"], self._attention, plain.dtype, width)
        return {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], **tree}

    def _score_without_gradients(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`_score` row by row, so that the budget of a row bounds memory."""
        parts = split_rows(inputs) if self._runs_rows_apart else [inputs]
        with torch.no_grad():
            scores = torch.cat([self._score(model, part) for part in parts])
        if len(parts) == 1:
            return scores
        return torch.empty_like(scores).index_copy(0, torch.cat(items_by_row(inputs)).to(scores.device), scores)

    @property
    def _runs_rows_apart(self) -> bool:
        """
        Whether the rows of a batch go through the model one by one, so that the budget of a row bounds memory. Several
        processes would have to agree on their number, and DeepSpeed steps its optimizer at each backward pass.
        """
        return self.accelerator.num_processes == 1 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)


def _sample(rows: Any, num_branches: int = 3, num_neighbours: int = 3) -> tuple[list[Any], int]:
    """A few rows that are hard for a layout, the longest among them, with a few branches each; and its length."""
    lengths = rows["length"] if hasattr(rows, "column_names") else [row_length(row) for row in rows]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    key = rows[longest].get("prompt_key")
    keys = rows["prompt_key"] if hasattr(rows, "column_names") else [row.get("prompt_key") for row in rows]
    neighbours = [index for index in range(len(keys)) if keys[index] == key and index != longest]
    others = [index for index in range(len(keys)) if keys[index] != key or key is None]
    chosen = dict.fromkeys([longest, *neighbours[:num_neighbours], *others[:2]])
    sample = []
    for index in chosen:
        context_ids, branches = rows[index]["context_ids"], rows[index]["branches"][:num_branches]
        # a sibling, as long as the first branch, so that there is something that must not be seen
        size = sum(map(len, branches[0]))
        branches = [*branches, [(context_ids + branches[0][0])[::-1][:size]]]
        numbers = [1.0] * sum(map(len, branches))
        sample.append({"context_ids": context_ids, "branches": branches, "advantages": numbers, "weights": numbers})
    return sample, lengths[longest]
