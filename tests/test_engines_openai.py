"""
`engines/openai.py`: against a small server that can be told how to behave, and against `transformers serve`.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import STUDENT, make_tokenizer, sentencepiece_tokenizer
from dapo_trl import math_reward
from dapo_trl.engines import SamplingConfig, _pool, _servers, sample_seed
from dapo_trl.engines import openai as openai_engine
from dapo_trl.engines.openai import Capabilities, OpenAIEngine
from http_servers import SHORT, Behaviour, FakeServer, Student, free_port


EOS = 1
PREFIXES = [[10, 11, 12], [20], [30, 31, 32, 33]]
SEEDS = [[sample_seed(index, number) for number in range(5)] for index in range(3)]
FULL = Capabilities(True, True, True, True, True, True, "extended")


@pytest.fixture
def start():
    """Starts servers, which end with the test."""
    servers = []

    def start(port=0, **behaviour):
        servers.append(FakeServer(Behaviour(**behaviour), port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(_servers, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_servers, "_LONGEST_PAUSE", 0.1)


def engine(*servers, tokenizer=None, **kwargs):
    urls = [server.url for server in servers]
    return OpenAIEngine(urls, "m", tokenizer or make_tokenizer(), **kwargs)


def check(completions, tokenizer):
    """What holds for every completion, whatever the server."""
    for completion in completions:
        assert (bool(completion.ids) and completion.ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in completion.ids[:-1]
        assert completion.text == tokenizer.decode(completion.ids, skip_special_tokens=True)


def flat(samples):
    return [completion for group in samples for completion in group]


# What servers can do


def test_ids_in_and_out(start):
    """A server that can do everything: one request per completion with its ids, its seed and no settings of its own."""
    server = start()
    sampler, seen = engine(server), []
    samples = sampler.generate(PREFIXES, SEEDS, SHORT, seen.append)
    assert sampler.capabilities == FULL
    assert [len(group) for group in samples] == [5, 5, 5]
    assert {completion.finish_reason for completion in flat(samples)} == {"stop", "length"}
    check(flat(samples), sampler.tokenizer)
    assert sorted(map(repr, seen)) == sorted(map(repr, flat(samples)))
    asked = sorted((body["prompt"], body["seed"]) for body in server.work)
    assert asked == sorted((ids, seed % 2**31) for ids, seeds in zip(PREFIXES, SEEDS, strict=True) for seed in seeds)
    extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
    assert all(body | extra | {"temperature": 1.0, "top_p": 1.0} == body for body in server.work)
    assert sampler.take_counts() == dict.fromkeys(sampler.take_counts(), 0)


def test_completions_depend_on_their_seed_only(start):
    """Not on the other prefixes, on the order, on how many requests are under way, or on which server answers."""
    servers = [start(), start(delay=0.002)]
    samples = engine(*servers).generate(PREFIXES, SEEDS, SHORT)
    assert all(len(server.work) >= 3 for server in servers)
    other = engine(servers[0], max_concurrency=1)
    assert other.generate(PREFIXES[::-1], [group[::-1] for group in SEEDS[::-1]], SHORT) == [
        group[::-1] for group in samples[::-1]
    ]
    assert other.generate([PREFIXES[1]], [SEEDS[1][2:3]], SHORT) == [samples[1][2:3]]
    assert other.generate(PREFIXES, [[], [], []], SHORT) == [[], [], []]


@pytest.mark.parametrize(
    ("behaviour", "capabilities"),
    [
        ({"token_ids": False}, replace(FULL, token_ids=False)),
        ({"token_prompts": False}, replace(FULL, token_prompts=False)),
        ({"n": False}, replace(FULL, n=False)),
        ({"seeds": False}, replace(FULL, seeds=False)),
        ({"extra_fields": False}, Capabilities(True, False, True, True, True, False, "standard")),
        ({"seed_field": False}, Capabilities(True, False, True, False, True, False, "unseeded")),
        ({"hottest": 1.0}, replace(FULL, n=False, seeds=False, top_k=False)),
        ({"token_prompts": False, "extra_fields": False, "n": False, "seeds": False}, Capabilities(varied=True)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_less_able_servers(start, caplog, behaviour, capabilities):
    """Whatever is missing is found out, replaced, and said; the completions are what they should be."""
    server = start(**behaviour)
    sampler = engine(server)
    samples = sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == capabilities
    check(flat(samples), sampler.tokenizer)
    assert all(isinstance(body["prompt"], list) == capabilities.token_prompts for body in server.work)
    counts = sampler.take_counts()
    assert counts["ids_rebuilt"] == (0 if capabilities.token_ids else 15)
    assert counts["ids_not_round_trip"] == counts["prompts_not_round_trip"] == 0
    assert counts["prompts_as_text"] == (0 if capabilities.token_prompts else 15)
    assert counts["not_repeatable"] == (0 if capabilities.seeds else 15)
    assert counts["settings_unsaid"] == (0 if capabilities.fields == "extended" else 15)
    assert bool(caplog.records) == (capabilities.n or behaviour != {"n": False})
    if capabilities.seeds:
        assert samples == engine(start()).generate(PREFIXES, SEEDS, SHORT)


def test_n_where_seeds_are_ignored(start):
    """Then a request asks for all completions of a prefix, and carries no seed."""
    server = start(seeds=False)
    samples = engine(server).generate(PREFIXES, [[1, 2, 3], [4], [5, 6]], SHORT)
    assert [len(group) for group in samples] == [3, 1, 2]
    assert sorted((body.get("n", 1), "seed" in body) for body in server.work) == [(1, True), (2, False), (3, False)]


def test_capabilities_of_several_servers(start):
    """What all of them can do; each still gets its own kind of prompts."""
    servers = [start(delay=0.002), start(token_prompts=False, delay=0.002), start(n=False, delay=0.002)]
    sampler = engine(*servers)
    samples = sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == replace(FULL, token_prompts=False, n=False)
    assert [{type(body["prompt"]) for body in server.work} for server in servers] == [{list}, {str}, {list}]
    check(flat(samples), sampler.tokenizer)


def test_transformers_serve_gets_its_settings_as_a_generation_config(start):
    """It takes text and this field only; the field switches off the settings of the model's own configuration."""
    server = start(token_prompts=False)
    server.answer = lambda body, number: (422, {}) if "return_token_ids" in body else None
    sampler = engine(server)
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities.fields == "generation_config"
    settings = {"do_sample": True, "repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}
    assert all(json.loads(body["generation_config"]) == settings for body in server.work)


def test_servers_that_do_not_sample(start, caplog):
    """A constant that is not the greedy completion can only be a fault; the greedy one may be the model's certainty."""
    with pytest.raises(RuntimeError, match="same random completion whatever the seed"):
        engine(start(constant="any")).generate(PREFIXES, SEEDS, SHORT)
    engine(start(constant="any")).generate(PREFIXES, SEEDS, replace(SHORT, temperature=0.0))
    engine(start(constant="greedy")).generate(PREFIXES, SEEDS, SHORT)
    assert "ignores the temperature" in caplog.text


def test_sampling_settings(start):
    server = start()
    engine(server).generate(PREFIXES, SEEDS, replace(SHORT, temperature=0.5, top_p=0.9, top_k=7))
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in server.work} == {(0.5, 0.9, 7)}
    with pytest.raises(ValueError, match=r"ignores `top_k`\. Use 0 instead of 7"):
        engine(start(extra_fields=False)).generate(PREFIXES, SEEDS, replace(SHORT, top_k=7))


