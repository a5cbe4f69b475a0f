"""
The whole method as one resumable run:

    problems -> solutions -> step values -> critic -> advantages -> policy -> accuracy

Each stage has a place in the run's folder, is skipped when it is done there, and goes on where it was when it was
killed. With several iterations each policy is the next one's generator and reference.
"""

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict
from huggingface_hub import whoami
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from dapo_trl.advantages import add_advantages
from dapo_trl.cards import add_card_results, push_model_to_hub
from dapo_trl.dapo_config import DAPOConfig
from dapo_trl.dapo_trainer import DAPOTrainer
from dapo_trl.dataset_cards import hub_repo_id, push_stage_to_hub, write_dataset_card
from dapo_trl.diagnostics import TOLD_APART, sibling_ranking
from dapo_trl.engines import Engine
from dapo_trl.engines.transformers import TransformersEngine
from dapo_trl.evaluation import Estimate, evaluate_policy
from dapo_trl.files import only_one, run_once, temporary_file, text_fingerprint, wait_for, write_atomically
from dapo_trl.interrupts import raise_if_interrupted
from dapo_trl.loading import load_policy
from dapo_trl.problems import load_problems, refuse_long_prompts
from dapo_trl.recipe_arguments import RecipeArguments, refuse_missing_path
from dapo_trl.run_folder import (
    last_checkpoint,
    made_how,
    model_path,
    policy_folder,
    publish_once,
    refuse_closed_folder,
)
from dapo_trl.stages import process_state, rows_fingerprint, sample_stage, value_stage
from dapo_trl.step_critic_config import StepCriticConfig
from dapo_trl.step_critic_trainer import StepCriticTrainer
from dapo_trl.store import ShardStore, read_tables
from dapo_trl.summary import (
    console,
    critic_results,
    critic_table,
    draw_values,
    policy_results,
    print_critic,
    print_evaluation,
    print_results,
    print_stage,
    print_title,
)
from dapo_trl.verifiers.math import math_reward


NO_SIGNAL = (
    "No problem carries signal: there is no state whose next steps could be compared. Nothing was trained. Use easier "
    "problems, a stronger model, more solutions per problem, or a larger `max_new_tokens` if many were truncated."
)
STAGES = ("sample", "values", "critic", "score", "advantages", "train")
EVALUATION_SEED = 1234  # the same samples for every policy of every run


