"""
What the configurations of the two trainers have in common: how a model is loaded, and how rows are laid out.
"""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig


@dataclass
class _StepConfig(_BaseConfig):
    # The fields are documented in the subclasses, where users look for them.

    # `TrainingArguments` declares it without `ClassVar`, so it cannot have that here.
    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained`, when `model` is a name or path."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to allow models and tokenizers with Python code of their own."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to switch dropout off."})
    max_length: int | None = field(
        default=2048, metadata={"help": "Longest sequence in tokens. What exceeds it is cut by whole steps."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad sequences to a multiple of this length."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data set."})
    layout: str = field(
        default="tree",
        metadata={"help": "'tree' (every shared token once) or 'padded'.", "choices": ["tree", "padded"]},
    )
    max_tokens_per_row: int | None = field(
        default=None, metadata={"help": "Token budget of a row of trees. A larger batch becomes several rows."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in ("tree", "padded"):
            raise ValueError(f"`layout` must be 'tree' or 'padded', got {self.layout!r}.")
        self._check_whole_numbers({"max_length": 2, "max_tokens_per_row": 2})  # a prompt and a step
        self._check_whole_numbers({"pad_to_multiple_of": 1, "dataset_num_proc": 1})
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel=True` would replace the forward pass that scores of steps are read from. Set "
                '`model_init_kwargs={"use_kernels": True}` for fused kernels.'
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` has no meaning here: the loss has targets of "
                "its own, no labels. Remove it."
            )

    def _check_whole_numbers(self, smallest: dict[str, int]) -> None:
        """Refuse arguments below the smallest number that makes sense; `None` switches each of them off."""
        for name, bound in smallest.items():
            number = getattr(self, name)
            if number is not None and number < bound:
                raise ValueError(f"`{name}` must be at least {bound}, or `None`; got {number}.")

    @property
    def length_limit(self) -> tuple[int | None, str]:
        """Longest sequence that is let through, in tokens or `None`; and the argument that says so."""
        names = ("max_length", "max_tokens_per_row") if self.layout == "tree" else ("max_length",)
        limits = [(getattr(self, name), name) for name in names]
        return min((limit for limit in limits if limit[0] is not None), default=(None, "max_length"))