def test_context(start):
    """The smallest of what is given and what the servers declare bounds the completions."""
    server = start()
    sampler = engine(server, start(models=[{"id": "m", "max_model_len": 300}]))
    sampler.generate([[5] * 290, [5]], [[0], [0]], SamplingConfig(max_new_tokens=20))
    assert sampler.max_context == 300
    assert {(len(body["prompt"]), body["max_tokens"]) for body in server.bodies[-2:]} <= {(290, 10), (1, 20)}
    for prefixes in ([[5], [5] * 300], [[5] * 300, [5]]):
        with pytest.raises(ValueError, match=r"Prefix \d has 300 tokens and leaves no room in .* context of 300"):
            sampler.generate(prefixes, [[0], [0]], SHORT)
    with pytest.raises(ValueError, match="Prefix 0 has 400 tokens and leaves no room"):
        engine(server).generate([[5] * 400], [[0]], SHORT)
    sampler = engine(start(models=None), max_context=8)
    check(flat(sampler.generate([[5] * 6], [[1, 2, 3]], SHORT)), sampler.tokenizer)
    assert max(len(completion.ids) for completion in flat(sampler.generate([[5] * 6], [[1, 2, 3]], SHORT))) <= 2


def test_limits_replace_the_longest(start):
    """Each prefix has its own; the model's context bounds them all the same."""
    server = start()
    sampler = engine(server, max_context=300)
    samples = sampler.generate([[5] * 295, [5], [6]], [[0], [1, 2], []], SHORT, limits=[9, 3, 7])
    assert sorted(body["max_tokens"] for body in server.bodies[-3:]) == [3, 3, 5]
    assert [len(group) for group in samples] == [1, 2, 0]
    with pytest.raises(ValueError, match="`limits` needs one entry per prefix, got 1 for 2 prefixes"):
        sampler.generate([[5], [6]], [[0], [0]], SHORT, limits=[3])


