"""
Reference log-probabilities as columns: computed once, saved, used by another trainer, refused where they do not fit.
"""

import copy
import logging
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from conftest import CHAT_TEMPLATE, make_policy, make_tokenizer, random_solution_rows, random_state_rows
from dapo_trl import DAPOTrainer
from dapo_trl.ref_logps import model_fingerprint, row_fingerprint
from dapo_trl.tokenization import tokenizer_fingerprint
from test_dapo_trainer import PREFERENCES, config, pairs_of, step_logps


TOKENIZER = make_tokenizer()
FINGERPRINT = re.compile("[0-9a-f]{16}")

pytestmark = pytest.mark.usefixtures("quick_fingerprints")


def make_trainer(tmp_path, rows, ref_model=None, policy=None, tokenizer=TOKENIZER, **kwargs) -> DAPOTrainer:
    arguments = {name: kwargs.pop(name) for name in ("eval_dataset", "peft_config") if name in kwargs}
    return DAPOTrainer(
        policy or make_policy(),
        ref_model,
        config(tmp_path, **({"per_device_train_batch_size": 4} | kwargs)),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        processing_class=tokenizer,
        **arguments,
    )


def refuse_to_score(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("the reference was scored")

    monkeypatch.setattr(DAPOTrainer, "_score_rows", refuse)


def flat(rows: list[dict]) -> list[dict]:
    """One row per candidate, the first candidates of all states first."""
    columns = ("candidates", "advantages", "counts")
    return [
        row | {name: [row[name][number]] for name in columns}
        for number in range(5)
        for row in rows
        if number < len(row["candidates"])
    ]


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def numbers(dataset) -> list[float]:
    return [logp for row in dataset["ref_logps"] for logp in row]


def slow_numbers(model, rows: list[dict]) -> list[float]:
    """The same from single sequences in float64."""
    model = model.double()
    with torch.no_grad():
        return [step_logps(model, context, step).item() for context, step, *_ in pairs_of(rows, TOKENIZER)]


# ---- Saved and used ----


@pytest.mark.parametrize("make_rows", [random_state_rows, random_solution_rows])
def test_saved_and_used_by_another_trainer(tmp_path, monkeypatch, make_rows):
    """The given rows come back with two columns; from parquet they train identically, with no reference at hand."""
    rows = Dataset.from_list(make_rows(6))
    first = make_trainer(tmp_path, rows, make_policy(seed=1), max_steps=2, learning_rate=1e-3)
    given = first.with_ref_logps()
    assert given.column_names == [*rows.column_names, "ref_logps", "ref_fingerprint"]
    assert given.remove_columns(["ref_logps", "ref_fingerprint"]).to_list() == rows.to_list()
    model = make_policy(seed=1).double()
    with torch.no_grad():
        expected = [
            step_logps(model, context, step).item() for context, step, *_ in pairs_of(rows.to_list(), TOKENIZER)
        ]
    assert numbers(given) == pytest.approx(expected, rel=1e-5)
    given.to_parquet(tmp_path / "rows.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    refuse_to_score(monkeypatch)
    second = make_trainer(tmp_path, loaded, make_policy(seed=1), max_steps=2, learning_rate=1e-3)
    assert second.train_dataset["ref_logps"] == first.train_dataset["ref_logps"]
    assert second.with_ref_logps().to_list() == given.to_list()
    first.train()
    second.train()
    assert not torch.equal(weights(first), torch.cat([p.flatten() for p in make_policy().parameters()]))
    torch.testing.assert_close(weights(second), weights(first), rtol=0, atol=0)


def test_fingerprints_say_what_the_numbers_belong_to(tmp_path):
    trainer = make_trainer(tmp_path, random_state_rows(2), make_policy(seed=1))
    for row, tokens in zip(trainer.with_ref_logps(), trainer.train_dataset, strict=True):
        assert row["ref_fingerprint"] == {
            "model": model_fingerprint(make_policy(seed=1)),
            "tokenizer": tokenizer_fingerprint(TOKENIZER),
            "data": row_fingerprint(tokens),
        }
        assert all(map(FINGERPRINT.fullmatch, row["ref_fingerprint"].values()))


def test_tree_and_padded_agree(tmp_path):
    """Flat rows of one state too: each number goes back to its own row."""
    rows = flat(random_state_rows(4))
    tree, padded = (make_trainer(tmp_path, rows, make_policy(seed=1), layout=name) for name in ("tree", "padded"))
    assert (tree.layout, padded.layout) == ("tree", "padded")
    assert numbers(tree.with_ref_logps()) == pytest.approx(numbers(padded.with_ref_logps()), rel=1e-5)


def test_merged_rows_map_back(tmp_path, monkeypatch):
    """Rows of one candidate each are trained on as one state, and get one number each back, which fits when used."""
    rows = flat(random_state_rows(4))
    trainer = make_trainer(tmp_path, rows)
    assert trainer.preprocessing_report["train"]["rows_merged"] == len(rows) - 4
    given = trainer.with_ref_logps()
    assert [len(row) for row in given["ref_logps"]] == [1] * len(rows)
    assert numbers(given) == pytest.approx(slow_numbers(make_policy(), rows), rel=1e-5)
    refuse_to_score(monkeypatch)
    again = make_trainer(tmp_path, given.select(range(len(given))[::-1]))
    assert sorted(numbers(again.train_dataset)) == sorted(numbers(given))


@pytest.mark.parametrize("kind", PREFERENCES)
def test_preference_rows(tmp_path, monkeypatch, kind):
    """Two numbers, chosen and rejected, whose sum the training rows have too."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rows = Dataset.from_list([PREFERENCES[kind]] * 2)
    trainer = make_trainer(tmp_path, rows, tokenizer=tokenizer)
    given = trainer.with_ref_logps()
    assert given["ref_logps"] == trainer.train_dataset["ref_logps"]
    assert [len(row) for row in given["ref_logps"]] == [2, 2]
    refuse_to_score(monkeypatch)
    again = make_trainer(tmp_path, given, tokenizer=tokenizer)
    assert again.train_dataset["ref_logps"] == given["ref_logps"]


def test_evaluation_sets(tmp_path, monkeypatch):
    """A single one is called "eval", several by their own names; and each is used again."""
    train, rows = random_state_rows(3), Dataset.from_list(random_state_rows(3, seed=5))
    single = make_trainer(tmp_path, train, make_policy(seed=1), eval_dataset=rows)
    parts = {"a": rows, "b": Dataset.from_list(random_solution_rows(2))}
    several = make_trainer(tmp_path, train, make_policy(seed=1), eval_dataset=parts)
    given = {name: several.with_ref_logps(name) for name in parts}
    assert single.with_ref_logps("eval").to_list() == given["a"].to_list()
    assert numbers(given["b"]) == numbers(several.eval_dataset["b"])
    refuse_to_score(monkeypatch)
    again = make_trainer(tmp_path, several.with_ref_logps(), make_policy(seed=1), eval_dataset=given)
    assert again.evaluate()["eval_a_loss"] == pytest.approx(several.evaluate()["eval_a_loss"], rel=1e-6)
    # rows with numbers can be evaluated although the reference is gone
    assert again.evaluate(given["b"])["eval_loss"] == pytest.approx(several.evaluate()["eval_b_loss"], rel=1e-6)


def test_rows_that_are_not_trained_on_have_no_numbers(tmp_path):
    """Null for a row without contrast; null in the place of a step that was cut off."""
    rows = [
        {"prompt": "a\n", "prefix": [], "candidates": ["b\n", "c\n"], "advantages": [0.01, 0.0]},
        {"prompt": "z\n", "prefix": [], "candidates": ["b\n", "c" * 99, "d\n"], "advantages": [0.5, 0.1, -0.5]},
    ]
    given = make_trainer(tmp_path, rows, min_advantage_gap=0.1, max_length=50).with_ref_logps()
    assert (given[0]["ref_logps"], given[0]["ref_fingerprint"]) == (None, None)
    assert [logp is None for logp in given[1]["ref_logps"]] == [False, True, False]
    again = make_trainer(tmp_path, given, min_advantage_gap=0.1, max_length=50)
    assert again.with_ref_logps().to_list() == given.to_list()


# ---- Refused ----


@pytest.fixture
def given(tmp_path) -> list[dict]:
    """Three state rows with numbers of the policy with seed 0."""
    return make_trainer(tmp_path, random_state_rows(3)).with_ref_logps().to_list()


def refuses(message: str, tmp_path, rows: list[dict], *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows, *args, **kwargs)


def test_another_model_is_refused(tmp_path, given):
    """Whether it is the policy that is another one, or the reference given."""
    own, other = model_fingerprint(make_policy()), model_fingerprint(make_policy(seed=1))
    message = (
        f"Row 0 of `train_dataset`: its `ref_logps` come from a model with fingerprint '{own}', the reference policy "
        f"has '{other}'. Give the model that they were computed with, in the same precision, as `ref_model` .* or "
        "remove the columns "
    )
    refuses(message, tmp_path, given, policy=make_policy(seed=1))
    refuses(message, tmp_path, given, make_policy(seed=1))
    message, rows = message.replace("train_", "eval_"), Dataset.from_list(given)
    refuses(message, tmp_path, random_state_rows(1), make_policy(seed=1), eval_dataset=rows)
    trainer = make_trainer(tmp_path, random_state_rows(1), make_policy(seed=1))
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(rows)


def test_a_single_foreign_row_is_refused(tmp_path, given):
    given[2]["ref_fingerprint"] = given[2]["ref_fingerprint"] | {"model": "0123456789abcdef"}
    refuses("Row 2 of `train_dataset`: .* model with fingerprint '0123456789abcdef'", tmp_path, given)


def test_a_trained_model_is_another(tmp_path, given):
    trainer = make_trainer(tmp_path, random_state_rows(3), learning_rate=1e-3)
    trainer.train()
    refuses("Row 0 of `train_dataset`: .* come from a model with fingerprint", tmp_path, given, policy=trainer.model)


def test_another_tokenizer_is_refused(tmp_path, given):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["so "])
    own = tokenizer_fingerprint(TOKENIZER)
    message = (
        f"Row 0 of `train_dataset`: its `ref_logps` come from a model whose tokenizer has fingerprint '{own}', this "
        f"model's has '{tokenizer_fingerprint(tokenizer)}'. Use that tokenizer, or remove the column"
    )
    refuses(message, tmp_path, given, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another\n"},
        {"prefix": ["another\n"]},
        {"candidates": ["another\n", "a\n", "b\n", "c\n"]},
        {"rewards": [1.0, None, None, None]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_changed_text_is_refused(tmp_path, given, change):
    """Another prompt, prefix or candidate, or a candidate that now ends the solution."""
    index = next(index for index, row in enumerate(given) if len(row["candidates"]) >= 2)
    size = len(given[index]["candidates"])
    change = {name: value[:size] if name in ("candidates", "rewards") else value for name, value in change.items()}
    rows = [{"rewards": None} | row if "rewards" in change else row for row in given]
    rows[index] = rows[index] | change
    message = (
        rf"Row {index} of `train_dataset`: column `ref_logps`: computed for other tokens \(fingerprint '\w+'\) than "
        r"this row has \('\w+'\): its prompt, its steps, or the chat template have changed. Remove the column"
    )
    refuses(message, tmp_path, rows)


def test_candidates_in_another_order_are_refused(tmp_path, given):
    given[1]["candidates"] = given[1]["candidates"][::-1]
    refuses("Row 1 of `train_dataset`: column `ref_logps`: computed for other tokens", tmp_path, given)


def test_wrong_number_of_numbers_is_refused(tmp_path, given):
    size = len(given[1]["candidates"])
    given[1]["ref_logps"] = given[1]["ref_logps"][1:]
    message = (
        f"Row 1 of `train_dataset`: column `ref_logps`: expected {size} numbers, one per step, got {size - 1}. Remove"
    )
    refuses(message, tmp_path, given)


LONG = {"prompt": "a\n", "completions": ["b\n", "c" * 20, "d"], "values": [0.5, 0.6, 0.9, 1.0]}
SMALL_GAP = {"prompt": "z\n", "prefix": [], "candidates": ["b\n", "c\n"], "advantages": [0.01, 0.0]}


@pytest.mark.parametrize(
    ("rows", "before", "index", "step"),
    [
        ([LONG], {"max_length": 10}, 0, 1),
        ([SMALL_GAP | {"prompt": "a\n", "advantages": [0.5, 0.0]}, SMALL_GAP], {"min_advantage_gap": 0.1}, 1, 0),
    ],
    ids=["max_length", "min_advantage_gap"],
)
def test_missing_numbers_are_refused(tmp_path, rows, before, index, step):
    """Computed with stricter settings, a step has no number that is now trained on; with the same ones all is well."""
    given = make_trainer(tmp_path, rows, **before).with_ref_logps()
    make_trainer(tmp_path, given, **before)
    message = (
        f"Row {index} of `train_dataset`: `ref_logps` has no number for step {step}, which is trained on: they were "
        "computed with a smaller `max_length`, or a larger `min_advantage_gap` or `min_reliability`. Remove the column"
    )
    refuses(message, tmp_path, given)


@pytest.mark.parametrize("logp", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, given, logp):
    """NaN counts as missing; infinity would make the loss infinite."""
    given[1]["ref_logps"][0] = logp
    refuses("Row 1 of `train_dataset`: ", tmp_path, given)


# ---- Used as they are, or not at all ----


def test_without_fingerprint_a_warning(tmp_path, monkeypatch, caplog, given):
    """Numbers of unknown origin are used as they are, by any model."""
    rows = [{name: value for name, value in row.items() if name != "ref_fingerprint"} for row in given]
    rows[0]["ref_logps"][0] = -1.25
    refuse_to_score(monkeypatch)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, rows, make_policy(seed=1))
    assert "`train_dataset` has `ref_logps`, but no `ref_fingerprint` that says whose. They are used" in caplog.text
    assert trainer.train_dataset["ref_logps"] == [row["ref_logps"] for row in rows]


def test_without_precomputing_they_are_not_used(tmp_path, caplog, given):
    """`precompute_ref_log_probs=False` runs the reference in every step, and says so: wrong numbers do no harm."""
    for row in given:
        row["ref_logps"] = [0.0] * len(row["candidates"])
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, given, precompute_ref_log_probs=False)
    assert "`train_dataset` has `ref_logps`, which `precompute_ref_log_probs=False` does not use" in caplog.text
    assert "ref_logps" not in trainer.train_dataset.column_names
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_what_with_ref_logps_refuses(tmp_path):
    trainer = make_trainer(tmp_path, random_state_rows(2))
    with pytest.raises(ValueError, match=r"There is no data set 'eval', only 'train'\."):
        trainer.with_ref_logps("eval")
    trainer = make_trainer(tmp_path, random_state_rows(2), precompute_ref_log_probs=False)
    with pytest.raises(ValueError, match=r"keeps none\. Set it to `True`"):
        trainer.with_ref_logps()


# ---- Adapters ----


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj", "v_proj"], **kwargs)


def test_fingerprint_of_the_base_under_an_adapter(tmp_path, monkeypatch, given):
    """Numbers of a plain model fit that model under a new adapter, and the other way round."""
    with_adapter = make_trainer(tmp_path, random_state_rows(3), peft_config=lora(init_lora_weights=False))
    again = with_adapter.with_ref_logps().to_list()
    assert [row["ref_fingerprint"] for row in again] == [row["ref_fingerprint"] for row in given]
    assert numbers(with_adapter.with_ref_logps()) == pytest.approx([n for row in given for n in row["ref_logps"]])
    refuse_to_score(monkeypatch)
    make_trainer(tmp_path, given, peft_config=lora(init_lora_weights=False))
    make_trainer(tmp_path, again)


def test_a_continued_adapter_is_another_reference(tmp_path, given):
    """Base and trained adapter together are the reference; another adapter, or none, has another fingerprint."""
    from peft import get_peft_model

    def adapted(seed):
        policy = make_policy()
        torch.manual_seed(seed)
        return get_peft_model(policy, lora(init_lora_weights=False))

    refuses("Row 0 of `train_dataset`: .* model with fingerprint", tmp_path, given, policy=adapted(3))
    continued = make_trainer(tmp_path, random_state_rows(3), policy=adapted(3)).with_ref_logps().to_list()
    make_trainer(tmp_path, continued, policy=adapted(3))
    refuses("Row 0 of `train_dataset`: .* model with fingerprint", tmp_path, continued, policy=adapted(4))
    refuses("Row 0 of `train_dataset`: .* model with fingerprint", tmp_path, continued)


def test_fingerprint_of_an_adapter_with_another_factor():
    """The same weights under another lora_alpha are another model."""
    from peft import get_peft_model

    def fingerprint(lora_alpha):
        policy = make_policy()
        torch.manual_seed(3)
        return model_fingerprint(get_peft_model(policy, lora(init_lora_weights=False, lora_alpha=lora_alpha)))

    assert fingerprint(8) == fingerprint(8) != fingerprint(16)


def test_model_fingerprints_differ():
    """By any weight that is sampled, by name and by shape; not by precision of equal values or by a copy."""
    policy = make_policy()
    own = model_fingerprint(policy)
    assert FINGERPRINT.fullmatch(own)
    assert own == model_fingerprint(copy.deepcopy(policy)) == model_fingerprint(policy.double())
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert model_fingerprint(policy) != own
    assert model_fingerprint(make_policy("qwen2")) != model_fingerprint(make_policy())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_fingerprint_wherever_it_was_loaded_from(tmp_path, architecture):
    """Saved and loaded from two folders, under another attention, with a padding token, in evaluation or training."""
    policy = make_policy(architecture, attention_dropout=0.1)
    own = model_fingerprint(policy)
    for folder in ("here", "there"):
        policy.save_pretrained(tmp_path / folder)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, attention_dropout=0.0)
        assert model_fingerprint(loaded) == own
        loaded.config.pad_token_id = 7
        loaded.config.use_cache = False
        loaded.set_attn_implementation("eager")
        loaded.gradient_checkpointing_enable()
        assert model_fingerprint(loaded.train()) == own


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"final_logit_softcapping": 20.0}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_fingerprint_of_another_configuration(architecture, change):
    """The same weights that compute something else are another model."""
    policy, other = make_policy(architecture), make_policy(architecture, **change)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert not torch.equal(policy(ids).logits, other(ids).logits)
    assert model_fingerprint(policy) != model_fingerprint(other)
