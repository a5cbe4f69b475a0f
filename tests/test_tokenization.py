"""
`tokenization.py`: text becomes the ids that generation saw, cut where the steps end.
"""

from itertools import chain

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import CHAT_TEMPLATE, make_tokenizer
from dapo_trl.tokenization import encode_prompt, encode_solution, encode_state, tokenizer_fingerprint


EOS = 1
TEXTS = ["So 7 + 8 = 15.\nThen 15 - 3 = 12.\n\n#### 12", "Über 5 €.\nThen  2\n more", "a\nb"] * 30


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in most models of today, and Metaspace as in those that came from SentencePiece."""
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted(set("".join(TEXTS)))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize(
    "steps",
    [["So 7 + 8 = 15.\n", "Then 15 - 3 = 12.\n\n", "#### 12"], ["Über 5 €.\n", "Then  2\n", " more"], ["a\n", "more"]],
)
def test_solution_is_tokenized_as_a_whole(kind, steps):
    """Prompt and steps concatenate to the ids of the whole text, plus one end token; each step decodes to its text."""
    tokenizer, prompt = trained(kind), "How much?\n"
    prompt_ids, steps_ids = encode_solution(prompt, steps, tokenizer)
    assert prompt_ids == encode_prompt(prompt, tokenizer)
    assert [*prompt_ids, *chain(*steps_ids)] == [*tokenizer(prompt + "".join(steps)).input_ids, EOS]
    assert [ids.count(EOS) for ids in steps_ids] == [0] * (len(steps) - 1) + [1]
    if kind == "byte-level":
        decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in steps_ids]
        assert decoded == steps


def test_truncated_solution_has_no_end():
    _, steps_ids = encode_solution("p\n", ["a\n", "b"], make_tokenizer(), ended=False)
    assert EOS not in chain(*steps_ids)


def test_a_token_that_straddles_two_steps_belongs_to_the_earlier():
    """With a token for "\\nb", the step "a\\n" ends with it, as it would in sampled ids; the next step has the rest."""
    vocab = {"<pad>": 0, "<eos>": 1, "p": 2, "a": 3, "Ċ": 4, "b": 5, "c": 6, "Ċb": 7}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    assert encode_solution("p", ["a\n", "bc"], tokenizer) == ([2], [[3, 7], [6, EOS]])
    with pytest.raises(ValueError, match="The step 'b' has no token of its own"):
        encode_solution("p", ["a\n", "b"], tokenizer)


def test_state_is_what_all_candidates_share():
    """Where the tokenizer merges across the boundary for one candidate, the state ends before the merge for all."""
    vocab = {"<pad>": 0, "<eos>": 1, "p": 2, "a": 3, "b": 5, "c": 6, "ab": 7}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    assert encode_state("p", ["a"], ["b", "c"], [False, True], tokenizer) == ([2], [[7], [3, 6, EOS]])


def test_prompt_is_what_generation_sees():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode_prompt(messages, tokenizer) == expected["input_ids"]
    assert encode_prompt("hi", tokenizer) == tokenizer("hi").input_ids
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(messages, make_tokenizer())


def test_begin_token_comes_once():
    """A tokenizer that puts a token in front does so for the prompt, not for every step."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    prompt_ids, steps_ids = encode_solution("p\n", ["a\n", "b"], tokenizer)
    assert prompt_ids[0] == 0
    assert 0 not in [*prompt_ids[1:], *chain(*steps_ids)]


def test_closing_token_is_taken_off():
    """A tokenizer that closes every text with its end token does not end the prompt, nor the solution twice."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    prompt_ids, steps_ids = encode_solution("p\n", ["a\n", "b"], tokenizer)
    assert EOS not in prompt_ids
    assert list(chain(*steps_ids)).count(EOS) == 1


def test_fingerprint():
    """Equal for equal vocabularies, different when one token differs."""
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(make_tokenizer(CHAT_TEMPLATE))
    other = make_tokenizer()
    other.add_tokens(["new"])
    assert tokenizer_fingerprint(make_tokenizer()) != tokenizer_fingerprint(other)
