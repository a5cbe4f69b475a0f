"""
Configuration of [`DAPOTrainer`].
"""

import math
from dataclasses import dataclass, field

from dapo_trl.step_config import _StepConfig
from dapo_trl.targets import LOG_PARTITIONS


@dataclass
class DAPOConfig(_StepConfig):
    r"""
    Configuration of [`DAPOTrainer`], for Direct Advantage Policy Optimization (arXiv 2412.18279; not ByteDance's DAPO).

    Defaults are the paper's; "paper" below quotes it. All arguments of [`~transformers.TrainingArguments`] apply too. A
    batch is counted in rows: `per_device_train_batch_size=8` takes 8 states with all their candidates, or 8 solutions
    with all their steps. The paper's batch of 2,048 pairs is about 500 state rows a step.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`, used when `model` is a name or path.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow models and tokenizers with Python code of their own.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to switch dropout off. The log-ratio of a policy to its reference has no meaning under dropout.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `2048`):
            Longest sequence in tokens, prompt included. What exceeds it is cut by whole steps, counted and reported.
            `None` cuts nothing.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this length.
        dataset_num_proc (`int`, *optional*):
            Processes that tokenize the data set.
        layout (`str`, *optional*, defaults to `"tree"`):
            `"tree"` computes what the sequences of a batch have in common once, see `docs/prefix_tree.md`; `"padded"`
            anew for each sequence. What is learned is the same. A model that cannot attend over trees gets the padded
            layout, with a warning.
        max_tokens_per_row (`int`, *optional*):
            Token budget of a row of trees; a larger batch becomes several rows. In a single process they go through the
            model one after the other, so that this bounds memory, whatever the batch size; several processes, and
            `loss_type="listwise"`, run all rows of a batch together. A sequence that exceeds it is cut as for
            `max_length`. `None` takes what is fastest: 4,096 on a CPU, but more rather than repeat a long path; 2,048
            under `attn_implementation="eager"`, or the longest sequence; no limit on a GPU.
        min_advantage_gap (`float`, *optional*, defaults to `0.1`):
            States whose largest and smallest advantage differ by less are left out. Paper: 0.1. `0.0` keeps all.
        duplicate_weights (`str`, *optional*, defaults to `"uniform"`):
            Weight of a candidate in the loss. Paper: `"uniform"`, every unique candidate counts once. `"counts"` weighs
            it by how often it was sampled, so that the weighted advantages of a state sum to zero.
        reliability_weights (`bool`, *optional*, defaults to `False`):
            Whether to multiply the weight of a candidate by how far its advantage can be relied on, the column
            `reliabilities` that [`add_advantages`] writes where the values have standard errors. Paper: no.
        min_reliability (`float`, *optional*, defaults to `0.0`):
            Candidates whose reliability is lower are left out; the advantages of the others stay as they are. Paper:
            none is left out.

        > Parameters that control the reference policy

        precompute_ref_log_probs (`bool`, *optional*, defaults to `True`):
            Whether to compute the reference's log-probabilities once, before training, and then free the reference. The
            paper's code does. `False` keeps the reference in memory and computes them in every step.
        precompute_ref_batch_size (`int`, *optional*):
            Rows per batch while doing so. `None` takes the batch size of training or evaluation.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `0.01`):
            Scale of the target A/beta of a step's log-ratio. Paper: 0.01 or 0.02. A small model trained for a few
            hundred steps wants more: the demo uses 0.03.
        log_partition (`str`, *optional*):
            What is subtracted from the target A/beta, so that it is that of the soft-optimal policy: `"sample"`, the
            log of the mean of exp(A/beta) over the samples of the state, or `"gaussian"`, mean/beta + var/(2 beta^2),
            which is usable for large beta only, see [`~dapo_trl.targets.log_partition`]. It needs rows with several
            candidates of a state. Paper: `None`.
        loss_type (`str`, *optional*, defaults to `"squared"`):
            `"squared"`, the paper's regression of log-ratios onto A/beta, see [`~dapo_trl.losses.dapo_loss`]; or
            `"listwise"`, which compares the candidates of a state with each other by their `values`, see
            [`~dapo_trl.losses.listwise_loss`], and knows neither `beta` nor `log_partition`, nor weights of candidates.
            It needs state rows.
        value_power (`float`, *optional*, defaults to `1.0`):
            Power of the candidates' values in the targets of `loss_type="listwise"`: the larger, the more is asked for.
        ref_power (`float`, *optional*, defaults to `1.0`):
            Power of the reference's probabilities in them.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `num_train_epochs`: `1` instead of `3`. The paper does not state it.
    > - `learning_rate`: `5e-7` instead of `5e-5` (paper).
    > - `adam_beta2`: `0.95` instead of `0.999` (the paper's code).
    > - `logging_steps`, `gradient_checkpointing` and `bf16` as in all TRL trainers.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of AdamW. Paper: 5e-7."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data. Paper: not stated."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW. The paper's code: 0.95."})

    min_advantage_gap: float = field(
        default=0.1, metadata={"help": "States with a smaller advantage gap are left out. Paper: 0.1."}
    )
    duplicate_weights: str = field(
        default="uniform",
        metadata={
            "help": "Weight of a candidate: 'uniform' (paper) or 'counts' (how often it was sampled).",
            "choices": ["uniform", "counts"],
        },
    )
    reliability_weights: bool = field(
        default=False, metadata={"help": "Whether to weigh candidates by the column `reliabilities`. Paper: no."}
    )
    min_reliability: float = field(
        default=0.0, metadata={"help": "Candidates with a smaller reliability are left out. Paper: none."}
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Whether to compute the reference's log-probabilities once, before training."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per batch while precomputing the reference's log-probabilities."}
    )
    beta: float = field(default=0.01, metadata={"help": "Scale of the target A/beta. Paper: 0.01 or 0.02."})
    log_partition: str | None = field(
        default=None,
        metadata={
            "help": "Log-partition that is subtracted from the targets: 'sample', 'gaussian', or none (paper).",
            "choices": [*LOG_PARTITIONS],
        },
    )
    loss_type: str = field(
        default="squared",
        metadata={
            "help": "'squared' (paper), or 'listwise': candidates of a state against each other, by their values.",
            "choices": ["squared", "listwise"],
        },
    )
    value_power: float = field(default=1.0, metadata={"help": "Power of the values in listwise targets."})
    ref_power: float = field(
        default=1.0, metadata={"help": "Power of the reference's probabilities in listwise targets."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be positive and finite, got {self.beta}. The paper uses 0.01 or 0.02.")
        if not 0 <= self.min_advantage_gap <= 1:
            raise ValueError(
                f"`min_advantage_gap` must lie in [0, 1], got {self.min_advantage_gap}. The paper uses 0.1."
            )
        if not 0 <= self.min_reliability <= 1:
            raise ValueError(f"`min_reliability` must lie in [0, 1], got {self.min_reliability}. 0 leaves none out.")
        if self.duplicate_weights not in ("uniform", "counts"):
            raise ValueError(f"`duplicate_weights` must be 'uniform' or 'counts', got {self.duplicate_weights!r}.")
        self._check_whole_numbers({"precompute_ref_batch_size": 1})
        self._check_targets()

    def _check_targets(self) -> None:
        if self.log_partition not in (None, *LOG_PARTITIONS):
            raise ValueError(f"`log_partition` must be 'sample', 'gaussian' or None, got {self.log_partition!r}.")
        if self.loss_type not in ("squared", "listwise"):
            raise ValueError(f"`loss_type` must be 'squared' or 'listwise', got {self.loss_type!r}.")
        if self.loss_type == "listwise" and self.log_partition is not None:
            raise ValueError(
                f'`log_partition={self.log_partition!r}` is about targets of `loss_type="squared"`. Remove one of them.'
            )
        if self.loss_type == "listwise" and self.reliability_weights:
            raise ValueError(
                '`reliability_weights` weighs pairs, and `loss_type="listwise"` has none: it compares the candidates '
                "of a state. Remove one of them; `min_reliability` leaves candidates out."
            )
        if self.loss_type == "squared" and (self.value_power, self.ref_power) != (1.0, 1.0):
            raise ValueError('`value_power` and `ref_power` are about `loss_type="listwise"`. Set it, or remove them.')
        for name in ("value_power", "ref_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be 0 or more, and finite, got {getattr(self, name)}.")
