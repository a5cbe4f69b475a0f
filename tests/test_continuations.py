"""
`continuations.py`: ids and texts after a prefix, with tokenizers that treat the beginning of a text in their own way.
"""

import random

import pytest
from datasets import Dataset

from conftest import SAMPLE, answer_reward, make_policy, make_tokenizer, sentencepiece_tokenizer
from dapo_trl import TransformersEngine, collect_rollouts
from dapo_trl.continuations import continuation_ids, continuation_text, text_context
from dapo_trl.engines import SamplingConfig
from dapo_trl.engines._completions import to_completion
from dapo_trl.rollouts import RolloutConfig
from dapo_trl.steps import split_ids, token_ends


TEXTS = [*SAMPLE, "def f(x):\n    if x:\n        return  1\n", "第一步。\n 第二步：7\n", "a  b\n\n  c \n"]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(params=["SentencePiece", "bytes"], scope="module")
def tokenizer(request):
    return sentencepiece_tokenizer() if request.param == "SentencePiece" else make_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_prefix_and_continuation_are_the_whole(tokenizer, text):
    """Wherever the ids are cut between two characters, by hand or into steps; the end token has no text."""
    ids = tokenizer(text).input_ids
    assert text_of(tokenizer, ids) == text
    for cut in range(1, len(ids)):
        before = text_of(tokenizer, ids[:cut])
        rest = [*ids[cut:], tokenizer.eos_token_id]
        after = continuation_text(tokenizer, ids[:cut], rest)
        if "\ufffd" not in before:
            assert before + after == text
        assert "\ufffd" not in after
        assert continuation_text(tokenizer, text_context(tokenizer, ids[:cut]), rest) == after
        steps_ids, steps = split_ids(rest, tokenizer, "\n", ids[:cut])
        assert "".join(steps) == after
        assert [token for step in steps_ids for token in step] == rest


def test_by_hand():
    """Two lines of code: decoded alone, the second loses one of its two spaces."""
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer("if x:\n  y\n").input_ids
    cut = len(tokenizer("if x:\n").input_ids)
    assert text_of(tokenizer, ids[cut:]) == " y\n"
    assert continuation_text(tokenizer, ids[:cut], ids[cut:]) == "  y\n"
    assert split_ids(ids[cut:], tokenizer, "\n", ids[:cut]) == ([ids[cut:]], ["  y\n"])
    assert continuation_ids(tokenizer, ids[:cut], "  y\n") == (ids[cut:], True)


def test_context():
    """A few ids; more where they have no text, or begin within a character."""
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer("x" * 40).input_ids
    assert text_context(tokenizer, ids) == tuple(ids[-4:])
    assert text_context(tokenizer, ids[:2]) == tuple(ids[:2])
    assert text_context(tokenizer, []) == ()
    ends = [tokenizer.eos_token_id] * 5
    assert text_context(tokenizer, ids + ends) == tuple((ids + ends)[-16:])
    assert continuation_text(tokenizer, ids + ends, tokenizer(" y").input_ids) == "  y"
    assert continuation_text(tokenizer, ends, tokenizer("y").input_ids) == "y"  # nothing was said before
    ids = tokenizer("第一步一步一步").input_ids
    for cut in range(len(ids) - 21, len(ids), 3):
        assert text_of(tokenizer, ids[:cut]) + continuation_text(tokenizer, ids[:cut], ids[cut:]) == "第一步一步一步"


def test_a_character_belongs_to_what_completes_it():
    tokenizer = make_tokenizer()
    first, second = tokenizer("é").input_ids
    a, b = tokenizer("ab").input_ids
    assert continuation_text(tokenizer, [a, first], [second, b]) == "éb"
    assert token_ends([second, b], tokenizer, prefix_ids=[a, first]) == ("éb", [1, 2])
    assert continuation_text(tokenizer, [a, first], [b]) == "b"  # which completes nothing


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_text(tokenizer, text):
    """They are the text again in their place. Where the text begins a token, they are the ids that it had."""
    ids = tokenizer(text).input_ids
    rng = random.Random(0)
    for cut in rng.sample(range(1, len(ids)), min(20, len(ids) - 1)):
        if "\ufffd" in text_of(tokenizer, ids[:cut]):
            continue
        after = continuation_text(tokenizer, ids[:cut], ids[cut:])
        found, is_same = continuation_ids(tokenizer, ids[:cut], after)
        assert is_same
        assert continuation_text(tokenizer, ids[:cut], found) == after
        if after.startswith("\n") or text[len(text) - len(after) - 1] == "\n":
            assert found == ids[cut:]


def test_bytes_are_tokenized_alone():
    """As before; a special token in the text is ordinary characters."""
    tokenizer = make_tokenizer()
    found, is_same = continuation_ids(tokenizer, [10, 11], " a<eos>")
    assert is_same
    assert found == [token for character in " a<eos>" for token in tokenizer(character).input_ids]


def test_engine_and_split_agree():
    """The text that is judged is the prefix and the completion, letter by letter, and so are the steps of the rows."""
    tokenizer = sentencepiece_tokenizer()
    engine = TransformersEngine(make_policy(vocab_size=len(tokenizer), eos_token_id=2), tokenizer, 64)
    prefixes = [tokenizer("if x:\n").input_ids, tokenizer("a").input_ids]
    samples = engine.generate(prefixes, [list(range(200))] * 2, SamplingConfig(max_new_tokens=12))
    completions = [(prefix, one) for prefix, group in zip(prefixes, samples, strict=True) for one in group]
    for prefix, completion in completions:
        whole = text_of(tokenizer, [*prefix, *completion.ids])
        if "\ufffd" not in whole:
            assert text_of(tokenizer, prefix) + completion.text == whole
        assert "".join(split_ids(completion.ids, tokenizer, "\n", prefix)[1]) == completion.text
    assert any(one.text.startswith(" ") and not text_of(tokenizer, one.ids).startswith(" ") for _, one in completions)


class IndentingEngine:
    """Goes on with the ids of one program, wherever it is asked."""

    name, num_calls = "indenting", 1

    def __init__(self):
        self.tokenizer = sentencepiece_tokenizer()
        self.ids = self.tokenizer("if x:\n  y\n  z\n  1").input_ids

    def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
        return [[self.complete(prefix) for _ in group] for prefix, group in zip(prefixes, seeds, strict=True)]

    def complete(self, prefix):
        return to_completion(self.tokenizer, prefix, self.ids[len(prefix) :], "stop", ())

    def describe(self):
        return {}

    def take_counts(self):
        return {}


def test_a_step_has_one_text():
    """
    In the solution and in every text that is judged, so that completions count in the states that they pass through:
    the prompt has two solutions and two completions, the first state these two and two of its own, and so on.
    """
    judged = []

    def reward(prompts, completions, **kwargs):
        judged.extend(completions)
        return answer_reward(prompts, completions, ["1"] * len(completions))

    problems = Dataset.from_list([{"prompt": "if x:\n", "answer": "1"}])
    config = RolloutConfig(num_solutions=2, num_kept=1, num_completions=2, reuse=False, skip_uniform=False)
    rollouts = collect_rollouts(problems, IndentingEngine(), reward, config)
    assert set(judged) == {"  y\n  z\n  1"}
    assert rollouts.solutions[0]["completions"] == ["  y\n", "  z\n", "  1"]
    assert rollouts.solutions[0]["mc_rollouts"] == [4, 4, 6, 7]
