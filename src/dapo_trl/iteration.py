"""
One pass of the method: from a generator to a better policy. The stages of a run, each in its place.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback
from trl import get_peft_config, get_quantization_config

from dapo_trl.anchors import anchor_states
from dapo_trl.cards import add_card_results
from dapo_trl.critic_gate import refuse_unfit
from dapo_trl.critic_rows import candidate_solutions
from dapo_trl.critics import mean_values, solution_metrics
from dapo_trl.dapo_config import DAPOConfig
from dapo_trl.dapo_trainer import DAPOTrainer
from dapo_trl.diagnosing import diagnose_once
from dapo_trl.diagnostics import TOLD_APART, sibling_ranking
from dapo_trl.earlier_outcomes import add_kernel_values, revalue
from dapo_trl.engines import Engine
from dapo_trl.files import run_once, temporary_file
from dapo_trl.interrupts import raise_if_interrupted
from dapo_trl.intervals import Estimate
from dapo_trl.model_identity import identify, weights_hash
from dapo_trl.modeling import free_memory
from dapo_trl.recipe_arguments import changed_fields
from dapo_trl.run_folder import (
    CRITIC_SEEDS,
    critic_folder,
    held_out_problems,
    last_checkpoint,
    made_how,
    model_path,
    policy_folder,
    scored_config,
)
from dapo_trl.shrinkage import fit_strength, with_mean_prior
from dapo_trl.stages import sample_stage, value_stage
from dapo_trl.step_critic_config import StepCriticConfig
from dapo_trl.step_critic_trainer import StepCriticTrainer
from dapo_trl.store import ShardStore, read_tables
from dapo_trl.summary import (
    critic_results,
    critic_table,
    draw_values,
    policy_results,
    print_critic,
    print_stage,
    print_strength,
    print_title,
    warn,
)
from dapo_trl.value_sources import advantages_from, with_values_of


if TYPE_CHECKING:
    from dapo_trl.recipe import Recipe


CURES = (
    "Use more or easier problems, a stronger model, more solutions per problem, or a larger `max_new_tokens` if many "
    "were truncated."
)
NO_SIGNAL = (
    "No problem carries signal: there is no state whose next steps could be compared. Nothing was trained. " + CURES
)
STAGES = ("sample", "values", "critic", "score", "advantages", "train")
_SCORING = {"eval_strategy": "no", "load_best_model_at_end": False}  # there are no rows to measure the critic with
_IDENTIFIED = ("model_name_or_path", "model_revision")  # fields that say which model, not how it is trained


class _RaiseIfInterrupted(TrainerCallback):
    """Ctrl-C ends a training at the next step, also if somebody swallowed the exception."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise_if_interrupted()