# Ids and text


@pytest.mark.parametrize(
    ("choice", "ids", "finish_reason"),
    [
        ({"token_ids": [70, 71, EOS], "finish_reason": "stop"}, (70, 71, EOS), "stop"),
        ({"token_ids": [70, 71], "finish_reason": "stop"}, (70, 71, EOS), "stop"),
        ({"token_ids": [], "finish_reason": "stop"}, (EOS,), "stop"),
        ({"token_ids": [70, 99], "finish_reason": "stop", "stop_reason": 99}, (70, 99), "stop"),
        ({"token_ids": [70, 99], "finish_reason": "stop", "matched_stop": 99}, (70, 99), "stop"),
        ({"token_ids": [70, 71], "finish_reason": "length"}, (70, 71), "length"),
        ({"token_ids": [70, EOS], "finish_reason": "length"}, (70, EOS), "stop"),
        ({"token_ids": [70, EOS, 71], "finish_reason": "length"}, (70, EOS), "stop"),
        ({"token_ids": None, "text": "ab", "finish_reason": "length"}, "ab", "length"),
        ({"token_ids": None, "text": "", "finish_reason": "stop"}, (EOS,), "stop"),
        ({"token_ids": None, "text": "a<eos>", "finish_reason": "length"}, "a<eos>", "length"),
    ],
)
def test_ends(start, choice, ids, finish_reason):
    """The end token is there if and only if the completion stopped, whatever the server says and leaves out."""
    server = start()
    sampler = engine(server)
    sampler.generate(PREFIXES[:1], [[0]], SHORT)
    server.choice = lambda _: {"text": ""} | choice
    ((completion,),) = sampler.generate(PREFIXES[:1], [[0]], SHORT)
    if isinstance(ids, str):  # as ordinary characters
        ids = tuple(token for character in ids for token in sampler.tokenizer(character).input_ids)
    assert (completion.ids, completion.finish_reason) == (ids, finish_reason)
    assert completion.text == sampler.tokenizer.decode(ids, skip_special_tokens=True)


def test_text_that_does_not_round_trip(start):
    """It is counted, and text and ids of the completion belong together."""
    from tokenizers import normalizers

    server, tokenizer = start(token_ids=False), make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    server.choice = lambda choice: choice | {"text": choice["text"].replace("a", "A")}
    sampler = engine(server, tokenizer=tokenizer)
    samples = flat(sampler.generate(PREFIXES, SEEDS, SHORT))
    check(samples, tokenizer)
    with_a = sum("a" in completion.text for completion in samples)
    counts = sampler.take_counts()
    assert (counts["ids_rebuilt"], counts["ids_not_round_trip"]) == (15, with_a)
    assert with_a > 0
    assert not any(sampler.take_counts().values())


def test_ids_of_a_text_that_begins_with_a_space(start):
    """
    Tokenizers that come from SentencePiece put a space before every text. The ids are those that the text has after its
    prefix, and the prompt is sent as the text that becomes its ids.
    """
    server, tokenizer = start(token_prompts=False, token_ids=False), sentencepiece_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    server.tokenizer, prefix = tokenizer, tokenizer("if x:\n").input_ids
    sampler = engine(server, tokenizer=tokenizer)
    for text in ("  y\n", "y\n", " 4", "第一"):
        server.choice = lambda choice, text=text: choice | {"text": text, "finish_reason": "length"}
        ((completion,),) = sampler.generate([prefix], [[0]], replace(SHORT, temperature=0.0))
        assert completion.text == text
        assert [*prefix, *completion.ids] == tokenizer("if x:\n" + text).input_ids
    assert {body["prompt"] for body in server.work} == {"if x:\n"}
    counts = sampler.take_counts()
    assert (counts["ids_rebuilt"], counts["ids_not_round_trip"], counts["prompts_not_round_trip"]) == (4, 0, 0)


