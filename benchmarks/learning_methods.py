"""
The methods that `learning.py` compares, each with what TRL ships: from data of equal cost to a trained policy.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from dapo_trl import DAPOConfig, DAPOTrainer, math_reward
from dapo_trl.anchors import anchor_states
from dapo_trl.preference_pairs import to_preference_pairs
from dapo_trl.run_folder import held_out_problems
from dapo_trl.shrinkage import fit_strength
from dapo_trl.targets import LOG_PARTITIONS
from dapo_trl.value_sources import SOURCES, advantages_from, with_values_of
from learning_jobs import Data, dapo_trl, make_engine, tokens_of_runs


BATCH, WARMUP = 64, 20  # sequences, pairs or states of an optimizer step; its first steps
MAX_PAIRS, MAX_SOLUTIONS = 8, 16  # of one problem, drawn at random
Row = dict[str, Any]


@dataclass
class Trained:
    """
    A trained policy.

    Attributes:
        engine ([`~dapo_trl.engines.Engine`]):
            It, ready to sample.
        tokens (`int`):
            Tokens that were generated for its training.
    """

    engine: Any
    tokens: int


def load(data: Data) -> tuple[Any, Any]:
    student = data.task.student
    return AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)


def arguments(data: Data, **given: Any) -> dict[str, Any]:
    """Arguments of all trainers."""
    return {
        "output_dir": str(data.folder / "trainer"),
        "per_device_train_batch_size": BATCH,
        "warmup_steps": WARMUP,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1000,
        "seed": data.seed,
    } | given


def train(kind: Any, config: Any, data: Data, rows: Dataset, tokens: int, **settings: Any) -> Trained:
    """Train the student on rows, with a trainer and its configuration."""
    model, tokenizer = load(data)
    args = config(**arguments(data, **settings))
    return finish(kind(model, args=args, train_dataset=rows, processing_class=tokenizer), tokens)


def finish(trainer: Any, tokens: int) -> Trained:
    trainer.train()
    return Trained(make_engine((trainer.model, trainer.processing_class)), tokens)


# ---- This method ----


# What the loss is a mean over: samples; the pairs of a state, and states; pairs (paper); pairs, where duplicates were
# removed before the advantages were computed.
WEIGHTS = {"samples": "counts", "states": "counts", "pairs": "uniform", "pairs without duplicates": "uniform"}


def states_by(source: str, data: Data, with_counts: bool = True) -> Dataset:
    """State rows with advantages from a source of values, and how far they can be relied on."""
    rows = data.states()
    if not with_counts:
        rows = rows.remove_columns("counts")
    strength = None
    if source != "monte_carlo":
        held_out = held_out_problems(data.problem_ids())
        strength = fit_strength(rows.filter(lambda row: row["problem_id"] in held_out))
    return advantages_from(source, rows, strength)


def weigh_alike(row: Row) -> Row:
    """Candidates of a state weigh the same, and together as much as those of any other."""
    return {"counts": [round(5040 / len(row["counts"]))] * len(row["counts"])}


def train_policy(source: str, data: Data, settings: dict[str, Any]) -> Trained:
    """One iteration: the policy of the recipe, on data that are there."""
    reduction = settings.pop("reduction", "samples")
    anchored = settings.pop("anchor_states", data.task.settings["anchor_states"])
    policy = data.task.settings["policy"] | {"duplicate_weights": WEIGHTS[reduction]} | settings
    rows = states_by(source, data, with_counts=reduction != "pairs without duplicates")
    if anchored:
        rows = concatenate_datasets([rows, anchor_states(data.kept_solutions(), rows)])
    if reduction == "states":
        rows = rows.map(weigh_alike)
    return train(DAPOTrainer, DAPOConfig, data, rows, data.tokens, **policy)


def train_as_in_the_paper(data: Data, settings: dict[str, Any]) -> Trained:
    """The mean over pairs, duplicates removed, and no states where there is nothing to compare."""
    return train_policy("critic", data, settings | {"reduction": "pairs", "anchor_states": False})


def train_twice(source: str, data: Data, settings: dict[str, Any]) -> Trained:
    """Two iterations on half the problems each; settings may be of the policy or of the run."""
    names = "-".join(f"{name}={value}" for name, value in sorted(settings.items()))
    folder = data.folder / f"two-{source}-{names}"
    half = str(data.task.settings["num_train_problems"] // 2)
    given = ["--values", source, "--iterations", "2", "--num_train_problems", half, "--num_test_problems", "8"]
    given += ["--allow_unfit_critic", "true"]  # as for one iteration
    for name, value in settings.items():
        given += [f"--{name}" if name in data.task.settings else f"--policy.{name}", str(value)]
    dapo_trl("run", data.task, data.seed, folder, *given)
    last = folder / "iteration-2"
    policy = last / ("policy" if source == "critic" else f"policy_{source}")
    return Trained(make_engine(policy), tokens_of_runs(folder, last))


# ---- What people do today ----


def by_problem(rows: list[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Right and wrong solutions of each problem."""
    groups: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for row in rows:
        if not row["truncated"]:
            groups[row["problem_id"]][0 if row["reward"] >= 0.5 else 1].append(row)
    yield from groups.values()