class Iteration:
    """
    One pass of the method.

    Args:
        recipe ([`~dapo_trl.recipe.Recipe`]):
            The run.
        number (`int`):
            Iteration, from 0.
        folder (`Path`):
            Its place.
        generator (`str`):
            Name or path of the policy that samples, and that is trained.
        critics (sequence of `str`, *optional*):
            The same of the models that the critics begin with, `num_critics` of them. `None` takes the generator.
        earlier (sequence of [`Iteration`], *optional*):
            The iterations before, all of whose stages are done.
        valued_by (`Path`, *optional*):
            Folder of an earlier iteration whose critics value the rows of this one, which has none of its own then.

    Attributes:
        values ([`~dapo_trl.store.ShardStore`] or `None`):
            Its own, once they are there.
        held_out (`set[str]`):
            Problems that its critics are measured on, once these are there.
        trained (`set[str]`):
            Problems that its critics were trained on.
    """

    def __init__(
        self,
        recipe: "Recipe",
        number: int,
        folder: Path,
        generator: str,
        critics: Sequence[str] | None,
        earlier: Sequence["Iteration"] = (),
        valued_by: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.arguments = recipe.arguments
        self.folder = folder
        self.generator = generator
        self.critics = critics or [generator] * self.arguments.num_critics
        self.config = self.arguments.rollout_config(number)
        self.earlier = earlier
        self.valued_by = valued_by
        self.values: ShardStore | None = None
        self.held_out: set[str] = set()
        self.trained: set[str] = set()
        self.results: dict[str, Any] = {"dropped": {}}
        self._is_main = PartialState().is_main_process

    def run(self, until: str) -> dict[str, Any]:
        """
        Run all stages that are not done yet.

        Args:
            until (`str`):
                Last stage to run.

        Returns:
            `dict`: results, see [`~dapo_trl.recipe.Recipe.run`].
        """
        stages = STAGES[: STAGES.index(until) + 1]
        sampled = self._sample()
        self._look_at_signal(sampled.manifest["counts"]["problems_with_signal"], stages)
        if "values" not in stages:
            return self.results
        values = self.values = self._value(sampled)
        states = {}
        if self.arguments.values != "monte_carlo" and "critic" in stages:
            self._refuse_other_critics()
            if self.valued_by is None:
                self._train_critics(values)
            if "score" in stages:
                states["critic"] = self._score(values)
        if self.arguments.values == "shrinkage" and "advantages" in stages:
            states = {"shrinkage": self._shrink(states["critic"])}
        if self.arguments.values in ("monte_carlo", "both") and "advantages" in stages:
            states["monte_carlo"] = advantages_from("monte_carlo", self._with_earlier_outcomes(values.table("states")))
            self._write(states["monte_carlo"], "states_monte_carlo")
        if "train" in stages:
            for source, rows in states.items():
                self._train_policy(source, rows, values)
        return self.results

    # ---- Stages ----

    def _with_earlier_outcomes(self, states: Dataset) -> Dataset:
        """Outcomes of the iterations before count too, if that is asked for."""
        if not self.earlier or self.arguments.kernel_bandwidth is None:
            return states
        stores = [each.values for each in self.earlier if each.values is not None]
        tables = [[store.table("states"), store.table("solutions")] for store in stores]
        return add_kernel_values(states, tables, self.arguments.kernel_bandwidth)

    def _sample(self) -> ShardStore:
        print_title("Solutions")
        a = self.arguments
        problems, folder = self.recipe.problems["train"], self.folder / "sampled"
        judge = self.recipe.reward_function
        signal = a.num_problems_with_signal
        sampled = sample_stage(problems, self._engine, judge, self.config, folder, a.shard_size, signal)
        print_stage(sampled.manifest, sampled.was_complete)
        self.recipe.publisher.stage(sampled)
        self.results["dropped"]["sampled"] = sampled.manifest["counts"]
        return sampled

    def _look_at_signal(self, number: int, stages: tuple[str, ...]) -> None:
        """Whether enough problems have right and wrong solutions, before their completions are drawn."""
        if number == 0 and self._is_main:
            warn("No problem has right and wrong solutions: there is nothing to learn from them. " + CURES)
        used = min(number, self.arguments.num_problems_with_signal or number)  # the last shard may have more
        trains_critics = "critic" in stages and self.arguments.values != "monte_carlo" and self.valued_by is None
        if used == 1 and trains_critics:
            one, cure = "Only one problem has right and wrong solutions", CURES
            if number > 1:
                one, cure = "`num_problems_with_signal` is 1", "Raise it."
            raise ValueError(
                f"{one}. A critic needs two at least: one to train on, and one to be measured on. {cure} Or set "
                "`values: monte_carlo`, which needs no critic."
            )

    def _value(self, sampled: ShardStore) -> ShardStore:
        print_title("Completions and values")
        values = value_stage(sampled, self._engine, self.recipe.reward_function, self.config, self.folder / "values")
        print_stage(values.manifest, values.was_complete)
        self.recipe.publisher.stage(values)
        self.results["dropped"]["values"] = values.manifest["counts"]
        del self._engine
        free_memory()
        if not values.manifest["rows"]["states"]:
            raise ValueError(NO_SIGNAL)
        return values

    @property
    def _critic_folders(self) -> list[Path]:
        """Of the critics that value the rows."""
        return [critic_folder(self.valued_by or self.folder, number) for number in range(len(self.critics))]

    def _choose_held_out(self, problems: Sequence[str]) -> set[str]:
        """Problems to measure critics on: none that the critics before, which these begin with, were trained on."""
        before = set().union(*(each.held_out for each in self.earlier))
        trained = set().union(*(each.trained for each in self.earlier))
        if self.valued_by is None:
            held_out = held_out_problems(problems, before - trained, trained)
        else:
            held_out = set(problems) - trained or set(problems[:1])
        if held_out & trained and self._is_main:
            warn(
                "Critics before were trained on all problems that have right and wrong solutions now. What the critic "
                "knows is measured on one of them, and looks better than it is. " + CURES
            )
        return held_out

    @property
    def _scored(self) -> Path:
        return self.folder / "data" / "scored.json"

    @cached_property
    def _engine(self) -> Engine:
        return self.recipe.make_engine(self.generator)

    def _write(self, rows: Dataset, name: str) -> Path:
        path = self.folder / "data" / f"{name}.parquet"
        if self._is_main:
            path.parent.mkdir(exist_ok=True)
            with temporary_file(path) as temporary:
                rows.to_parquet(temporary)
        return path

    def _train_critics(self, values: ShardStore) -> None:
        if self.arguments.critic.get("load_best_model_at_end") and self._is_main:
            warn(
                "`critic.load_best_model_at_end` chooses by the problems that the critic is then measured on: what is "
                "measured looks a little better than it is."
            )
        problems = list(dict.fromkeys(values.table("solutions")["problem_id"]))
        chosen = self._choose_held_out(problems)
        trained = [self._train_critic(number, values, chosen) for number in range(len(self.critics))]
        # critics of earlier versions noted nothing: they were trained on all but every tenth
        self.held_out = set(trained[0].get("held_out", held_out_problems(problems)))
        self.trained = set(problems) - self.held_out
        metrics = [results["metrics"] for results in trained]
        self.results["critic"] = metrics[0] if len(metrics) == 1 else {"critics": metrics}
        self.results["dropped"]["critic"] = trained[0]["dropped"]  # all have the same rows

    def _refuse_other_critics(self) -> None:
        """Before any critic is trained: rows that are scored say by how many, and of which iteration."""
        known = scored_config(self._scored.parent)
        if known is None:
            return
        wanted = None if self.valued_by is None else self.arguments.later_critics
        number, kind = len(known.get("critics", [None])), known.get("later_critics")
        if (number, kind) != (len(self.critics), wanted):
            before, now = (
                f"`num_critics: {n}`" + (f", `later_critics: {k}`" if k else "")
                for n, k in ((number, kind), (len(self.critics), wanted))
            )
            raise ValueError(
                f"The rows of {self._scored.parent} have the values of {before}, which is now {now}. Choose another "
                f"`output_dir`, or delete {self._scored.parent} and the policies that were trained on these rows; "
                "critics that are trained are not trained again."
            )

    def _train_critic(self, number: int, values: ShardStore, held_out: set[str]) -> dict[str, Any]:
        folder, critic = critic_folder(self.folder, number), self.critics[number]
        title = "Critic" if len(self.critics) == 1 else f"Critic {number + 1} of {len(self.critics)}"
        print_title(title, folder / "stage.json")
        solutions = values.table("solutions")

        def rows_to_train_on() -> Dataset:
            seen = solutions.filter(lambda row: row["problem_id"] not in held_out)
            if not len(seen):
                raise ValueError(
                    f"All {len(held_out)} problems with right and wrong solutions were held out from the critics "
                    f"before: none is left to train this one on. {CURES} Or set `later_critics: shift`, which trains "
                    "none."
                )
            if self.arguments.critic_states == "solutions":
                return seen
            states = values.table("states").filter(lambda row: row["problem_id"] not in held_out)
            return concatenate_datasets([seen, candidate_solutions(states, seen)])

        def make_trainer(args: dict[str, Any]) -> StepCriticTrainer:
            return StepCriticTrainer(
                critic,
                StepCriticConfig(**args),
                train_dataset=rows_to_train_on(),
                eval_dataset=solutions.filter(lambda row: row["problem_id"] in held_out),
                **self._trainer_arguments(),
            )

        given = self.arguments.critic
        if number:
            given = given | {"seed": given.get("seed", self.arguments.seed) + CRITIC_SEEDS * number}
        settings = self._settings(given, critic, values.manifest["fingerprint"])
        if self.arguments.critic_states != "solutions":  # as of runs before there was a choice
            settings["states"] = self.arguments.critic_states
        return self._train(make_trainer, given, critic, folder, settings, {"held_out": sorted(held_out)})

    def _score(self, values: ShardStore) -> Dataset:
        """Value all rows by the critics; measure their mean on the problems that they were not trained on."""
        critics = list(map(model_path, self._critic_folders))
        if self.valued_by is not None:
            self.held_out = self._choose_held_out(list(dict.fromkeys(values.table("solutions")["problem_id"])))

        def compute() -> dict[str, Any]:
            tables = [self._predict(critic, values) for critic in critics]
            scored = {name: mean_values([rows[name] for rows in tables]) for name in tables[0]}
            found: dict[str, Any] = {}
            if self.valued_by is not None:
                moved = revalue(**scored, with_ratio=self.arguments.later_critics == "batch")
                scored, found = {"solutions": moved.solutions, "states": moved.states}, {"shift": moved.shift}
            unseen = scored["states"].filter(lambda row: row["problem_id"] in self.held_out)
            scored["states"] = self._with_critic_advantages(scored["states"], unseen)
            for name, rows in scored.items():
                self._write(rows, f"{name}_critic")
            ranking, num_pairs = sibling_ranking(unseen["critic_values"], unseen["values"], min_difference=TOLD_APART)
            if self._is_main:
                draw_values(scored["solutions"], self.folder / "values.png")
            found |= {"eval_sibling_ranking": ranking, "eval_sibling_pairs": num_pairs}
            found |= {"num_held_out": len(self.held_out), "held_out": sorted(self.held_out)}
            if len(critics) > 1 or self.valued_by is not None:  # a single one was measured after its training
                unseen = scored["solutions"].filter(lambda row: row["problem_id"] in self.held_out)
                found |= {f"eval_{name}": number for name, number in solution_metrics(unseen).items()}
            return found

        made, weights = [made_how(critic) for critic in critics], [weights_hash(critic) for critic in critics]
        settings: dict[str, Any] = {"critics": made}
        if len(critics) == 1:
            settings = {"critic": made[0], "weights": weights[0]}
        settings |= {"values": values.manifest["fingerprint"]} | ({"weights": weights} if len(critics) > 1 else {})
        if self.valued_by is not None:
            settings["later_critics"] = self.arguments.later_critics
        results = run_once(self._scored, settings, compute, self._is_main)
        results.pop("held_out", None)  # which is for who reads the rows
        self.results["critic"] = (
            self.results.get("critic", {}) | results | {"diagnosis": diagnose_once(self._scored.parent, self._is_main)}
        )
        print_critic(self.results["critic"])
        free_memory()
        if self.arguments.values != "shrinkage" and not self.arguments.allow_unfit_critic:
            refuse_unfit(self.results["critic"]["diagnosis"], self.folder, is_shifted=self.valued_by is not None)
        for number, folder in enumerate(self._critic_folders if self.valued_by is None else ()):
            self._finish_card(number, folder)
            self.recipe.publisher.model(folder, is_one_of_several=len(self.critics) > 1)
        data = self._scored.parent
        cure = f"Delete {self._scored} to score the rows again"
        return read_tables({data / "states_critic.parquet": cure}, data / ".cache")

    def _predict(self, critic: str, values: ShardStore) -> dict[str, Dataset]:
        """All rows with the values of a critic."""
        arguments = self.recipe.training_arguments(self.arguments.critic, critic) | _SCORING
        config = StepCriticConfig(str(self._critic_folders[0]), **arguments)
        trainer = StepCriticTrainer(model=critic, args=config, processing_class=self.recipe.tokenizer)
        scored = {name: trainer.predict_values(values.table(name)) for name in ("solutions", "states")}
        del trainer
        free_memory()  # before the next critic is loaded
        return scored

    def _finish_card(self, number: int, folder: Path) -> None:
        """What was measured goes into the card of a critic: of several its own, and that of their mean."""
        if not self._is_main:
            return
        measured = self.results["critic"]
        if len(self.critics) == 1:
            own, table = measured, critic_table(measured)
        else:
            own = measured["critics"][number]
            table, mean = critic_table(own), critic_table(measured, f"mean value of {len(self.critics)} critics")
            table = {title: table.get(title, {}) | columns for title, columns in mean.items()}
        add_card_results(str(folder), table, critic_results(own, self.recipe.publisher.problems))

    def _with_critic_advantages(self, states: Dataset, unseen: Dataset) -> Dataset:
        """Advantages from the critic's values; with standard errors, if anything can be said of these."""
        try:
            strength = fit_strength(unseen)
        except ValueError as error:  # no state was seen twice, or outcomes are not right or wrong
            policy = self.arguments.policy
            if policy.get("reliability_weights") or policy.get("min_reliability"):
                raise ValueError(f"How far the critic's values can be relied on is not known. {error}") from error
            return advantages_from("critic", states)
        return advantages_from("critic", states, strength)

    def _shrink(self, scored: Dataset) -> Dataset:
        """Monte Carlo values shrunk towards the critic's, as far as problems that it was not trained on trust it."""
        unseen = scored.filter(lambda row: row["problem_id"] in self.held_out)
        prior, unseen_prior = scored, unseen
        if not self._uses_critic:
            prior, unseen_prior = (with_mean_prior(rows, unseen) for rows in (scored, unseen))
        strength = fit_strength(unseen_prior)
        self.results["critic"]["prior_strength"] = strength
        print_strength(strength, self._uses_critic)
        rows = advantages_from("shrinkage", prior, strength)
        rows = rows.remove_columns("critic_values").add_column("critic_values", scored["critic_values"])
        self._write(rows, "states_shrinkage")
        return rows

    @property
    def _uses_critic(self) -> bool:
        """Whether values are shrunk towards the critic: not if it is unfit, unless that is allowed."""
        return self.arguments.allow_unfit_critic or self.results["critic"]["diagnosis"]["is_fit"]

    def _train_policy(self, source: str, rows: Dataset, values: ShardStore) -> None:
        title = f"{source.replace('_', ' ')} values"
        folder = self.folder / policy_folder(source)
        print_title(f"Policy, {title}", folder / "stage.json")

        def make_trainer(args: dict[str, Any]) -> DAPOTrainer:
            config, used = DAPOConfig(**args), rows
            if config.loss_type == "listwise":
                used = with_values_of(source, rows)
            if self.arguments.anchor_states:
                used = concatenate_datasets([used, anchor_states(values.table("solutions"), used)])
            return DAPOTrainer(self.generator, args=config, train_dataset=used, **self._trainer_arguments())

        settings = self._settings(self.arguments.policy, self.generator, values.manifest["fingerprint"])
        if self.arguments.anchor_states:  # as of runs before there was a choice
            settings["anchor_states"] = True
        if source != "monte_carlo":
            settings |= {"scored": scored_config(self._scored.parent)}
        if self.earlier and self.arguments.kernel_bandwidth is not None:
            settings |= {
                "kernel_bandwidth": self.arguments.kernel_bandwidth,
                "earlier": [each.values.manifest["fingerprint"] for each in self.earlier if each.values is not None],
            }
        if source == "shrinkage" and not self._uses_critic:
            settings |= {"prior": "mean outcome"}
        results = self._train(make_trainer, self.arguments.policy, self.generator, folder, settings)
        self.results["dropped"][f"policy_{source}"] = results["dropped"]
        after = self.recipe.evaluate(title, model_path(folder), folder / "accuracy.json")
        self.results[f"policy_{source}"] = after
        if self._is_main:
            add_card_results(
                str(folder),
                results_table(self.recipe.results["before"], after),
                policy_results(after, self.recipe.publisher.problems, self.arguments.dataset_test_split),
            )
        self.recipe.publisher.model(folder)

    # ---- Training ----

    def _train(
        self,
        make_trainer: Callable[[dict[str, Any]], Any],
        given: dict[str, Any],
        model: str,
        folder: Path,
        settings: dict[str, Any],
        noted: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """
        Train a model in its folder, unless that is done; from its last checkpoint, if there is one. What is noted
        stands among the results.
        """

        def compute() -> dict[str, Any]:
            trainer = make_trainer({"output_dir": str(folder), **self.recipe.training_arguments(given, model)})
            trainer.train(resume_from_checkpoint=last_checkpoint(folder, settings))
            metrics = {} if trainer.eval_dataset is None else trainer.evaluate()
            self._save(trainer)
            return {"metrics": metrics, "dropped": trainer.preprocessing_report} | (noted or {})

        results = run_once(folder / "stage.json", settings, compute, self._is_main)
        free_memory()
        return results

    def _trainer_arguments(self) -> dict[str, Any]:
        """What both trainers get."""
        return {
            "processing_class": self.recipe.tokenizer,
            "quantization_config": get_quantization_config(self.recipe.model_config),
            "peft_config": get_peft_config(self.recipe.model_config),
            "callbacks": [_RaiseIfInterrupted()],
        }

    def _settings(self, given: dict[str, Any], model: str, rows: str) -> dict[str, Any]:
        changed = changed_fields(self.recipe.model_config)
        return {
            "seed": self.arguments.seed,
            "model_config": {name: value for name, value in changed.items() if name not in _IDENTIFIED},
            "arguments": given,
            "model": identify(model, self.recipe.revision_of(model)),
            "rows": rows,
        }

    def _save(self, trainer: Any) -> None:
        """The model and its card; of an adapter also the model that it makes, for the stages that follow."""
        folder = Path(trainer.args.output_dir)
        trainer.save_model()
        trainer.save_state()  # with what was logged, of which reports are made
        publisher = self.recipe.publisher
        name = publisher.model_name(folder)
        trainer.hub_model_id = name if self.arguments.push_to_hub else None
        trainer.create_model_card(
            name.rpartition("/")[2],
            [publisher.dataset_name(self.folder / "values"), *([publisher.problems] if publisher.problems else [])],
            critic_name=list(map(publisher.model_name, self._critic_folders)) if folder.name == "policy" else None,
            recipe=publisher.settings(),
        )
        if self._is_main and is_peft_model(trainer.model):
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(folder / "merged")
            self.recipe.tokenizer.save_pretrained(folder / "merged")


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