def test_prompts_as_text(start, caplog):
    """Special tokens that the server adds by itself are left out; half a character cannot be sent, which is counted."""
    server, tokenizer = start(token_prompts=False), make_tokenizer(bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 0)])
    server.tokenizer = tokenizer
    half = tokenizer("é", add_special_tokens=False).input_ids[:1]
    sampler = engine(server, tokenizer=tokenizer)
    sampler.generate([tokenizer("ab").input_ids, half], [[1, 2], [3, 4]], SHORT)
    assert {body["prompt"] for body in server.work} == {"ab", tokenizer.decode(half)}
    assert sampler.take_counts()["prompts_not_round_trip"] == 1
    assert "reads or writes" not in caplog.text
    engine(server, tokenizer=tokenizer).generate([half], [[1]], SHORT)
    assert "reads or writes text with other tokens" in caplog.text


# Errors


@pytest.mark.parametrize(
    "faults",
    [[(500, {})], [(429, {})] * 3, [(408, {}), (409, {})], [(503, {"error": "loading"})] * 12, [(200, b"<html>")] * 2],
    ids=["500", "429", "408 409", "503", "HTML"],
)
def test_passing_errors(start, faults):
    """Everything arrives, the same as without errors, and the errors are counted."""
    server = start()
    sampler = engine(server, max_retries=3)
    expected = sampler.generate(PREFIXES, SEEDS, SHORT)
    sampler.take_counts()
    faults = list(faults)
    server.answer = lambda body, number: faults.pop() if faults else None
    number = len(faults)
    assert sampler.generate(PREFIXES, SEEDS, SHORT) == expected
    counts = sampler.take_counts()
    assert counts["retries"] == number
    assert counts["server_errors"] == (0 if number == 12 else number)


GARBAGE = {
    "HTML": b"<html>welcome to the proxy</html>",
    "broken JSON": b'{"choices": [',
    "a list": [1, 2],
    "no choices": {"error": "the model is out"},
    "empty choices": {"choices": []},
    "no text": {"choices": [{"text": None, "finish_reason": "stop"}]},
    "content filter": {"choices": [{"text": "x", "finish_reason": "content_filter"}]},
    "no finish_reason": {"choices": [{"text": "x", "finish_reason": None}]},
    "odd ids": {"choices": [{"text": "x", "finish_reason": "stop", "token_ids": ["x"]}]},
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage(start, garbage):
    """Asked again a few times; then an error that names the server and shows what came back."""
    server = start()
    sampler = engine(server)
    sampler.generate(PREFIXES[:1], [[0]], SHORT)
    before = len(server.bodies)
    server.answer = lambda body, number: (200, garbage)
    with pytest.raises(RuntimeError) as caught:
        sampler.generate(PREFIXES[:1], [[0]], SHORT)
    shown = garbage.decode() if isinstance(garbage, bytes) else json.dumps(garbage)
    assert server.url in str(caught.value)
    assert shown.removeprefix('{"choices": [').rstrip("]}") in str(caught.value)
    assert "Check that `base_urls`" in str(caught.value)
    assert len(server.bodies) == before + 4


@pytest.mark.parametrize(
    ("status", "cure"), [(400, "set `max_context`"), (401, "Check `api_key`"), (404, r"the server lists \['m'\]")]
)
def test_refusals(start, status, cure):
    """No second try; the error has the server's words and a cure."""
    server = start()
    sampler = engine(server)
    sampler.generate(PREFIXES[:1], [[0]], SHORT)
    before = len(server.bodies)
    server.answer = lambda body, number: (status, {"error": {"message": "such is life"}})
    with pytest.raises(RuntimeError, match=f"(?s)127.0.0.1.* status {status}, .*such is life.*{cure}"):
        sampler.generate(PREFIXES[:1], [[0]], SHORT)
    assert len(server.bodies) == before + 1
    with pytest.raises(RuntimeError, match=f"(?s)status {status}, .*such is life.*{cure}"):
        engine(server).generate(PREFIXES[:1], [[0]], SHORT)


def test_lasting_errors(start):
    """Patience ends after `max_retries`."""
    server = start()
    sampler = engine(server, max_retries=2)
    sampler.generate(PREFIXES[:1], [[0]], SHORT)
    before = len(server.bodies)
    server.answer = lambda body, number: (500, {"error": "out of memory"})
    with pytest.raises(RuntimeError, match=r"(?s)127\.0.*after 3 attempts: status 500.*out of memory.*`max_retries`"):
        sampler.generate(PREFIXES[:1], [[0]], SHORT)
    assert len(server.bodies) == before + 3


def test_server_that_never_answers(start):
    """Neither probes nor requests hang."""
    server = start()
    sampler = engine(server, timeout=0.2, max_retries=1)
    sampler.generate(PREFIXES[:1], [[0]], SHORT)
    server.behaviour.delay = 1.0
    with pytest.raises(TimeoutError, match=r"after 2 attempts: no answer within 0\.2 seconds\. Raise `timeout`"):
        sampler.generate(PREFIXES[:1], [[0]], SHORT)
    server.behaviour.delay, server.drip = 0.0, 0.1  # a byte now and then is no answer either
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 seconds"):
        sampler.generate(PREFIXES[:1], [[0]], SHORT)
    server.behaviour.delay, server.drip = 1.0, 0.0
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 seconds"):
        engine(server, timeout=0.2).generate(PREFIXES[:1], [[0]], SHORT)


def test_busy_server(start):
    """It does not count as one that cannot do what was asked for, in the probe either."""
    server, left = start(), [(429, {})] * 4
    server.answer = lambda body, number: left.pop() if left else None
    sampler = engine(server)
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == FULL
    server.answer = lambda body, number: (429, {})
    for impatient in (engine(server, max_retries=2), sampler):
        with pytest.raises(TimeoutError, match=r"status 429.*Raise `max_retries`, or lower `max_concurrency`"):
            impatient.generate(PREFIXES, SEEDS, SHORT)


def test_server_that_fails_on_what_it_does_not_know(start):
    """Not all refuse with a status of their own."""
    server = start()
    server.answer = lambda body, number: (500, {}) if isinstance(body["prompt"], list) else None
    sampler = engine(server)
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == replace(FULL, token_prompts=False)


@pytest.mark.parametrize(("first", "number"), [(0, 3), (0, 6), (3, 3), (10, 9)])
@pytest.mark.parametrize("fault", [(500, {"error": "CUDA warm-up"}), (200, b"<html>")], ids=["500", "HTML"])
def test_faults_that_pass_during_the_probe(start, first, number, fault):
    """They do not count as something that the server cannot do."""
    server = start()
    server.answer = lambda body, at: fault if first <= at < first + number else None
    sampler = engine(server)
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == FULL


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("top_k", 1)])
def test_server_that_fails_on_one_setting(start, name, value):
    """What it fails on every time, though nothing else, it cannot do."""
    server = start()
    server.answer = lambda body, number: (500, {}) if body.get(name) == value else None
    sampler = engine(server)
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == replace(FULL, **{name: False})


