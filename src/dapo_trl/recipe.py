"""
The whole method as one resumable run:

    problems -> solutions -> step values -> critic -> advantages -> policy -> accuracy

Each stage has a place in the run's folder, is skipped when it is done there, and goes on where it was when it was
killed. With several iterations each policy is the next one's generator and reference.
"""

import dataclasses
import json
import sys
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, get_quantization_config

from dapo_trl.dapo_config import DAPOConfig
from dapo_trl.engines import Engine
from dapo_trl.engines.transformers import TransformersEngine
from dapo_trl.evaluation import evaluate_policy
from dapo_trl.execution import ExecutionNotAllowedError, allow_execution
from dapo_trl.files import only_one, run_once, wait_for, write_atomically
from dapo_trl.iteration import Iteration
from dapo_trl.judging import RewardFunction, name_of
from dapo_trl.loading import load_policy
from dapo_trl.model_identity import identify
from dapo_trl.modeling import free_memory
from dapo_trl.problems import load_problems, load_test_problems, refuse_long_prompts, set_apart
from dapo_trl.publishing import Publisher
from dapo_trl.recipe_arguments import RecipeArguments, refuse_missing_path
from dapo_trl.recipe_checks import refuse_bad_training, refuse_empty_folder, refuse_misfit_adapter
from dapo_trl.run_folder import (
    critic_folder,
    iteration_folder,
    made_how,
    model_path,
    policy_folder,
    refuse_closed_folder,
    stage_times,
)
from dapo_trl.settings import SettingsError
from dapo_trl.stages import process_state, rows_fingerprint
from dapo_trl.summary import print_evaluation, print_next, print_results, print_title
from dapo_trl.tables import table_features, with_problem_ids
from dapo_trl.verifiers.code import CodeVerifier, make_executor
from dapo_trl.verifiers.math import math_reward


EVALUATION_SEED = 1234  # the same samples for every policy of every run