class Recipe:
    """
    A run of the whole method in a folder.

    Args:
        arguments ([`RecipeArguments`]):
            What to do.
        model_config ([`~trl.ModelConfig`]):
            The policy before training, and how models are loaded.
    """

    def __init__(self, arguments: RecipeArguments, model_config: ModelConfig) -> None:
        if not model_config.model_name_or_path:
            raise ValueError("`model_name_or_path` is missing: name the model that shall be trained.")
        if not arguments.dataset_name:
            raise ValueError("`dataset_name` is missing: name the problems that shall be trained on.")
        self.arguments = arguments
        self.model_config = model_config
        self.model: str = model_config.model_name_or_path
        self.folder = Path(arguments.output_dir)
        self.results: dict[str, Any] = {}
        self.namespace = ""  # on the Hub, of who is logged in
        self._state = process_state()
        for name in ("model_name_or_path", "critic_model_name_or_path", "dataset_name"):
            refuse_missing_path(name, getattr(model_config if name.startswith("model") else arguments, name))
        self._try_training_arguments()

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
            ValueError: if an argument or a row is bad, the folder holds results of other settings, another command
                works in it, or no problem carries signal.
        """
        if self.arguments.push_to_hub and self._state.is_main_process:
            self.namespace = whoami()["name"]  # nobody shall find out after hours that they are not logged in
        sizes = f"{len(self.problems['train']):,} problems to train on, {len(self.problems['test']):,} held out"
        num_processes = self._state.num_processes
        print_title(sizes if num_processes == 1 else f"{sizes}; {num_processes} processes")
        refuse_closed_folder(self.folder)
        with only_one(self.folder) if self._state.is_main_process else nullcontext():
            return self._run(until)

    def _run(self, until: str) -> dict[str, Any]:
        generator = self.model
        if until == "train":
            self.results["before"] = self.evaluate("before training", generator, self.folder / "before.json")
        critic: str | None = self.arguments.critic_model_name_or_path
        for iteration in range(self.arguments.iterations):
            several = self.arguments.iterations > 1
            folder = self.folder / f"iteration-{iteration + 1}" if several else self.folder
            results = _Iteration(self, iteration, folder, generator, critic).run(until)
            if until != "train":
                return results
            self.results |= {"iterations": [*self.results.get("iterations", []), results]} if several else results
            generator = model_path(folder / policy_folder(self.arguments.values))
            critic = model_path(folder / "critic") if self.arguments.values != "monte_carlo" else None
        self.results["arguments"] = dataclasses.asdict(self.arguments)
        self.results["stages"] = stage_times(self.folder)
        print_results(self.results)
        if self._state.is_main_process:
            write_atomically(self.folder / "results.json", json.dumps(self.results, indent=2))
        return self.results

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        try:
            return AutoTokenizer.from_pretrained(self.model, trust_remote_code=self.arguments.trust_remote_code)
        except OSError as error:
            raise OSError(f"`model_name_or_path` is {self.model!r}, which cannot be loaded: {error}") from error

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
            a.prompt_template,
            a.seed,
        )
        if a.engine != "openai":  # servers have limits of their own
            config = AutoConfig.from_pretrained(
                self.model, revision=self.model_config.model_revision, trust_remote_code=a.trust_remote_code
            )
            context = getattr(config.get_text_config(), "max_position_embeddings", None)
            for rows in problems.values():
                refuse_long_prompts(rows, self.tokenizer, context or sys.maxsize)
        return problems

    def make_engine(self, model: str) -> Engine:
        """Sampling back end of a policy, given by name or path."""
        a = self.arguments
        if a.engine == "openai" and model == self.model:  # what the servers serve
            from dapo_trl.engines.openai import OpenAIEngine

            num_calls = 2 if a.max_concurrency > 1 else 1
            requests = a.max_concurrency // num_calls
            settings: dict[str, Any] = {"model": model, "max_concurrency": requests, "num_calls": num_calls}
            settings |= {name: value for name, value in a.server.items() if value is not None}
            return OpenAIEngine(a.server_urls, tokenizer=self.tokenizer, **settings)
        if a.engine == "vllm":
            from dapo_trl.engines.vllm import VLLMEngine

            return VLLMEngine(model, self.tokenizer)
        config = DAPOConfig(self.arguments.output_dir, **self.training_arguments({}))
        policy: Any = load_policy(model, config, get_quantization_config(self.model_config))
        policy = policy.to(self._state.device) if policy.device.type == "cpu" else policy
        return TransformersEngine(policy, self.tokenizer, a.generation_batch_size)

    def hub_id(self, folder: Path, prefix: str | None) -> str:
        """Name on the Hub of what is in a folder of the run; without `push_to_hub` a name that is not there."""
        name = hub_repo_id(prefix, self.folder, folder)
        return f"{self.namespace}/{name}" if self.namespace and "/" not in name else name

    def published_settings(self) -> dict[str, Any]:
        """What was set, for a card: without what belongs to this machine."""
        given = changed_fields(self.arguments) | changed_fields(self.model_config)
        private = {"output_dir", "server_urls", "estimate", "report_to", "max_concurrency"}
        kept = {name: value for name, value in given.items() if name not in private and "hub" not in name}
        return {name: _without_path(value) for name, value in kept.items()}

    def name_of(self, model: str) -> str:
        """A model as settings know it: by its place in the run's folder, which may be moved, or as it was given."""
        return str(Path(model).relative_to(self.folder)) if Path(model).is_relative_to(self.folder) else model

    def training_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of both trainers: what suits a recipe, and what is given."""
        on_gpu = self._state.device.type == "cuda"
        defaults = {
            "model_init_kwargs": {
                "revision": self.model_config.model_revision,
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

    def _try_training_arguments(self) -> None:
        """Refuse what a trainer would refuse, before hours of sampling."""
        a = self.arguments
        for section, kind in (("critic", StepCriticConfig), ("policy", DAPOConfig)):
            try:
                kind(str(self.folder / section), **self.training_arguments(getattr(a, section)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{section}`: {error}") from error

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
        sampling = self.arguments.rollout_config(0).sampling
        settings = {
            "problems": rows_fingerprint(self.problems["test"]),
            "model": self.name_of(model),
            "made": made_how(model),
            "sampling": dataclasses.asdict(sampling),
            "k": self.arguments.eval_k,
        }

        def compute() -> dict[str, Any]:
            engine = self.make_engine(model)
            evaluation = evaluate_policy(
                self.problems["test"], engine, math_reward, sampling, self.arguments.eval_k, EVALUATION_SEED
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


class _RaiseIfInterrupted(TrainerCallback):
    """Ctrl-C ends a training at the next step, also if somebody swallowed the exception."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise_if_interrupted()