def test_server_that_fails_on_everything(start):
    """That is found out by the first form of a request and the plainest one, before all others are tried."""
    server = start()
    server.answer = lambda body, number: (500, {"error": "out of memory"})
    with pytest.raises(RuntimeError, match=r"after 5 attempts: status 500.*out of memory"):
        engine(server).generate(PREFIXES, SEEDS, SHORT)
    assert len(server.bodies) == 10


def test_server_that_takes_ids_for_something_else(start):
    """Such as for text that consists of digits: the number of tokens that it read gives it away."""
    server = start()
    odd = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"prompt_tokens": 17}}
    server.answer = lambda body, number: (200, odd) if isinstance(body["prompt"], list) else None
    sampler = engine(server)
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert sampler.capabilities == replace(FULL, token_prompts=False)


def test_description():
    """Other templates make other prompts, and other end tokens other completions."""

    def describe(**kwargs):
        return OpenAIEngine("http://a", "m", make_tokenizer(**kwargs)).describe()

    plain, one, other = describe(), describe(chat_template="{{ 1 }}"), describe(chat_template="{{ 2 }}")
    assert plain["chat_template"] is None
    assert len({plain["chat_template"], one["chat_template"], other["chat_template"]}) == 3
    assert {**one, "chat_template": None} == plain
    assert (plain["end_tokens"], describe(eos_token="<pad>")["end_tokens"]) == ([EOS], [0])


def test_other_model(start):
    server = start(models=[{"id": "another"}])
    with pytest.raises(ValueError, match=r"serves \['another'\], not `model`='m'"):
        engine(server).generate(PREFIXES, SEEDS, SHORT)


def test_other_tokenizer(start, caplog):
    server = start()
    server.choice = lambda choice: choice | {"text": choice["text"] + "!"}
    engine(server).generate(PREFIXES, SEEDS, SHORT)
    assert "Check that the tokenizer is the model's" in caplog.text


