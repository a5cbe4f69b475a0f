"""
Arguments of a recipe. Nothing heavy is imported, so that `dapo-trl run --help` answers at once.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_trl.settings import SettingsError, read_settings


if TYPE_CHECKING:
    from dapo_trl.rollouts import RolloutConfig


@dataclass
class ServerArguments:
    """
    Entries of the section `server`: arguments of [`~dapo_trl.engines.openai.OpenAIEngine`], which has the defaults.
    """

    model: str | None = None
    timeout: float = 600.0
    max_retries: int = 8
    max_context: int | None = None
    max_downtime: float | None = None


@dataclass
class ExecutorArguments:
    """
    Entries of the section `executor`: what runs programs, see [`~dapo_trl.execution.local.LocalExecutor`] and
    [`~dapo_trl.execution.remote.RemoteExecutor`], which have the defaults.
    """

    isolation: str = "auto"
    num_workers: int | None = None
    python: str | None = None
    cpu: float | None = None
    wall: float | None = None
    memory: int | None = None
    url: str | None = None


TEMPLATES = {  # how questions are put, for each verifier
    "math": "Question: {question}\nAnswer, step by step, one step a line, and end with '#### <result>'.\n",
    "code": "{question}",
}
_CHOICES = {
    "verifier": list(TEMPLATES),
    "engine": ["transformers", "openai", "vllm"],
    "values": ["critic", "monte_carlo", "shrinkage", "both"],
    "later_critics": ["train", "shift", "batch"],
    "critic_states": ["solutions", "candidates"],
    "overlong": ["wrong", "drop", "soft"],
}
# What belongs to this machine.
_PRIVATE = ("output_dir", "server_urls", "executor", "estimate", "report_to", "max_concurrency")
_LEAST = {
    "seed": 0,
    "iterations": 1,
    "num_train_problems": 1,
    "num_test_problems": 1,
    "num_problems_with_signal": 1,
    "max_concurrency": 1,
    "generation_batch_size": 1,
    "shard_size": 1,
    "num_solutions": 2,
    "num_critics": 1,
    "eval_k": 1,
}
_WHY = {"num_solutions": " Right and wrong solutions of a problem are compared."}


@dataclass
class RecipeArguments:
    """
    What a run does; the models are in TRL's `ModelConfig`. Defaults are the paper's, where it states them.
    """

    output_dir: str = field(default="runs/recipe", metadata={"help": "Where models, data sets and results go."})
    seed: int = field(default=0, metadata={"help": "Seed of problems, sampling and training."})
    iterations: int = field(
        default=1, metadata={"help": "Times the method is run, each policy the next one's generator and reference."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, json/jsonl/parquet/csv file, or 'file.py:function'."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on. If there is none, problems are held out."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Other problems to evaluate on, all of them: Hub name or file. HumanEval's and MBPP's too."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "How a question is put, for models without a chat template too. Default: with a request to end "
            "with '#### <result>', or for `verifier: code` as it is."
        },
    )
    verifier: str = field(
        default="math",
        metadata={
            "help": "What judges solutions: 'math' compares final answers, 'code' runs unit tests.",
            "choices": _CHOICES["verifier"],
        },
    )
    allow_execution: bool = field(
        default=False,
        metadata={"help": "Run the programs that the model writes, as HF_ALLOW_CODE_EVAL=1 does. Read docs/code.md."},
    )
    executor: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "What runs programs, as YAML section or JSON: isolation ('auto', 'bubblewrap', 'namespaces', "
            "'process'), num_workers (one a core), python (interpreter with packages), cpu (5 seconds), wall (20 "
            "seconds), memory (bytes, 512 MiB); or url (of a service)."
        },
    )
    step_separator: str = field(
        default="\n",
        metadata={"help": "Text that ends a step, or '<statements>' of Python code. Paper: a newline."},
    )
    num_train_problems: int | None = field(default=None, metadata={"help": "Problems to train on; all by default."})
    num_test_problems: int = field(default=1000, metadata={"help": "Problems to evaluate on."})
    num_problems_with_signal: int | None = field(
        default=None, metadata={"help": "Stop sampling at this number of problems with right and wrong solutions."}
    )
    engine: str = field(
        default="transformers",
        metadata={"help": "Sampling back end.", "choices": _CHOICES["engine"]},
    )
    server_urls: list[str] = field(
        default_factory=list, metadata={"help": "Servers of the engine 'openai', such as http://node1:8000/v1."}
    )
    max_concurrency: int = field(default=64, metadata={"help": "Requests under way at a time, engine 'openai'."})
    server: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of `OpenAIEngine`, as YAML section or JSON: model (its name at the servers, by default "
            "`model_name_or_path`), timeout (600 seconds for an answer), max_retries (8), max_downtime (600 seconds "
            "for a server to come back, 30 for one that never answered), max_context (as the servers declare)."
        },
    )
    generation_batch_size: int = field(default=64, metadata={"help": "Sequences at a time, engine 'transformers'."})
    shard_size: int = field(default=16, metadata={"help": "Problems of a shard: what a kill can cost."})
    num_solutions: int = field(default=32, metadata={"help": "Solutions per problem. Paper: 32."})
    num_kept: int = field(default=6, metadata={"help": "Solutions kept per problem. Paper: 6."})
    num_completions: int = field(default=16, metadata={"help": "Most completions per state. Paper: 16."})
    min_completions: int | None = field(
        default=None, metadata={"help": "Completions after which a state may have enough. None: never early (paper)."}
    )
    precision: float = field(default=0.08, metadata={"help": "Posterior standard deviation of a value that is enough."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest solution in tokens."})
    overlong: str = field(
        default="wrong",
        metadata={
            "help": "Samples that reach `max_new_tokens`: 'wrong', 'drop' (in no mean), or 'soft' (wrong, and right "
            "ones that come near are worth less).",
            "choices": _CHOICES["overlong"],
        },
    )
    overlong_buffer: int | None = field(
        default=None, metadata={"help": "Tokens over which 'soft' lowers the outcome. Default: a fifth of them all."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    values: str = field(
        default="critic",
        metadata={
            "help": "Where advantages come from: 'critic' (paper), 'monte_carlo', 'shrinkage' (Monte Carlo counts with "
            "the critic as a prior) or 'both' (two policies, of the first two).",
            "choices": _CHOICES["values"],
        },
    )
    kernel_bandwidth: float | None = field(
        default=None,
        metadata={
            "help": "With `values: monte_carlo`, from the second iteration on: outcomes of earlier iterations count "
            "for states that recur, by a kernel of this width (docs/siblings/kae.md). None: not at all (paper)."
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Backbone of the critic. Default: the policy's model."}
    )
    num_critics: int = field(
        default=1,
        metadata={"help": "Critics that are trained, each with a seed of its own; advantages are of their mean value."},
    )
    allow_unfit_critic: bool = field(
        default=False,
        metadata={
            "help": "Go on with a critic that knows too little of held-out problems, which is refused otherwise."
        },
    )
    later_critics: str = field(
        default="train",
        metadata={
            "help": "Critics from the second iteration on: 'train' those of the iteration before further, or take the "
            "first ones' values as they are but for a 'shift' that fits the outcomes of today, and with 'batch' also "
            "for how the other problems turned out (docs/siblings/basis.md).",
            "choices": _CHOICES["later_critics"],
        },
    )
    critic_states: str = field(
        default="solutions",
        metadata={
            "help": "What the critic learns from: states of the kept 'solutions' (paper), or those and the "
            "'candidates' that none of them takes.",
            "choices": _CHOICES["critic_states"],
        },
    )
    anchor_states: bool = field(
        default=False,
        metadata={
            "help": "Train the policy also on the states of the kept solutions with nothing to compare, with an "
            "advantage of 0: it stays what it was there."
        },
    )
    critic: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Arguments of `StepCriticConfig`, as YAML section or JSON."}
    )
    policy: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Arguments of `DAPOConfig`, as YAML section or JSON."}
    )
    eval_k: int = field(default=4, metadata={"help": "Samples per test problem, for mean@k and pass@k."})
    eval_pass_k: list[int] = field(
        default_factory=list, metadata={"help": "Other k of pass@k, up to `eval_k`, estimated from the same samples."}
    )
    estimate: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "What `--dry-run` takes for granted: num_parameters, critic_parameters, prompt_tokens, "
            "solution_tokens, steps, signal, shared, reuse, adaptive, contrast, siblings, num_gpus, "
            "num_generation_gpus, gpu_tflops, generation_tokens_per_second. Meaning and defaults: `Assumptions` in "
            "`dapo_trl/assumptions.py`."
        },
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Publish data sets and models on the Hub, with their cards, as they are done."}
    )
    hub_dataset_id: str | None = field(
        default=None,
        metadata={
            "help": "Where: name of the data sets, to which '-sampled' and '-values' are added. Default: the name of "
            "the run's folder, in your own namespace."
        },
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Name of the models, to which '-critic' ('-critic-2', ...), '-policy' and '-policy_monte_carlo' "
            "are added. Default: that of the data sets."
        },
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether they are private. Default: what is usual in the namespace."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models with Python code of their own."})
    report_to: str = field(default="none", metadata={"help": "Where metrics go: 'none', 'wandb', 'tensorboard', ..."})

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.{_WHY.get(name, '')}")
        for k in self.eval_pass_k:
            if not 1 <= k <= self.eval_k:
                raise ValueError(f"`eval_pass_k` must be from 1 to `eval_k`, which is {self.eval_k}, got {k}.")
        if self.temperature == 0:
            raise ValueError("`temperature` must be positive: greedy solutions of a problem are all the same.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                names = ", ".join(map(repr, known[:-1]))
                raise ValueError(f"`{name}` must be {names} or {known[-1]!r}, got {getattr(self, name)!r}.")
        if self.values == "both" and self.iterations > 1:
            raise ValueError('`values="both"` trains two policies; several iterations need one. Choose one of them.')
        self.prompt_template = self.prompt_template or TEMPLATES[self.verifier]
        self.step_separator = self.step_separator.replace("\\n", "\n")
        if "{question}" not in self.prompt_template:
            raise ValueError(f"`prompt_template` must contain {{question}}, got {self.prompt_template!r}.")
        if self.engine == "openai" and self.iterations > 1:
            raise ValueError(
                '`engine="openai"` cannot load the next policy. Run one iteration, start the servers anew.'
            )
        if (self.engine == "openai") != bool(self.server_urls):
            raise ValueError('`server_urls` and `engine="openai"` belong together; give both or neither.')
        self._read_sections()
        self._check_kernel()
        self._check_later_critics()
        if self.overlong == "soft" and self.values == "shrinkage":
            raise ValueError(
                '`values="shrinkage"` counts outcomes that are right or wrong, and `overlong="soft"` makes others. '
                "Choose `critic` or `monte_carlo`, or another `overlong`."
            )
        if self.overlong == "soft" and (self.policy.get("reliability_weights") or self.policy.get("min_reliability")):
            raise ValueError(
                'How far values can be relied on is fitted to outcomes that are right or wrong, and `overlong="soft"` '
                "makes others. Remove `policy.reliability_weights` and `policy.min_reliability`, or choose another "
                "`overlong`."
            )
        if self.anchor_states and self.policy.get("loss_type") == "listwise":
            raise ValueError(
                '`anchor_states` are states with nothing to compare, which `policy.loss_type="listwise"` does. Remove '
                "one of them."
            )
        if self.executor and self.verifier != "code":
            raise ValueError(f'`executor` is about `verifier="code"`, not {self.verifier!r}. Remove it.')
        if self.server and self.engine != "openai":
            raise ValueError(f'`server` is about `engine="openai"`, not {self.engine!r}. Remove it.')
        self.rollout_config(0)  # refuses numbers that do not fit before anything is loaded

    def _check_kernel(self) -> None:
        if self.kernel_bandwidth is None:
            return
        if not self.kernel_bandwidth > 0:
            raise ValueError(f"`kernel_bandwidth` must be positive, or None, got {self.kernel_bandwidth}.")
        if self.values != "monte_carlo" or self.iterations == 1:
            raise ValueError(
                '`kernel_bandwidth` is about `values="monte_carlo"` in more than one iteration; got '
                f"{self.values!r} and {self.iterations}. Remove it, or change them."
            )
        if self.min_completions is not None:
            raise ValueError(
                "`kernel_bandwidth` takes mean outcomes, which `min_completions` biases: it stops when they are clear. "
                "Remove one of them."
            )

    def _check_later_critics(self) -> None:
        if self.later_critics == "train":
            return
        if self.values not in ("critic", "shrinkage") or self.iterations == 1:
            raise ValueError(
                "`later_critics` is about critics from the second iteration on; got "
                f"`values: {self.values}` and {self.iterations} iterations. Remove it, or set `values: critic` or "
                "`shrinkage`, and `iterations: 2` or more."
            )
        if self.later_critics == "batch" and self.min_completions is not None:
            raise ValueError(
                '`later_critics="batch"` takes mean outcomes, which `min_completions` biases: it stops when they are '
                'clear. Remove that, or choose "shift".'
            )

    def _read_sections(self) -> None:
        for section, kind in (trainer_configs() | {"server": ServerArguments, "executor": ExecutorArguments}).items():
            entries = read_settings(getattr(self, section), kind, section=section)
            if "output_dir" in entries:
                raise ValueError(f"`{section}.output_dir` is a folder of `output_dir`. Remove it, or set `output_dir`.")
            setattr(self, section, entries)

    def rollout_config(self, iteration: int) -> "RolloutConfig":
        """Settings of sampling; each iteration draws with seeds of its own."""
        from dapo_trl.engines import SamplingConfig
        from dapo_trl.rollouts import RolloutConfig

        return RolloutConfig(
            num_solutions=self.num_solutions,
            num_kept=self.num_kept,
            num_completions=self.num_completions,
            min_completions=self.min_completions,
            precision=self.precision,
            separator=self.step_separator,
            overlong=self.overlong,
            overlong_buffer=self.overlong_buffer,
            sampling=SamplingConfig(max_new_tokens=self.max_new_tokens, temperature=self.temperature),
            seed=self.seed + 1_000_003 * iteration,
        )


SECTIONS = tuple(entry.name for entry in fields(RecipeArguments) if entry.default_factory is dict)


def trainer_configs() -> dict[str, Any]:
    """
    Which sections are about training.

    Returns:
        `dict`: section -> class of its entries.
    """
    from dapo_trl.dapo_config import DAPOConfig
    from dapo_trl.step_critic_config import StepCriticConfig

    return {"critic": StepCriticConfig, "policy": DAPOConfig}


def refuse_missing_path(name: str, value: str | None) -> None:
    """
    Refuse a local path where there is nothing; what is no local path may be on the Hub.

    Args:
        name (`str`):
            Argument that holds it.
        value (`str`, *optional*):
            The path, of a Python file with or without `:function`. A local one begins with `.` or `/`.

    Raises:
        SettingsError: if there is nothing.
    """
    path = (value or "").partition(":")[0]
    if path.startswith((".", "/")) and not Path(path).exists():
        raise SettingsError(f"`{name}` is {value!r}, but there is no such file or folder. Check the path.")


def changed_fields(config: Any) -> dict[str, Any]:
    """
    Fields of a dataclass that differ from their defaults.

    Args:
        config (dataclass):
            Arguments.

    Returns:
        `dict`.
    """
    defaults = type(config)()
    given = asdict(config)
    return {name: value for name, value in given.items() if value != getattr(defaults, name)}


def public_settings(given: dict[str, Any]) -> dict[str, Any]:
    """
    Settings that others may see: without what belongs to this machine, and of paths only their last part.

    Args:
        given (`dict`):
            Settings of a recipe.

    Returns:
        `dict`.

    Example:

    ```python
    >>> from dapo_trl.recipe_arguments import public_settings

    >>> public_settings({"output_dir": "runs/mine", "seed": 1, "dataset_name": "/home/me/math.py:make"})
    {'seed': 1, 'dataset_name': 'math.py:make'}

    ```
    """
    kept = {name: value for name, value in given.items() if name not in _PRIVATE and "hub" not in name}
    return {name: _without_path(value) for name, value in kept.items()}


def _without_path(value: Any) -> Any:
    """Of a local path, its name."""
    if isinstance(value, dict):
        return {name: _without_path(part) for name, part in value.items()}
    path = value.partition(":")[0] if isinstance(value, str) else ""
    is_path = bool(path) and (os.path.isabs(path) or os.path.exists(path))
    return os.path.basename(os.path.normpath(value)) if is_path else value