class _Iteration:
    """One pass of the method: from a generator to a better policy."""

    def __init__(self, recipe: Recipe, number: int, folder: Path, generator: str, critic: str | None) -> None:
        self.recipe = recipe
        self.arguments = recipe.arguments
        self.folder = folder
        self.generator = generator
        self.critic = critic or generator
        self.config = self.arguments.rollout_config(number)
        self.results: dict[str, Any] = {"dropped": {}}
        self._is_main = PartialState().is_main_process

    def run(self, until: str) -> dict[str, Any]:
        stages = STAGES[: STAGES.index(until) + 1]
        sampled = self._sample()
        if "values" not in stages:
            return self.results
        values = self._value(sampled)
        states = {}
        if self.arguments.values in ("critic", "both") and "critic" in stages:
            self._train_critic(values)
            if "score" in stages:
                states["critic"] = self._score(values)
        if self.arguments.values in ("monte_carlo", "both") and "advantages" in stages:
            states["monte_carlo"] = add_advantages(values.table("states"), "values")
            self._write(states["monte_carlo"], "states_monte_carlo")
        if "train" in stages:
            for source, rows in states.items():
                self._train_policy(source, rows, values.manifest["fingerprint"])
        return self.results

    # ---- Stages ----

    def _sample(self) -> ShardStore:
        print_title("Solutions")
        a = self.arguments
        problems, folder = self.recipe.problems["train"], self.folder / "sampled"
        signal = a.num_problems_with_signal
        sampled = sample_stage(problems, self._engine, math_reward, self.config, folder, a.shard_size, signal)
        print_stage(sampled.manifest, sampled.was_complete)
        self._publish(sampled)
        self.results["dropped"]["sampled"] = sampled.manifest["counts"]
        return sampled

    def _value(self, sampled: ShardStore) -> ShardStore:
        print_title("Completions and values")
        values = value_stage(sampled, self._engine, math_reward, self.config, self.folder / "values")
        print_stage(values.manifest, values.was_complete)
        self._publish(values)
        self.results["dropped"]["values"] = values.manifest["counts"]
        del self._engine
        free_memory()
        if not values.manifest["rows"]["states"]:
            raise ValueError(NO_SIGNAL)
        return values

    @cached_property
    def _engine(self) -> Engine:
        return self.recipe.make_engine(self.generator)

    @property
    def _problems_on_hub(self) -> str | None:
        """Name of the problems for a card, which links to the Hub."""
        name = self.arguments.dataset_name or ""
        return None if Path(name.partition(":")[0]).exists() else name

    def _publish(self, stage: ShardStore) -> None:
        """The card of a stage's data set; and the data set on the Hub, if that is wanted."""
        a = self.arguments
        repo_id = self.recipe.hub_id(stage.folder, a.hub_dataset_id)
        if self._is_main:
            write_dataset_card(stage.folder, self._problems_on_hub, repo_id if a.push_to_hub else None)
        if a.push_to_hub:
            fingerprint = stage.manifest["fingerprint"]
            self._push(stage.folder, repo_id, fingerprint, partial(push_stage_to_hub, private=a.hub_private_repo))

    def _publish_model(self, folder: Path) -> None:
        """A model and its finished card on the Hub, if that is wanted."""
        a = self.arguments
        if a.push_to_hub:
            push = partial(push_model_to_hub, private=a.hub_private_repo)
            self._push(folder, self._model_name(folder), text_fingerprint((folder / "stage.json").read_text()), push)

    def _push(self, folder: Path, repo_id: str, fingerprint: str, push: Callable[[Path, str], str]) -> None:
        address = publish_once(folder, repo_id, fingerprint, push, self._is_main)
        if self._is_main:
            console.print(f"Published: {address}")

    def _model_name(self, folder: Path) -> str:
        return self.recipe.hub_id(folder, self.arguments.hub_model_id or self.arguments.hub_dataset_id)

    def _write(self, rows: Dataset, name: str) -> Path:
        path = self.folder / "data" / f"{name}.parquet"
        if self._is_main:
            path.parent.mkdir(exist_ok=True)
            with temporary_file(path) as temporary:
                rows.to_parquet(temporary)
        return path

    def _train_critic(self, values: ShardStore) -> None:
        print_title("Critic", self.folder / "critic" / "stage.json")
        solutions = values.table("solutions")
        held_out = held_out_problems(solutions)
        folder = self.folder / "critic"
        given = self.arguments.critic

        def compute() -> dict[str, Any]:
            config = StepCriticConfig(str(folder), **self.recipe.training_arguments(given))
            trainer = StepCriticTrainer(
                model=self.critic,
                args=config,
                train_dataset=solutions.filter(lambda row: row["problem_id"] not in held_out),
                eval_dataset=solutions.filter(lambda row: row["problem_id"] in held_out),
                processing_class=self.recipe.tokenizer,
                quantization_config=get_quantization_config(self.recipe.model_config),
                peft_config=get_peft_config(self.recipe.model_config),
                callbacks=[_RaiseIfInterrupted()],
            )
            trainer.train(resume_from_checkpoint=last_checkpoint(folder, settings))
            metrics = trainer.evaluate()
            self._save(trainer)
            return {"metrics": metrics, "dropped": trainer.preprocessing_report}

        settings = self._settings(given, self.critic, values.manifest["fingerprint"])
        results = run_once(folder / "stage.json", settings, compute, self._is_main)
        self.results["critic"] = results["metrics"]
        self.results["dropped"]["critic"] = results["dropped"]
        free_memory()

    def _score(self, values: ShardStore) -> Dataset:
        """Value all rows by the critic; measure it on the problems that it was not trained on."""
        folder = self.folder / "critic"

        def compute() -> dict[str, Any]:
            config = StepCriticConfig(str(folder), **self.recipe.training_arguments(self.arguments.critic))
            trainer = StepCriticTrainer(model=model_path(folder), args=config, processing_class=self.recipe.tokenizer)
            scored = {name: trainer.predict_values(values.table(name)) for name in ("solutions", "states")}
            scored["states"] = add_advantages(scored["states"], "critic_values")
            for name, rows in scored.items():
                self._write(rows, f"{name}_critic")
            held_out = held_out_problems(scored["solutions"])
            unseen = scored["states"].filter(lambda row: row["problem_id"] in held_out)
            ranking, num_pairs = sibling_ranking(unseen["critic_values"], unseen["values"], min_difference=TOLD_APART)
            if self._is_main:
                draw_values(scored["solutions"], self.folder / "values.png")
            return {"eval_sibling_ranking": ranking, "eval_sibling_pairs": num_pairs, "num_held_out": len(held_out)}

        settings = {
            "critic": made_how(str(folder)),
            "values": values.manifest["fingerprint"],
        }
        results = run_once(self.folder / "data" / "scored.json", settings, compute, self._is_main)
        self.results["critic"] |= results
        print_critic(self.results["critic"])
        free_memory()
        if self._is_main:
            metrics = self.results["critic"]
            add_card_results(str(folder), critic_table(metrics), critic_results(metrics, self._problems_on_hub))
        self._publish_model(folder)
        data = self.folder / "data"
        cure = f"Delete {data / 'scored.json'} to score the rows again"
        return read_tables({data / "states_critic.parquet": cure}, data / ".cache")

    def _train_policy(self, source: str, rows: Dataset, values: str) -> None:
        title = f"{source.replace('_', ' ')} values"
        folder = self.folder / policy_folder(source)
        print_title(f"Policy, {title}", folder / "stage.json")

        def compute() -> dict[str, Any]:
            config = DAPOConfig(str(folder), **self.recipe.training_arguments(self.arguments.policy))
            trainer = DAPOTrainer(
                model=self.generator,
                args=config,
                train_dataset=rows,
                processing_class=self.recipe.tokenizer,
                quantization_config=get_quantization_config(self.recipe.model_config),
                peft_config=get_peft_config(self.recipe.model_config),
                callbacks=[_RaiseIfInterrupted()],
            )
            trainer.train(resume_from_checkpoint=last_checkpoint(folder, settings))
            self._save(trainer)
            return {"dropped": trainer.preprocessing_report}

        settings = self._settings(self.arguments.policy, self.generator, values)
        if source == "critic":
            settings |= {"scored": json.loads((self.folder / "data" / "scored.json").read_text())["config"]}
        results = run_once(folder / "stage.json", settings, compute, self._is_main)
        self.results["dropped"][f"policy_{source}"] = results["dropped"]
        free_memory()
        after = self.recipe.evaluate(title, model_path(folder), folder / "accuracy.json")
        self.results[f"policy_{source}"] = after
        if self._is_main:
            add_card_results(
                str(folder),
                results_table(self.recipe.results["before"], after),
                policy_results(after, self._problems_on_hub, self.arguments.dataset_test_split),
            )
        self._publish_model(folder)

    def _settings(self, given: dict[str, Any], model: str, rows: str) -> dict[str, Any]:
        names = ("seed", "critic_model_name_or_path")
        shared = {name: getattr(self.arguments, name) for name in names}
        shared["model_config"] = changed_fields(self.recipe.model_config)
        return shared | {"arguments": given, "model": self.recipe.name_of(model), "rows": rows}

    def _save(self, trainer: Any) -> None:
        """The model and its card; of an adapter also the model that it makes, for the stages that follow."""
        folder = Path(trainer.args.output_dir)
        trainer.save_model()
        rows = self.recipe.hub_id(self.folder / "values", self.arguments.hub_dataset_id)
        name = self._model_name(folder)
        trainer.hub_model_id = name if self.arguments.push_to_hub else None
        trainer.create_model_card(
            name.rpartition("/")[2],
            [rows, *([self._problems_on_hub] if self._problems_on_hub else [])],
            critic_name=self._model_name(self.folder / "critic") if folder.name == "policy" else None,
            recipe=self.recipe.published_settings(),
        )
        if self._is_main and is_peft_model(trainer.model):
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(folder / "merged")
            self.recipe.tokenizer.save_pretrained(folder / "merged")


