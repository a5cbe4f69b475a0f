"""
Configuration of [`StepCriticTrainer`].
"""

from dataclasses import dataclass, field

from dapo_trl.step_config import _StepConfig


@dataclass
class StepCriticConfig(_StepConfig):
    r"""
    Configuration of [`StepCriticTrainer`], the critic of Direct Advantage Policy Optimization (arXiv 2412.18279).

    Defaults are the paper's; "paper" below quotes it. All arguments of [`~transformers.TrainingArguments`] apply too. A
    batch is counted in solutions, each with all its states.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`, used when `model` is a name or path.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow models and tokenizers with Python code of their own.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to switch dropout off. transformers puts a dropout of 0.1 before the head of most token classifiers.

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
            model one after the other, so that this bounds memory, whatever the batch size; several processes run all
            rows of a batch together. A sequence that exceeds it is cut as for `max_length`. `None` takes what is
            fastest: 4,096 on a CPU, but more rather than repeat a long path; 2,048 under
            `attn_implementation="eager"`, or the longest sequence; no limit on a GPU.

        > Parameters that control the training

        state_weights (`str`, *optional*, defaults to `"rollouts"`):
            Weight of a state in the loss: `"rollouts"` for the binomial likelihood of its counts, `"uniform"` for the
            paper's plain mean over states. They agree when every state has the same number of rollouts, as in the
            paper.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: `5e-6` instead of `5e-5` (paper).
    > - `num_train_epochs`: `1` instead of `3` (paper).
    > - `logging_steps`, `gradient_checkpointing` and `bf16` as in all TRL trainers.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW. Paper: 5e-6."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data. Paper: 1."})

    state_weights: str = field(
        default="rollouts",
        metadata={
            "help": "Weight of a state: 'rollouts' (binomial likelihood) or 'uniform' (paper).",
            "choices": ["rollouts", "uniform"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_weights not in ("rollouts", "uniform"):
            raise ValueError(f"`state_weights` must be 'rollouts' or 'uniform', got {self.state_weights!r}.")
