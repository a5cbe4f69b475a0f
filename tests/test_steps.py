"""Steps as text and as tokens: hand-derived cases, random texts, every GSM8K solution, and each refusal."""

import json
import os
import random
import re
from itertools import accumulate, chain
from operator import and_, eq
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import dapo_trl.steps
from conftest import SAMPLE, sentencepiece_tokenizer
from dapo_trl.steps import first_step_ids, split_ids, split_step_ids, split_steps, step_ends, step_texts, token_ends


DATA = Path(os.environ.get("DAPO_TRL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def byte_level_tokenizer(texts=SAMPLE, vocab_size=300):
    """Byte-level BPE as in GPT-2, Llama 3 and Qwen: any byte is a token, so a character may need several."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=specials)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def unigram_tokenizer(texts=SAMPLE, vocab_size=200):
    """Unigram with Metaspace, as in T5: the decoder drops the leading space; newlines are kept as characters."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    alphabet = sorted({char for text in texts for char in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


BUILDERS = {"byte": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer, "unigram": unigram_tokenizer}


@pytest.fixture(scope="module", params=list(BUILDERS))
def tokenizer(request):
    return BUILDERS[request.param]()


def word_tokenizer(*tokens):
    """Tokens given by hand, id = position; the last one, `<eos>`, is special."""
    table = str.maketrans({" ": "Ġ", "\n": "Ċ"})
    vocab = {token.translate(table): i for i, token in enumerate([*tokens, "<eos>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def decode(ids, tokenizer, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


class TestText:
    @pytest.mark.parametrize(
        ("text", "steps"),
        [
            ("", []),
            ("a", ["a"]),
            ("a\n", ["a\n"]),
            ("a\nb", ["a\n", "b"]),
            ("a\n\nb", ["a\n\n", "b"]),  # a run ends one step
            ("a\n  b", ["a\n", "  b"]),  # indentation belongs to its line
            ("a\n \nb", ["a\n \n", "b"]),  # a blank line joins the step before
            ("\n \na\nb", ["\n \na\n", "b"]),  # the first blank lines join the step after
            ("a\nb\n  \n\n", ["a\n", "b\n  \n\n"]),
            (" \n\n\t", [" \n\n\t"]),  # only white space: one step
            ("a\r\nb", ["a\r\n", "b"]),
            ("a\n\u2003\nb", ["a\n\u2003\n", "b"]),  # any Unicode white space
        ],
    )
    def test_newline(self, text, steps):
        assert split_steps(text) == steps

    def test_ends_are_exclusive_offsets(self):
        """ "2+2=4" is 5 characters, with two newlines 7, and "so 4" adds 4."""
        assert step_ends("2+2=4\n\nso 4") == [7, 11]

    def test_string_of_several_characters(self):
        """ "\\n\\n" twice is one run of 4 characters; a single newline does not end a step."""
        assert split_steps("a\nb\n\n\n\nc", "\n\n") == ["a\nb\n\n\n\n", "c"]

    def test_string_is_not_a_pattern(self):
        assert split_steps("a.b.c", ".") == ["a.", "b.", "c"]

    def test_pattern_with_context(self):
        text = "Step 1: add\nmore\nStep 2: done"
        assert split_steps(text, re.compile(r"\n(?=Step)")) == ["Step 1: add\nmore\n", "Step 2: done"]

    def test_touching_matches_are_one_run(self):
        assert split_steps("a;\n;b", re.compile(r";|\n")) == ["a;\n;", "b"]

    def test_callable(self):
        """The last end may be left out, and white space is joined here too: the piece " \\n" joins "ab"."""
        assert split_steps("ab \ncd", lambda text: [2, 4]) == ["ab \n", "cd"]
        assert split_steps("abcd", lambda text: []) == ["abcd"]
        assert split_steps("abcd", lambda text: np.array([1, 4])) == ["a", "bcd"]

    def test_random_texts(self):
        """The steps concatenate to the text, none is blank, and a separator is always followed by a step's text."""
        rng = random.Random(0)
        for _ in range(3000):
            text = "".join(rng.choices("ab. \n\t\u3000", k=rng.randrange(25)))
            for separator in ("\n", ". ", re.compile(r"\s*\n\s*"), lambda t: list(range(1, len(t) + 1))):
                steps = split_steps(text, separator)
                assert "".join(steps) == text
                assert all(step.strip() for step in steps) or (len(steps) == 1 and text.isspace())
                assert [len("".join(steps[: i + 1])) for i in range(len(steps))] == step_ends(text, separator)
            for step in split_steps(text) if text.strip() else []:
                assert "\n" not in step.strip()

    def test_join_is_idempotent(self):
        """A step is one step, and steps with content split alike alone and in their text."""
        rng = random.Random(1)
        for _ in range(300):
            for step in split_steps("".join(rng.choices("ab \n", k=20))):
                assert split_steps(step) == [step]

    @pytest.mark.parametrize(
        ("separator", "error", "message"),
        [
            ("", ValueError, "`separator` is the empty string"),
            (re.compile(r"\n*"), ValueError, r"`separator` '\\\\n\*' matches the empty string"),
            (re.compile(r"(?=b)"), ValueError, r"`separator` '\(\?=b\)' matches the empty string"),
            (re.compile(b"\n"), TypeError, "must be a pattern for text"),
            (7, TypeError, "`separator` must be a string, a compiled `re.Pattern` or a callable.* got int: 7"),
            (lambda text: [2, 1], ValueError, r"returned \[2, 1\] for a text of 3 characters: .* from 1 to 3"),
            (lambda text: [0, 1], ValueError, r"returned \[0, 1\]"),
            (lambda text: [1, 1], ValueError, r"returned \[1, 1\]"),
            (lambda text: [4], ValueError, r"returned \[4\]"),
            (lambda text: [1.0], ValueError, r"returned \[1.0\]"),
            (lambda text: ["a"], ValueError, r"returned \['a'\]"),
            (lambda text: [True], ValueError, r"returned \[True\]"),
        ],
    )
    def test_refused_separators(self, separator, error, message):
        with pytest.raises(error, match=message):
            split_steps("abc", separator)

    def test_text_must_be_text(self):
        with pytest.raises(TypeError, match="`text` must be a string, got NoneType: None"):
            split_steps(None)


class TestTokens:
    def test_token_completes_the_separator(self):
        """Tokens: "2+2=4" ".\\n\\n" "So" " 4" EOS. The token with the newlines ends step 1, EOS belongs to step 2."""
        tokenizer = word_tokenizer("2+2=4", ".\n\n", "So", " 4")
        assert split_step_ids([0, 1, 2, 3, 4], tokenizer) == [[0, 1], [2, 3, 4]]
        assert step_texts([[0, 1], [2, 3, 4]], tokenizer) == ["2+2=4.\n\n", "So 4"]
        assert step_texts([[0, 1], [2, 3, 4]], tokenizer, skip_special_tokens=False) == ["2+2=4.\n\n", "So 4<eos>"]

    def test_run_over_several_tokens(self):
        tokenizer = word_tokenizer("a", "\n", " \n", "b")
        assert split_step_ids([0, 1, 1, 2, 3], tokenizer) == [[0, 1, 1, 2], [3]]

    def test_token_with_the_beginning_of_the_next_step(self):
        """ "\\n  b" ends step 1, whose text then is "a\\n  b"; "c" continues what was step 2."""
        tokenizer = word_tokenizer("a", "\n  b", "c", "\n", "d")
        steps = split_step_ids([0, 1, 2, 3, 4], tokenizer)
        assert steps == [[0, 1], [2, 3], [4]]
        assert step_texts(steps, tokenizer) == ["a\n  b", "c\n", "d"]

    def test_two_separators_in_one_token(self):
        """ "\\nb\\n" ends two steps at once: they merge."""
        tokenizer = word_tokenizer("a", "\nb\n", "c")
        assert split_step_ids([0, 1, 2], tokenizer) == [[0, 1], [2]]

    def test_no_step_of_white_space(self):
        """Text steps are "a\\n", "b\\n", "c"; token "\\nb" moves b to step 1, and the newline that is left joins it."""
        tokenizer = word_tokenizer("a", "\nb", "\n", "c")
        assert split_step_ids([0, 1, 2, 3], tokenizer) == [[0, 1, 2], [3]]

    def test_special_tokens_make_no_step(self):
        tokenizer = word_tokenizer("a", "\n", "b")
        assert split_step_ids([0, 1, 3], tokenizer) == [[0, 1, 3]]
        assert split_step_ids([0, 1, 2, 1, 3, 3], tokenizer) == [[0, 1], [2, 1, 3, 3]]
        assert split_step_ids([0, 1, 3, 2], tokenizer) == [[0, 1], [3, 2]]
        assert split_step_ids([3], tokenizer) == [[3]]
        assert split_step_ids([], tokenizer) == first_step_ids([], tokenizer) == step_texts([], tokenizer) == []

    def test_ends_within_a_character(self):
        """ "€" is three bytes and three tokens here: the first two end where it starts, the last one after it."""
        tokenizer = byte_level_tokenizer(["a"])
        ids = tokenizer("a€b").input_ids
        assert token_ends(ids, tokenizer) == ("a€b", [1, 1, 1, 2, 3])

    def test_wide_space_of_several_tokens(self):
        """A step starts with the first token of an ideographic space (three bytes), as its indentation."""
        tokenizer = byte_level_tokenizer(["ab"])
        steps = split_step_ids(tokenizer("a\n\u3000b").input_ids, tokenizer)
        assert [len(step) for step in steps] == [2, 4]
        assert step_texts(steps, tokenizer) == ["a\n", "\u3000b"]

    @pytest.mark.parametrize("text", SAMPLE)
    def test_kinds_of_tokenizer(self, tokenizer, text):
        """Where no token straddles a cut, the steps of the ids are the steps of the text that they decode to."""
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        steps = split_step_ids(ids, tokenizer)
        assert [*chain(*steps)] == ids and all(steps)
        text = decode(ids, tokenizer)
        texts = step_texts(steps, tokenizer)
        assert "".join(texts) == text
        ends = set(token_ends(ids, tokenizer)[1])
        if set(step_ends(text)) <= ends:
            assert texts == split_steps(text)
        with_eos = step_texts(steps, tokenizer, skip_special_tokens=False)
        assert "".join(with_eos) == decode(ids, tokenizer, skip=False)
        assert with_eos[:-1] == texts[:-1]

    @pytest.mark.parametrize("text", [*SAMPLE, "  a\n  b"])
    def test_ends_match_a_slow_reference(self, tokenizer, text):
        """
        The end of token j is what the decoded ids up to j share with the text; quadratic, for valid UTF-8 only. Byte
        fallback shows a run of byte tokens as U+FFFD until its last character is complete: hence the running maximum.
        """
        ids = tokenizer(text, add_special_tokens=False).input_ids
        text, ends = token_ends(ids, tokenizer)
        prefixes = [decode(ids[: j + 1], tokenizer) for j in range(len(ids))]
        assert "\ufffd" not in text
        shared = [sum(accumulate(map(eq, prefix, text), and_)) for prefix in prefixes]
        assert ends == list(accumulate(shared, max))

    def test_random_ids(self, tokenizer):
        """What a policy at the start may sample: invalid UTF-8, specials anywhere. Also checks `first_step_ids`."""
        rng = random.Random(0)
        newlines = [i for i in range(len(tokenizer)) if "\n" in decode([i], tokenizer)]
        for trial in range(150):
            ids = rng.choices(range(len(tokenizer)), k=rng.choice([1, 5, 70, 150])) + rng.choices(newlines, k=trial % 9)
            rng.shuffle(ids)
            steps = split_step_ids(ids, tokenizer)
            assert [*chain(*steps)] == ids and all(steps)
            texts = step_texts(steps, tokenizer)
            assert "".join(texts) == decode(ids, tokenizer)
            assert len(texts) == 1 or all(text.strip() for text in texts)
            assert split_ids(ids, tokenizer) == (steps, texts)
            assert first_step_ids(ids, tokenizer) == steps[0]
            text, ends = token_ends(ids, tokenizer)
            assert ends == sorted(ends) and len(ends) == len(ids) and ends[-1] == len(text)

    def test_runs_of_tokens_end_where_single_tokens_do(self, tokenizer, monkeypatch):
        """Tokens whose texts are known are taken several at once; the ends are those of taking them one by one."""
        rng = random.Random(0)
        several = [rng.choices(range(len(tokenizer)), k=150) for _ in range(30)]
        several += [tokenizer(text * 5, add_special_tokens=False).input_ids for text in SAMPLE]
        for ids in several:
            token_ends(ids, tokenizer)  # from here on their texts are known
        passed = []
        with monkeypatch.context() as patch:
            pass_over = dapo_trl.steps._Window.pass_over
            patch.setattr(
                dapo_trl.steps._Window, "pass_over", lambda *args: passed.append(pass_over(*args)) or passed[-1]
            )
            at_once = [token_ends(ids, tokenizer) for ids in several]
        assert any(passed) and not all(passed)
        monkeypatch.setattr(dapo_trl.steps._Window, "pass_over", lambda *args: False)
        assert [token_ends(ids, tokenizer) for ids in several] == at_once

    def test_invalid_bytes(self):
        """E2 82 begins a character of three bytes; FF is none. They show as one U+FFFD for E2 82, and one for FF."""
        tokenizer = byte_level_tokenizer()
        ids = tokenizer.convert_tokens_to_ids(["â", "Ĥ", "ÿ"])  # how byte-level tokens write E2, 82 and FF
        assert token_ends(ids, tokenizer) == ("\ufffd\ufffd", [1, 1, 2])

    def test_padding_in_front(self, tokenizer):
        """Special tokens end where the token before them does, however many there are."""
        ids = tokenizer(SAMPLE[0], add_special_tokens=False).input_ids
        text, ends = token_ends(ids, tokenizer)
        assert token_ends([tokenizer.eos_token_id] * 100 + ids, tokenizer) == (text, [0] * 100 + ends)

    def test_special_token_without_a_role(self):
        """A chat marker is special without being bos, eos or pad; the word after it keeps its space."""
        tokenizer = sentencepiece_tokenizer()
        tokenizer.backend_tokenizer.add_special_tokens(["<im>"])
        marker = tokenizer.convert_tokens_to_ids("<im>")
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in ("clips", "in May\n4"))
        assert marker not in tokenizer.all_special_ids
        steps = split_step_ids([*before, marker, *after], tokenizer)
        assert [*chain(*steps)] == [*before, marker, *after]
        assert step_texts(steps, tokenizer) == ["clips in May\n", "4"]
        ends = token_ends([*before, marker, *after], tokenizer)[1]
        assert ends[len(before)] == 5 and ends[len(before) + 1] > 5

    def test_first_step_looks_beyond_a_cut_character(self):
        """
        62 letters, a newline and the first byte of an ideographic space fill the first 64 tokens. The space and
        the next newline join the first step: 62 + 1 + 3 + 1 tokens.
        """
        tokenizer = byte_level_tokenizer(["b"])
        ids = tokenizer("b" * 62 + "\n\u3000\nb").input_ids
        assert len(ids) == 68
        assert first_step_ids(ids, tokenizer) == split_step_ids(ids, tokenizer)[0] == ids[:67]

    def test_other_separators(self):
        tokenizer = word_tokenizer("a", ".", " b", "\n", "Step")
        ids = [0, 1, 2, 3, 4, 1, 5]
        assert split_step_ids(ids, tokenizer, ".") == [[0, 1], [2, 3, 4, 1, 5]]
        for separator in (re.compile(r"\n(?=Step)"), lambda text: [text.index("\n") + 1]):
            assert split_step_ids(ids, tokenizer, separator) == [[0, 1, 2, 3], [4, 1, 5]]
            assert first_step_ids(ids, tokenizer, separator) == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="empty string"):
            split_step_ids(ids, tokenizer, "")
        with pytest.raises(ValueError, match="empty string"):
            first_step_ids(ids * 100, tokenizer, "")

    def test_tensors_and_arrays(self):
        tokenizer = word_tokenizer("a", "\n", "b")
        for ids in (torch.tensor([0, 1, 2]), np.array([0, 1, 2]), (0, 1, 2)):
            assert split_step_ids(ids, tokenizer) == [[0, 1], [2]]
            assert first_step_ids(ids, tokenizer) == [0, 1]
        with pytest.raises(TypeError, match="flat list of token ids, got list"):
            split_step_ids([[0, 1]], tokenizer)

    def test_decoded_tokens_are_linear(self):
        """
        Four times the ids, about four times the decoded tokens. Also for bytes that are no text, for specials in front,
        and where byte fallback turns thousands of newlines into U+FFFD because of one bad byte behind them.
        """

        def decoded(ids, tokenizer):
            count = 0

            class Counting:
                all_special_ids = tokenizer.all_special_ids

                def decode(self, window, **kwargs):
                    nonlocal count
                    count += len(window)
                    return tokenizer.decode(window, **kwargs)

            token_ends(ids, Counting())
            return count

        byte, fallback = byte_level_tokenizer(), sentencepiece_tokenizer()
        text = byte(SAMPLE[3] * 20).input_ids
        newline, bad = fallback.convert_tokens_to_ids(["<0x0A>", "<0xFF>"])
        for tokenizer, ids, last in (
            (byte, text, []),
            (byte, [byte.pad_token_id] * 500 + text, []),
            (byte, [byte.convert_tokens_to_ids("Ģ")] * 1000, []),
            (fallback, [newline] * 1000, [bad]),
        ):
            assert decoded(ids * 4 + last, tokenizer) < 5 * decoded(ids + last, tokenizer)
            assert decoded(ids + last, tokenizer) < 10 * len(ids)

    def test_first_step_decodes_little(self):
        """The first step of a long completion is found without decoding all of it."""
        tokenizer = word_tokenizer("a", "\n")
        longest = 0

        class Watching:
            all_special_ids = tokenizer.all_special_ids

            def decode(self, window, **kwargs):
                nonlocal longest
                longest = max(longest, len(window))
                return tokenizer.decode(window, **kwargs)

        assert first_step_ids([0, 1] + [0] * 10_000, Watching()) == [0, 1]
        assert longest < 100


@pytest.fixture(scope="module")
def solutions():
    files = [DATA / "gsm8k-train.jsonl", DATA / "gsm8k-test.jsonl"]
    return [json.loads(line)["answer"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(not (DATA / "gsm8k-train.jsonl").exists(), reason="GSM8K is not there; set DAPO_TRL_DATA")
class TestGSM8K:
    def test_text(self, solutions):
        assert len(solutions) == 8792
        for text in solutions:
            steps = split_steps(text)
            assert "".join(steps) == text
            assert [step.strip("\n") for step in steps] == [line for line in text.split("\n") if line.strip()]

    @pytest.mark.parametrize("kind", ["byte", "unigram"])
    def test_tokens(self, solutions, kind):
        tokenizer = BUILDERS[kind](solutions[:500], vocab_size=1000)
        all_ids = tokenizer(solutions, add_special_tokens=False).input_ids
        for text, ids in zip(solutions, all_ids, strict=True):
            ids.append(tokenizer.eos_token_id)
            steps = split_step_ids(ids, tokenizer)
            assert [*chain(*steps)] == ids
            texts = step_texts(steps, tokenizer)
            text = text if kind == "byte" else decode(ids, tokenizer)  # unigram has unknown characters
            assert "".join(texts) == text
            if kind == "byte":  # newlines are tokens of their own here
                assert texts == split_steps(text)