def held_out_problems(solutions: Dataset) -> set[str]:
    """
    Every tenth problem: the critic is measured on them and not trained on them.

    Args:
        solutions ([`~datasets.Dataset`]):
            Rows with `problem_id`.

    Returns:
        `set[str]`: their `problem_id`.
    """
    return set(list(dict.fromkeys(solutions["problem_id"]))[::10])


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
    given = dataclasses.asdict(config)
    return {name: value for name, value in given.items() if value != getattr(defaults, name)}


def results_table(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, str]]:
    """
    Accuracies for a card.

    Args:
        before (`dict`):
            Fields of [`~dapo_trl.evaluation.Evaluation`], of the policy before training.
        after (`dict`):
            The same of the trained policy.

    Returns:
        `dict`: row -> column -> text.
    """
    k = after["k"]
    names = {"greedy": "greedy", f"mean@{k}": "mean_at_k", f"pass@{k}": "pass_at_k"}
    return {
        f"{title}, {after['num_problems']:,} held-out problems": {
            "before": str(Estimate(**before[name])),
            "after": str(Estimate(**after[name])),
        }
        for title, name in names.items()
    }


def _without_path(value: Any) -> Any:
    """Of a local path, its name."""
    if isinstance(value, dict):
        return {name: _without_path(part) for name, part in value.items()}
    is_path = isinstance(value, str) and os.path.exists(value.partition(":")[0])
    return os.path.basename(os.path.normpath(value)) if is_path else value


def stage_times(folder: Path) -> dict[str, dict[str, float]]:
    """
    Time and tokens of the stages of a run, from what they left in its folder.

    Args:
        folder (`Path`):
            Folder of the run.

    Returns:
        `dict`: stage -> `seconds` of wall-clock time, and `tokens` generated. Of a sampling stage it is the time in
        which shards that are kept were under way, however many at a time; of a training that went on, since the last
        start.
    """
    patterns = ["before.json", "**/sampled/manifest.json", "**/values/manifest.json", "**/critic/stage.json"]
    patterns += ["**/data/scored.json", "**/policy*/stage.json", "**/policy*/accuracy.json"]
    found = {}
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        stage = json.loads(path.read_text())
        name = "/".join(path.relative_to(folder).with_suffix("").parts).removesuffix("/manifest").removesuffix("/stage")
        results = stage.get("results", {})
        tokens = stage["counts"].get("tokens_generated", 0) if "counts" in stage else results.get("tokens", 0)
        found[name] = {"seconds": stage.get("seconds", 0.0), "tokens": tokens}
    return found


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