def tokens_of(rows: list[Row]) -> int:
    return sum(len(step) for row in rows for step in row["completions_ids"])


def ids_of(row: Row) -> list[int]:
    return [token for step in row["completions_ids"] for token in step]


def train_on_right_solutions(data: Data, settings: dict[str, Any]) -> Trained:
    """Rejection fine-tuning (RFT): SFT on the right solutions."""
    rows = data.solutions()
    chosen = Dataset.from_list(right_solutions(rows, data.seed))
    return train(SFTTrainer, SFTConfig, data, chosen, tokens_of(rows), **settings)


def right_solutions(rows: list[Row], seed: int) -> list[Row]:
    """Right solutions as prompts and completions."""
    rng = random.Random(seed)
    chosen = [row for right, _ in by_problem(rows) for row in rng.sample(right, min(len(right), MAX_SOLUTIONS))]
    return [{"prompt": row["prompt"], "completion": "".join(row["completions"])} for row in chosen]


class TokenizedDPOTrainer(DPOTrainer):
    """Takes rows that are tokenized. TRL's adds an end token to every text; a step in the middle does not have one."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train_on_solution_pairs(data: Data, settings: dict[str, Any]) -> Trained:
    """DPO on pairs of a right and a wrong solution."""
    rows = data.solutions()
    pairs = Dataset.from_list(solution_pairs(rows, data.seed))
    return train(TokenizedDPOTrainer, DPOConfig, data, pairs, tokens_of(rows), **settings)


def solution_pairs(rows: list[Row], seed: int) -> list[Row]:
    """Pairs of a right and a wrong solution of one problem."""
    rng, pairs = random.Random(seed), []
    for right, wrong in by_problem(rows):
        for _ in range(min(len(right) * len(wrong), MAX_PAIRS)):
            chosen, rejected = ids_of(rng.choice(right)), ids_of(rng.choice(wrong))
            pairs.append({"prompt_ids": right[0]["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


def train_listwise(data: Data, settings: dict[str, Any]) -> Trained:
    """The candidates of a state against each other, by the critic's values (DriveDPO, arXiv 2509.17940)."""
    policy = {name: value for name, value in data.task.settings["policy"].items() if name != "beta"}
    rows = with_values_of("critic", states_by("critic", data))
    return train(DAPOTrainer, DAPOConfig, data, rows, data.tokens, **policy | {"loss_type": "listwise"} | settings)


def train_on_negatives(negatives: str, data: Data, settings: dict[str, Any]) -> Trained:
    """DPO on the best next step by the critic, against the closest or the worst one that is worth less."""
    pairs = to_preference_pairs(data.states(), negatives, values="critic_values")
    return train(TokenizedDPOTrainer, DPOConfig, data, pairs, data.tokens, **settings)


def train_on_step_pairs(data: Data, settings: dict[str, Any]) -> Trained:
    """Step-DPO: the state is the prompt; the best of its next steps by Monte Carlo against the worst."""
    pairs = to_preference_pairs(states_by("monte_carlo", data), "worst")
    return train(TokenizedDPOTrainer, DPOConfig, data, pairs, data.tokens, **settings)


def train_on_labels(data: Data, settings: dict[str, Any]) -> Trained:
    """KTO: single solutions, right or wrong."""
    rows = data.solutions()
    labelled = Dataset.from_list(labelled_solutions(rows, data.seed))
    return train(KTOTrainer, KTOConfig, data, labelled, tokens_of(rows), **settings)