def test_bad_arguments(start, monkeypatch):
    server = start()
    with pytest.raises(ValueError, match="Prefix 1 is empty"):
        engine(server).generate([[5], []], [[0], [0]], SHORT)
    with pytest.raises(ValueError, match="`seeds` needs one entry per prefix, got 1 for 2 prefixes"):
        engine(server).generate([[5], [6]], [[0]], SHORT)
    with pytest.raises(ValueError, match="no `eos_token`"):
        engine(server, tokenizer=make_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="`max_concurrency` must be at least 1, got 0"):
        engine(server, max_concurrency=0)
    with pytest.raises(ValueError, match=r"`timeout` must be positive, got 0\."):
        engine(server, timeout=0.0)
    with pytest.raises(ValueError, match="`base_urls` is empty"):
        engine()
    assert OpenAIEngine("http://a:1/v2/", "m", make_tokenizer()).base_urls == ["http://a:1/v2"]
    assert OpenAIEngine("http://a:1", "m", make_tokenizer()).base_urls == ["http://a:1/v1"]
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install dapo-trl\[openai\]"):
        engine(server)


# Servers that come and go


def test_one_of_two_is_down(start, caplog):
    """The other one does the work, with one warning; the first is probed again behind it, and then takes part."""
    server, port = start(), free_port()
    urls = [server.url, f"http://127.0.0.1:{port}"]
    sampler = OpenAIEngine(urls, "m", make_tokenizer())
    samples = sampler.generate(PREFIXES, SEEDS, SHORT)
    assert caplog.text.count("Cannot reach") == caplog.text.count("Going on with 1 of 2 servers") == 1
    other = start(port=port)
    while not other.work:
        assert sampler.generate(PREFIXES, SEEDS, SHORT) == samples
    assert caplog.text.count("Cannot reach") == 1
    assert f"127.0.0.1:{port}/v1 takes part" in caplog.text
    other.answer = lambda body, number: (503, {})
    assert sampler.generate(PREFIXES, SEEDS, SHORT) == samples
    assert caplog.text.count("Cannot reach") == 2
    sampler = engine(start(delay=1.0), server, timeout=0.2, max_retries=1)
    assert sampler.generate(PREFIXES, SEEDS, SHORT) == samples


def test_all_are_down(start, caplog):
    """An error once `max_downtime` is over; until then, whoever comes back is welcome."""
    port = free_port()
    sampler = OpenAIEngine(f"http://127.0.0.1:{port}", "m", make_tokenizer(), max_downtime=0.3)
    with pytest.raises(ConnectionError, match=f"Gave up on http://127.0.0.1:{port}/v1 .*Check `base_urls`"):
        sampler.generate(PREFIXES, SEEDS, SHORT)
    sampler = OpenAIEngine(f"http://127.0.0.1:{port}", "m", make_tokenizer(), max_downtime=30)
    caplog.clear()
    with ThreadPoolExecutor(1) as executor:
        samples = executor.submit(sampler.generate, PREFIXES, SEEDS, SHORT)
        time.sleep(0.3)
        server = start(port=port)
        samples = samples.result()
    assert samples == engine(start()).generate(PREFIXES, SEEDS, SHORT)
    server.answer = lambda body, number: (503, {})
    sampler._patience = replace(sampler._patience, downtime=0.3)
    with pytest.raises(ConnectionError, match="status 503"):
        sampler.generate(PREFIXES, SEEDS, SHORT)


def test_no_call_waits_for_a_server_that_hangs(start, monkeypatch, caplog):
    """The first one does for a while, as it might only be slow; then it is probed behind the work, by one at a time."""
    monkeypatch.setattr(_pool, "_GRACE", 0.1)
    server, begin = start(), time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as hole:
        sampler = OpenAIEngine([server.url, f"http://127.0.0.1:{hole.getsockname()[1]}"], "m", make_tokenizer())
        samples = sampler.generate(PREFIXES, SEEDS, SHORT)
        for _ in range(10):
            assert sampler.generate(PREFIXES, SEEDS, SHORT) == samples
        assert time.monotonic() - begin < 5
        assert sum(thread.name.startswith("probe of ") for thread in threading.enumerate()) == 1
    assert caplog.text.count("Going on with 1 of 2 servers") == 1
    assert sampler.capabilities == FULL


def test_nobody_has_ever_answered(start, monkeypatch):
    """A wrong address is found out soon, and who starts a server at the same time is told what to set."""
    monkeypatch.setattr(openai_engine, "_FIRST_DOWNTIME", 0.3)
    url, begin = f"http://127.0.0.1:{free_port()}/v1", time.monotonic()
    with pytest.raises(ConnectionError, match=f"{url} .*`server_urls` .*for 0.3 seconds; set `max_downtime` to wait"):
        OpenAIEngine(url, "m", make_tokenizer()).generate(PREFIXES, SEEDS, SHORT)
    assert time.monotonic() - begin < 3
    server, begin = start(), time.monotonic()
    server.answer = lambda body, number: (503, {"error": "loading"}) if time.monotonic() < begin + 0.6 else None
    engine(server).generate(PREFIXES, SEEDS, SHORT)  # one that loads its model has answered
    port = free_port()
    patient = OpenAIEngine(f"http://127.0.0.1:{port}", "m", make_tokenizer(), max_downtime=30)
    with ThreadPoolExecutor(1) as executor:
        samples = executor.submit(patient.generate, PREFIXES, SEEDS, SHORT)
        time.sleep(0.6)
        start(port=port)
        assert len(samples.result()) == 3