class Recipe:
    """
    A run of the whole method in a folder.

    Args:
        arguments ([`RecipeArguments`]):
            What to do.
        model_config ([`~trl.ModelConfig`]):
            The policy before training, and how models are loaded.

    Raises:
        SettingsError: if a setting is missing or cannot be used.
    """

    def __init__(self, arguments: RecipeArguments, model_config: ModelConfig) -> None:
        if not model_config.model_name_or_path:
            raise SettingsError("`model_name_or_path` is missing: name the model that shall be trained.")
        if not arguments.dataset_name and not arguments.eval_dataset_name:
            raise SettingsError("`dataset_name` is missing: name the problems that shall be trained on.")
        self.arguments = arguments
        self.model_config = model_config
        self.model: str = model_config.model_name_or_path
        self.folder = Path(arguments.output_dir)
        self.results: dict[str, Any] = {}
        self._state = process_state()
        self.publisher = Publisher(arguments, model_config)
        models = {
            "model_name_or_path": self.model,
            "critic_model_name_or_path": arguments.critic_model_name_or_path,
        }
        data = {name: getattr(arguments, name) for name in ("dataset_name", "eval_dataset_name")}
        for name, value in (models | data).items():
            refuse_missing_path(name, value)
        for name, value in models.items():
            refuse_empty_folder(name, value)
        refuse_bad_training(self)

    def run(self, until: str = "train") -> dict[str, Any]:
        """
        Run all stages that are not done yet.

        Args:
            until (`str`, *optional*, defaults to `"train"`):
                Last stage to run: `"sample"`, `"values"`, `"critic"`, `"score"` (rows valued by the critic),
                `"advantages"` or `"train"`. Of several iterations, only `"train"` runs more than the first.

        Returns:
            `dict`: accuracies, metrics of the critic, and counts of everything that was left out; also written to
            `results.json` in the run's folder.

        Raises:
            SettingsError: if a setting cannot be used.
            ValueError: if a row is bad, the folder holds results of other settings, another command works in it, no
                problem carries signal, or the critic is not fit.
        """
        if not self.arguments.dataset_name:
            raise SettingsError("`dataset_name` is missing: name the problems that shall be trained on.")
        _ = self.reward_function  # what is not allowed, or does not work, is better known now
        self.publisher.log_in()
        sizes = f"{len(self.problems['train']):,} problems to train on, {len(self.test_problems):,} held out"
        num_processes = self._state.num_processes
        refuse_misfit_adapter(self)
        print_title(sizes if num_processes == 1 else f"{sizes}; {num_processes} processes")
        refuse_closed_folder(self.folder)
        with only_one(self.folder) if self._state.is_main_process else nullcontext():
            return self._run(until)

    def _run(self, until: str) -> dict[str, Any]:
        generator = self.model
        if until == "train":
            self.results["before"] = self.evaluate("before training", generator, self.folder / "before.json")
        start, number_of_critics = self.arguments.critic_model_name_or_path, self.arguments.num_critics
        critics = [start] * number_of_critics if start else None
        folders = [iteration_folder(self.folder, number) for number in range(self.arguments.iterations)]
        earlier: list[Iteration] = []
        for number, folder in enumerate(folders):
            valued_by = folders[0] if number and self.arguments.later_critics != "train" else None
            iteration = Iteration(self, number, folder, generator, critics, tuple(earlier), valued_by)
            results = iteration.run(until)
            earlier.append(iteration)
            if until != "train":
                return results
            several = {"iterations": [*self.results.get("iterations", []), results]}
            self.results |= several if len(folders) > 1 else results
            generator = model_path(folder / policy_folder(self.arguments.values))
            critics = None
            if self.arguments.values != "monte_carlo":
                critics = [model_path(critic_folder(valued_by or folder, n)) for n in range(number_of_critics)]
        self.results["arguments"] = dataclasses.asdict(self.arguments)
        self.results["stages"] = stage_times(self.folder, folders)
        print_results(self.results)
        print_next(self.folder)
        if self._state.is_main_process:
            write_atomically(self.folder / "results.json", json.dumps(self.results, indent=2))
        return self.results

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self._read(AutoTokenizer)

    def _read(self, kind: Any) -> Any:
        """Configuration or tokenizer of the model."""
        trusted = self.arguments.trust_remote_code
        try:
            return kind.from_pretrained(self.model, revision=self.revision_of(self.model), trust_remote_code=trusted)
        except (OSError, ValueError) as error:
            name = f"`model_name_or_path` is {self.model!r}, which cannot be loaded"
            raise OSError(f"{name} ({kind.__name__}): {error}") from error

    @cached_property
    def problems(self) -> DatasetDict:
        """Problems to train and to evaluate on."""
        a = self.arguments
        problems = load_problems(
            a.dataset_name or "",
            self.tokenizer,
            a.dataset_config,
            a.dataset_train_split,
            a.dataset_test_split,
            a.num_train_problems,
            a.num_test_problems,
            a.prompt_template or "",
            a.seed,
            a.verifier,
        )
        problems["train"] = with_problem_ids(problems["train"])
        table_features(problems["train"].features)  # refuses columns that sampling adds, before anything is sampled
        for rows in problems.values():
            self._refuse_long(rows)
        return problems

    @cached_property
    def test_problems(self) -> Dataset:
        """Problems to evaluate on: those of a data set of their own, or the held-out ones."""
        a = self.arguments
        if a.eval_dataset_name is None:
            return self.problems["test"]
        template = a.prompt_template or ""
        test = load_test_problems(a.eval_dataset_name, self.tokenizer, a.dataset_test_split, template, a.verifier)
        self._refuse_long(test)
        return set_apart(self.problems["train"], test, a.eval_dataset_name) if a.dataset_name else test

    def _refuse_long(self, rows: Dataset) -> None:
        if self.arguments.engine == "openai":  # servers have limits of their own
            return
        config = self._read(AutoConfig)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        refuse_long_prompts(rows, self.tokenizer, context or sys.maxsize)

    @cached_property
    def reward_function(self) -> RewardFunction:
        """What judges solutions."""
        if self.arguments.verifier == "math":
            return math_reward
        try:
            allow_execution(self.arguments.allow_execution or None)
        except ExecutionNotAllowedError as error:
            raise SettingsError(f"`verifier: code`: {error} In a recipe: `allow_execution: true`.") from error
        given = {name: value for name, value in self.arguments.executor.items() if value is not None}
        try:
            return CodeVerifier(make_executor(num_processes=self._state.num_processes, **given))
        except (ValueError, RuntimeError) as error:
            raise SettingsError(f"`executor`: {error}") from error

    def _engine_of(self, model: str) -> str:
        """Servers have the model that the run begins with; others are sampled in process."""
        is_served = model == self.model
        return "transformers" if self.arguments.engine == "openai" and not is_served else self.arguments.engine

    def make_engine(self, model: str) -> Engine:
        """Sampling back end of a policy, given by name or path."""
        a = self.arguments
        if self._engine_of(model) == "openai":
            from dapo_trl.engines.openai import OpenAIEngine

            num_calls = 2 if a.max_concurrency > 1 else 1
            requests = a.max_concurrency // num_calls
            settings: dict[str, Any] = {"model": model, "max_concurrency": requests, "num_calls": num_calls}
            settings |= {name: value for name, value in a.server.items() if value is not None}
            return OpenAIEngine(a.server_urls, tokenizer=self.tokenizer, **settings)
        if a.engine == "vllm":
            from dapo_trl.engines.vllm import VLLMEngine

            return VLLMEngine(model, self.tokenizer, **self._vllm_arguments(model))
        config = DAPOConfig(self.arguments.output_dir, **self.training_arguments({}, model))
        # Whole, also under ZeRO-3, which would share the weights out and wait for all processes to take part. The next
        # trainer's configuration sets it again.
        unset_hf_deepspeed_config()
        policy: Any = load_policy(model, config, get_quantization_config(self.model_config))
        policy = policy.to(self._state.device) if policy.device.type == "cpu" else policy
        return TransformersEngine(policy, self.tokenizer, a.generation_batch_size)

    def revision_of(self, model: str) -> str | None:
        """Revision of a model on the Hub: that of the policy is a setting."""
        return self.model_config.model_revision if model == self.model else None

    def _vllm_arguments(self, model: str) -> dict[str, Any]:
        """How vLLM loads a model. TRL's float32 is for weights that are trained: vLLM takes those of the checkpoint."""
        given = {"dtype": self.model_config.dtype, "revision": self.revision_of(model)}
        given = {name: value for name, value in given.items() if value not in (None, "float32", "main")}
        return given | ({"trust_remote_code": True} if self.arguments.trust_remote_code else {})

    def training_arguments(self, given: dict[str, Any], model: str) -> dict[str, Any]:
        """Arguments of both trainers for a model: what suits a recipe, and what is given."""
        on_gpu = self._state.device.type == "cuda"
        defaults = {
            "model_init_kwargs": {
                "revision": self.revision_of(model),
                "attn_implementation": self.model_config.attn_implementation,
                "dtype": self.model_config.dtype,
            },
            "trust_remote_code": self.arguments.trust_remote_code,
            "bf16": on_gpu and torch.cuda.is_bf16_supported(),
            "max_length": None,  # what was sampled fits; `max_new_tokens` is the limit
            "dataloader_pin_memory": on_gpu,
            "use_cpu": self._state.device.type == "cpu",  # or several processes would be taken for one each
            "report_to": self.arguments.report_to,
            "save_strategy": "no",
            "seed": self.arguments.seed,
        }
        return defaults | given

    def evaluate(self, title: str, model: str, path: Path) -> dict[str, Any]:
        """
        Accuracy of a policy on the held-out problems.

        Args:
            title (`str`):
                What the policy is called on the console.
            model (`str`):
                Its name or path.
            path (`Path`):
                Where the results are kept.

        Returns:
            `dict`: fields of [`~dapo_trl.evaluation.Evaluation`].
        """
        sampling, reward_function = self.arguments.rollout_config(0).sampling, self.reward_function
        settings: dict[str, Any] = {
            "problems": rows_fingerprint(self.test_problems),
            "model": identify(model, self.revision_of(model)),
            "made": made_how(model),
            "engine": self._engine_of(model),
            "loading": {name: getattr(self.model_config, name) for name in ("dtype", "load_in_8bit", "load_in_4bit")},
            "sampling": dataclasses.asdict(sampling),
            "k": self.arguments.eval_k,
        }
        if self.arguments.verifier != "math":  # files of earlier versions know of no other
            settings["reward_function"] = name_of(reward_function)
        if self.arguments.eval_pass_k:
            settings["pass_k"] = self.arguments.eval_pass_k

        def compute() -> dict[str, Any]:
            engine, k = self.make_engine(model), self.arguments.eval_k
            evaluation = evaluate_policy(
                self.test_problems,
                engine,
                reward_function,
                sampling,
                k,
                EVALUATION_SEED,
                pass_k=self.arguments.eval_pass_k,
            )
            return dataclasses.asdict(evaluation)

        refuse_closed_folder(path.parent)
        print_title(f"Accuracy, {title}", path)
        if not self._state.is_main_process:  # one process samples
            wait_for(path.exists, lambda: str(path))
        results = run_once(path, settings, compute)
        free_memory()
        print_evaluation(results)
        return results