def labelled_solutions(rows: list[Row], seed: int) -> list[Row]:
    """
    Solutions of problems that have right and wrong ones, shuffled: `KTOTrainer` takes rows in the order that it is
    given, and estimates the KL divergence from each prompt with the solution of the row before.
    """
    rng = random.Random(seed)
    groups = [right + wrong for right, wrong in by_problem(rows) if right and wrong]
    chosen = [row for group in groups for row in rng.sample(group, min(len(group), MAX_SOLUTIONS))]
    rng.shuffle(chosen)
    return [
        {"prompt": row["prompt"], "completion": "".join(row["completions"]), "label": row["reward"] >= 0.5}
        for row in chosen
    ]


class StopAtBudget(TrainerCallback):
    """Counts generated tokens, and ends the training when they are spent."""

    def __init__(self, budget: int) -> None:
        self.budget, self.tokens = budget, 0

    def reward(self, completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return [reward or 0.0 for reward in math_reward(completions=completions, **kwargs)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = self.tokens >= self.budget
        return control


def train_online(data: Data, settings: dict[str, Any]) -> Trained:
    """GRPO with the token-mean loss and decoupled clipping of ByteDance's DAPO (2503.14476): online."""
    trainer, counter = online_trainer(data, settings, data.tokens)
    trained = finish(trainer, 0)
    return Trained(trained.engine, counter.tokens)


def online_trainer(data: Data, settings: dict[str, Any], budget: int) -> tuple[GRPOTrainer, StopAtBudget]:
    """A trainer that ends when so many tokens are generated, and what counts them."""
    task, counter = data.task, StopAtBudget(budget)
    batch = 4 * BATCH
    given = {
        "loss_type": "dapo",
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "mask_truncated_completions": True,
        "num_generations": 8,
        "per_device_train_batch_size": batch,
        "warmup_steps": 5,
        "max_completion_length": task.settings["max_new_tokens"],
        "max_steps": round(budget / data.tokens_per_solution / batch) * settings.get("num_iterations", 1),
    }
    shared = arguments(data)
    del shared["max_length"], shared["num_train_epochs"]
    model, tokenizer = load(data)
    trainer = GRPOTrainer(
        model,
        reward_funcs=counter.reward,
        args=GRPOConfig(**shared | given | settings),
        train_dataset=task.problems("train", task.settings["num_train_problems"], data.seed),
        processing_class=tokenizer,
        callbacks=[counter],
    )
    return trainer, counter


def train_after_warm_up(data: Data, settings: dict[str, Any]) -> Trained:
    """Half of the tokens for GRPO, the other half for one iteration of this method from there, on half the problems."""
    names = "-".join(f"{name}={value}" for name, value in sorted(settings.items()))
    folder = data.folder / f"warm-{names}"
    trainer, counter = online_trainer(data, {"learning_rate": settings.pop("grpo_learning_rate")}, data.tokens // 2)
    trainer.train()
    trainer.save_model(str(folder / "warm"))
    half = str(data.task.settings["num_train_problems"] // 2)
    given = ["--model_name_or_path", str(folder / "warm"), "--values", "critic", "--allow_unfit_critic", "true"]
    given += ["--num_train_problems", half, "--num_test_problems", "8"]
    given += [word for name, value in settings.items() for word in (f"--policy.{name}", str(value))]
    dapo_trl("run", data.task, data.seed, folder / "run", *given)
    return Trained(make_engine(folder / "run" / "policy"), counter.tokens + tokens_of_runs(folder / "run"))


def keep_student(data: Data, settings: dict[str, Any]) -> Trained:
    """No training."""
    return Trained(make_engine(data.task.student), 0)


METHODS = {
    "student": keep_student,
    "rft": train_on_right_solutions,
    "dpo": train_on_solution_pairs,
    "step_dpo": train_on_step_pairs,
    "kto": train_on_labels,
    "grpo": train_online,
    **{source: (lambda data, settings, source=source: train_policy(source, data, settings)) for source in SOURCES},
    "paper": train_as_in_the_paper,
    **{
        f"log_partition_{kind}": (
            lambda data, settings, kind=kind: train_policy("critic", data, settings | {"log_partition": kind})
        )
        for kind in LOG_PARTITIONS
    },
    "listwise": train_listwise,
    "hard_negatives": lambda data, settings: train_on_negatives("closest", data, settings),
    "worst_negatives": lambda data, settings: train_on_negatives("worst", data, settings),
    "warm_up": train_after_warm_up,
    "larger_critics": lambda data, settings: train_policy("critic", data, settings),  # the data have their values
    **{
        f"{source}_2": (lambda data, settings, source=source: train_twice(source, data, settings)) for source in SOURCES
    },
}