def test_downtime_counts_from_when_nobody_can_be_reached(monkeypatch):
    """Time that went by with other failures, such as two timeouts of ten minutes, is not waited for a server."""
    now, events = [0.0], [("timeout", 600), ("timeout", 600), ("unreachable", 0), ("lost", 0), ("unreachable", 400)]
    events += [("unreachable", 300), ("unreachable", 300)]
    transport, server = _servers.Transport("none", 600, lambda name: None), _servers.Server("http://a", None)
    server.client = types.SimpleNamespace(completions=openai_engine)

    async def send(server, call, **kwargs):
        kind, seconds = events.pop(0)
        now[0] += seconds
        raise _servers.Failure(kind, kind)

    async def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(openai_engine, "with_raw_response", types.SimpleNamespace(create=None), raising=False)
    monkeypatch.setattr(transport, "_send", send)
    monkeypatch.setattr(_servers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_servers.asyncio, "sleep", sleep)
    patience = _servers.Patience(8, 8, 3, 8, downtime=600.0)
    coroutine = transport.ask([server], lambda capabilities: {}, patience)
    with pytest.raises(ConnectionError, match="after 7 attempts"):
        coroutine.send(None)
    assert not events


def test_requests_under_way(start):
    """Never more than `max_concurrency`, and shared evenly."""
    servers = [start(delay=0.01), start(delay=0.01)]
    engine(*servers, max_concurrency=6).generate(PREFIXES, [list(range(20))] * 3, SHORT)
    for server in servers:
        assert 2 <= server.most_in_flight <= 4
        assert 10 <= len(server.work) <= 50
    sampler = engine(servers[0], max_concurrency=3)
    servers[0].most_in_flight = 0
    sampler.generate(PREFIXES, SEEDS, SHORT)
    assert servers[0].most_in_flight <= 3


def test_anywhere(start):
    """In a notebook's running loop, in several threads at once."""
    sampler = engine(start())
    expected = sampler.generate(PREFIXES, SEEDS, SHORT)

    async def notebook():
        with pytest.raises(ValueError, match="ignores"):
            engine(start(extra_fields=False)).generate(PREFIXES, SEEDS, replace(SHORT, top_k=7))
        return sampler.generate(PREFIXES, SEEDS, SHORT)

    assert asyncio.run(notebook()) == expected
    with ThreadPoolExecutor(4) as executor:
        calls = [executor.submit(sampler.generate, PREFIXES, SEEDS, SHORT) for _ in range(8)]
        assert all(call.result() == expected for call in calls)


def test_counts_are_those_of_the_calling_thread(start):
    """Shards are worked on in threads, and each says what came of its own completions; servers are probed once."""
    server = start(token_ids=False, delay=0.002)
    sampler = engine(server)

    def call(number):
        sampler.generate(PREFIXES, [list(range(number))] * 3, SHORT)
        time.sleep(0.05)
        return sampler.take_counts()["ids_rebuilt"]

    with ThreadPoolExecutor(3) as executor:
        assert list(executor.map(call, [1, 5, 20])) == [3, 15, 60]
    alone = start(token_ids=False)
    engine(alone).generate(PREFIXES, [[0]] * 3, SHORT)
    assert len(server.bodies) - len(server.work) == len(alone.bodies) - len(alone.work)


def test_failing_servers_are_probed_for_one_of_several_calls(start):
    """The others get the same error at once."""
    server = start(delay=0.05)
    server.answer = lambda body, number: (500, {})
    sampler = engine(server)
    with ThreadPoolExecutor(3) as executor:
        calls = [executor.submit(sampler.generate, PREFIXES, SEEDS, SHORT) for _ in range(3)]
        assert all(isinstance(call.exception(), RuntimeError) for call in calls)
    assert len(server.bodies) == 10


