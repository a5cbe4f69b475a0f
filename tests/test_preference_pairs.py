"""
`preference_pairs.py`: which steps become a pair, what TRL reads of it, and what is refused.
"""

import logging

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from conftest import CHAT_TEMPLATE, make_policy, make_tokenizer, sentencepiece_tokenizer
from dapo_trl.preference_pairs import to_preference_pairs
from dapo_trl.tokenization import encode_state


STATE = {
    "prompt": "2+3+4?\n",
    "prefix": ["2+3=5\n"],
    "candidates": ["5+4=9\n", "5+4=8\n", "5+3=7\n", "what\n", "9+4=5\n"],
    "values": [0.875, 0.5, 0.25, 0.125, 0.825],
}


def pairs(*states, **given) -> list[dict]:
    return list(to_preference_pairs(Dataset.from_list(states), **given))


def test_by_hand():
    """
    The first candidate is the best; the last is within the gap of 0.1. "5+4=8" shares five of six characters with it
    and is the closest; the word has the lowest value. Below 1/2 is left what has 1/4 and 1/8: "5+3=7" is the closer.
    """
    (closest,) = pairs(STATE)
    assert closest["prompt"] == "2+3+4?\n2+3=5\n" and closest["chosen"] == "5+4=9\n"
    assert (closest["rejected"], closest["chosen_value"], closest["rejected_value"]) == ("5+4=8\n", 0.875, 0.5)
    assert pairs(STATE, negatives="worst")[0]["rejected"] == "what\n"
    assert pairs(STATE, threshold=0.5)[0]["rejected"] == "5+3=7\n"
    assert pairs(STATE, min_gap=0.05)[0]["rejected"] == "5+4=8\n"
    assert pairs(STATE, min_gap=0.7)[0]["rejected"] == "what\n"
    assert pairs(STATE | {"values": [0.6, 0.5, 0.5, 0.5, 0.5]})[0]["rejected_value"] == 0.5  # 0.6 - 0.5 is a gap of 0.1


def test_of_equally_close_ones_the_lower_value_is_rejected():
    state = STATE | {"candidates": ["ab\n", "ax\n", "ay\n"], "values": [1.0, 0.5, 0.25]}
    assert pairs(state)[0]["rejected"] == "ay\n"


def test_a_solution_that_ends_has_its_reward():
    state = STATE | {"rewards": [0.0, None, None, None, None]}
    (pair,) = pairs(state, negatives="worst")
    assert (pair["chosen"], pair["rejected"]) == ("9+4=5\n", "5+4=9\n") and pair["rejected_value"] == 0.0


def test_equal_values_are_no_pair_whatever_the_gap():
    equal = STATE | {"values": [0.5] * 5}
    assert len(pairs(STATE, equal, min_gap=0.0)) == 1


def test_what_is_left_out_is_counted(caplog):
    with caplog.at_level(logging.INFO, "dapo_trl"):
        assert len(pairs(STATE, STATE | {"values": [0.5] * 5})) == 1
    assert "1 of 2 states have no pair" in caplog.text


def test_ids_of_the_sampler_come_along():
    state = STATE | {"problem_id": "7", "prompt_ids": [1, 2], "prefix_ids": [[3, 4]]}
    state |= {"candidates_ids": [[5], [6], [7, 8], [9], [10]], "critic_values": [0.0, 0.0, 1.0, 0.0, 0.0]}
    (pair,) = pairs(state, values="critic_values", negatives="worst")
    assert pair["problem_id"] == "7"
    assert (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]) == ([1, 2, 3, 4], [7, 8], [5])
    without = state | {"candidates_ids": None, "problem_id": "8"}
    some = pairs(state, without, values="critic_values")
    assert len(some) == 2 and not any("chosen_ids" in pair for pair in some)  # not half a column


def test_an_answer_that_has_begun_goes_on():
    """A prompt that ends with an assistant's words is not closed by the template."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "2+3+4?"}, {"role": "assistant", "content": "Let me see.\n"}]
    (pair,) = pairs(STATE | {"prompt": messages}, processing_class=tokenizer)
    context, _ = encode_state(messages, STATE["prefix"], STATE["candidates"], [False] * 5, tokenizer)
    assert tokenizer(pair["prompt"])["input_ids"] == context
    assert pair["prompt"].endswith("Let me see.\n2+3=5\n")


def test_refuses_what_is_no_data_set():
    with pytest.raises(TypeError, match=r"must be a `datasets\.Dataset`, got list"):
        to_preference_pairs([STATE])


@pytest.mark.parametrize("make", [lambda: make_tokenizer(CHAT_TEMPLATE), lambda: sentencepiece_tokenizer()])
def test_conversational_prompts_are_what_the_policy_reads(make):
    """The text, tokenized as TRL tokenizes it, is the state that `DAPOTrainer` trains on."""
    tokenizer = make()
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "2+3+4?"}]
    (pair,) = pairs(STATE | {"prompt": messages}, processing_class=tokenizer)
    context, _ = encode_state(messages, STATE["prefix"], STATE["candidates"], [False] * 5, tokenizer)
    assert tokenizer(pair["prompt"])["input_ids"] == context


def test_trl_trains_on_them(tmp_path):
    """Directly; it adds an end to every step, in the middle of a solution too."""
    tokenizer = make_tokenizer()
    args = DPOConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True
    )
    rows = Dataset.from_list(pairs(STATE))
    trainer = DPOTrainer(make_policy(), make_policy(), args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 1
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]) == "2+3+4?\n2+3=5\n"
    assert tokenizer.decode(row["chosen_ids"]) == "5+4=9\n<eos>"


@pytest.mark.parametrize(
    ("states", "given", "message"),
    [
        ([STATE], {"negatives": "random"}, "`negatives` must be 'closest' or 'worst', got 'random'"),
        ([STATE], {"min_gap": 2.0}, "`min_gap` must lie in"),
        ([STATE], {"values": "critic_values"}, "Preference pairs need the columns .*'critic_values' are not there"),
        ([STATE], {"threshold": 0.1}, "None of 1 states has two candidates .* the lower one below `threshold=0.1`"),
        ([STATE | {"values": [0.5] * 5}], {}, "None of 1 states has two candidates whose values differ by"),
        ([STATE, STATE | {"values": None}], {}, "Row 1: it has no 'values'"),
        ([STATE | {"values": [0.5, None, 0.1, 0.1, 0.1]}], {}, "Row 0: it has no 'values' for all candidates"),
        ([STATE | {"values": [0.5, 0.1]}], {}, "Row 0: it has 2 'values' for 5 candidates"),
        ([STATE | {"values": [3.0, 0.1, 0.1, 0.1, 0.1]}], {}, "Row 0: Values are probabilities"),
        ([STATE], {"threshold": 0.0}, "`threshold` is a value that rejected steps are below"),
        ([STATE | {"rewards": [1.0]}], {}, "Row 0: `values` and `rewards` must have the same length"),
        ([STATE | {"prompt": [{"role": "user", "content": "?"}]}], {}, "Row 0: its prompt is conversational. Pass"),
    ],
)
def test_refuses(states, given, message):
    with pytest.raises(ValueError, match=message):
        to_preference_pairs(Dataset.from_list(states), **given)