@pytest.fixture
def interruptible():
    """Ctrl-C raises: it is ignored in what a shell starts in the background."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize("in_loop", [False, True])
def test_an_interrupt_ends_everything(start, in_loop, interruptible):
    """Ctrl-C stops the requests that are under way, in a notebook too; so does an error from inside."""
    server, loop = start(delay=0.02), asyncio.new_event_loop()
    sampler, seen = engine(server, max_concurrency=2), []

    def once(act):
        seen.clear()
        return lambda completion: seen.append(completion) or len(seen) > 1 or act()

    def fail():
        raise LookupError

    async def notebook(on_completion):
        return sampler.generate(PREFIXES, [list(range(50))] * 3, SHORT, on_completion)

    for act, error in ((lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt), (fail, LookupError)):
        with pytest.raises(error):
            if in_loop:
                loop.run_until_complete(notebook(once(act)))
            else:
                sampler.generate(PREFIXES, [list(range(50))] * 3, SHORT, once(act))
    assert len(server.work) < 20
    loop.close()


# A real server

PROBLEM = "4 - 7 + 8 max 2 min 9 - 1\n"
STATES = [PROBLEM, PROBLEM + "4 - 7 = 7\n", PROBLEM + "4 - 7 = 3\n3 + 8 = 1\n"]


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    pytest.importorskip("fastapi")
    server = Student(tmp_path_factory.mktemp("serve"))
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def student_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STUDENT)


def sample(student, tokenizer, number, temperature=1.0, max_new_tokens=40, **kwargs):
    sampler = OpenAIEngine(student.url, "examples/student", tokenizer, **kwargs)
    prefixes = [tokenizer(state).input_ids for state in STATES]
    seeds = [[sample_seed(state, index) for index in range(number)] for state in STATES]
    return sampler, sampler.generate(prefixes, seeds, SamplingConfig(max_new_tokens, temperature=temperature))


def success_rate(completions):
    """Rate of right answers and the half width of its 95% interval."""
    rewards = math_reward(None, completions, ["4"] * len(completions))
    mean = sum(rewards) / len(rewards)
    return mean, 1.96 * (max(mean * (1 - mean), 0.01) / len(rewards)) ** 0.5


def test_transformers_serve(student, student_tokenizer):
    """Completions come out, are what the model itself gives, and are counted as rebuilt from text."""
    from transformers import AutoModelForCausalLM

    sampler, samples = sample(student, student_tokenizer, 50, max_concurrency=1)
    assert sampler.name == "student"
    counts = sampler.take_counts()
    assert counts == dict.fromkeys(counts, 0) | {"ids_rebuilt": 150, "prompts_as_text": 150}
    check(flat(samples), student_tokenizer)
    _, greedy_samples = sample(student, student_tokenizer, 1, temperature=0.0)
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    for state, group, (greedy,) in zip(STATES, samples, greedy_samples, strict=True):
        inputs = student_tokenizer(state, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        assert greedy.ids == tuple(output[0, inputs.input_ids.shape[1] :].tolist())
        torch.manual_seed(0)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=True, num_return_sequences=300)
        texts = student_tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        ours, width = success_rate([completion.text for completion in group])
        theirs, their_width = success_rate(texts)
        assert abs(ours - theirs) <= width + their_width
        assert sum(completion.finish_reason == "stop" for completion in group) >= 45


def test_transformers_serve_repeats_one_by_one(student, student_tokenizer):
    """With one request at a time, its global seed gives the same completions again; with several, it does not."""
    runs = [sample(student, student_tokenizer, 5, max_new_tokens=26, max_concurrency=1) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    check(flat(runs[0][1]), student_tokenizer)
    assert {completion.finish_reason for completion in flat(runs[0][1])} == {"stop", "length"}
    sampler, _ = sample(student, student_tokenizer, 1)
    expected = Capabilities(varied=True, top_k=True, fields="generation_config")
    assert sampler.capabilities == expected
    assert runs[0][0].capabilities == replace(expected, seeds=True)


def test_a_restart_in_between(student, student_tokenizer, caplog):
    """The server is killed while it works and started again: everything arrives."""
    sampler = OpenAIEngine(student.url, "examples/student", student_tokenizer, max_concurrency=8)
    prefixes = [student_tokenizer(state).input_ids for state in STATES]
    seen = []

    def restart(completion):
        seen.append(completion)
        if len(seen) == 10:
            student.kill()
            student.start()

    samples = sampler.generate(prefixes, [list(range(8))] * 3, SamplingConfig(max_new_tokens=40), restart)
    assert [len(group) for group in samples] == [8, 8, 8]
    check(flat(samples), student_tokenizer)
    assert len(seen) == 24
    assert sampler.take_counts()["retries"] > 0
    assert caplog.text.count("Cannot reach") == caplog.text.count("/v1 is back") == 1
