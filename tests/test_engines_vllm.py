"""
`engines/vllm.py`: what goes to vLLM and what is made of its answers, with a stand-in for vLLM's documented classes.
"""

import random
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer

from conftest import STUDENT, make_tokenizer
from dapo_trl.engines import SamplingConfig
from dapo_trl.engines.vllm import VLLMEngine


EOS = 1
PREFIXES = [[10, 11, 12], [20], [30, 31]]
SEEDS = [[5, 6], [], [2**62, 5, 7]]


@dataclass
class SamplingParams:
    """The fields of `vllm.SamplingParams` that count here, with vLLM's defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    detokenize: bool = True


@dataclass
class LLM:
    """`vllm.LLM` with random completions; tests may fix the next ones in `outputs`."""

    model: str
    tokenizer: str | None = None
    enable_prefix_caching: bool | None = None
    max_model_len: int | None = None
    calls: list = field(default_factory=list)
    outputs: list = field(default_factory=list)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert len(prompts) == len(sampling_params)
        self.calls.append((prompts, sampling_params))
        return [
            SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[self.output(prompt, params)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def output(self, prompt, params):
        if self.outputs:
            return completion_output(*self.outputs.pop(0))
        rng = random.Random(f"{prompt['prompt_token_ids']} {params.seed}")
        ids = [rng.randrange(2, 258) for _ in range(rng.randrange(2 * params.max_tokens))] + [EOS]
        return completion_output(ids[: params.max_tokens], "stop" if len(ids) <= params.max_tokens else "length")


def completion_output(token_ids, finish_reason, stop_reason=None):
    return SimpleNamespace(
        index=0, text="", token_ids=token_ids, finish_reason=finish_reason, stop_reason=stop_reason, logprobs=None
    )


@pytest.fixture
def engine(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return VLLMEngine("some/model", make_tokenizer(), max_model_len=512)


def test_requests(engine):
    """One request per completion, with its own seed, in the order of the seeds."""
    engine.generate(PREFIXES, SEEDS, SamplingConfig(max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=3))
    ((prompts, settings),) = engine.llm.calls
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [PREFIXES[0]] * 2 + [PREFIXES[2]] * 3
    assert [params.seed for params in settings] == [5, 6, 2**62, 5, 7]
    expected = SamplingParams(temperature=0.5, top_p=0.9, top_k=3, max_tokens=9, seed=5)
    expected.stop_token_ids, expected.detokenize = [EOS], False
    assert settings[0] == expected
    assert engine.llm.enable_prefix_caching is True
    assert engine.llm.max_model_len == 512


def test_limits_replace_the_longest(engine):
    engine.generate(PREFIXES, SEEDS, SamplingConfig(max_new_tokens=9), limits=[3, 5, 12])
    (_, settings) = engine.llm.calls[0]
    assert [params.max_tokens for params in settings] == [3] * 2 + [12] * 3


def test_neutral_settings_are_said(engine):
    """What is off is passed as off."""
    engine.generate([[5]], [[0]], SamplingConfig())
    (params,) = engine.llm.calls[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, -1, 1024)


def test_completions(engine):
    """Each belongs to its prefix and seed; it ends with the end token if and only if it stopped."""
    seen, seeds = [], [list(range(40)), [], [3]]
    samples = engine.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=12), seen.append)
    assert [len(group) for group in samples] == [40, 0, 1]
    assert {completion.finish_reason for completion in samples[0]} == {"stop", "length"}
    for completion in samples[0] + samples[2]:
        assert (completion.ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert completion.text == engine.tokenizer.decode(completion.ids, skip_special_tokens=True)
    assert seen == samples[0] + samples[2]
    assert engine.generate(PREFIXES, [[], [], [3]], SamplingConfig(max_new_tokens=12))[2] == samples[2]
    assert engine.take_counts() == {}


def test_ends(engine):
    """The end token is there after a stop, once; another end token of the model stays as it is."""
    engine.llm.outputs = [([70, 71, EOS], "stop"), ([70, 71], "stop"), ([], "stop"), ([70, 72], "stop", 72)]
    engine.llm.outputs += [([70, 71], "length")]
    (samples,) = engine.generate([[5]], [[0, 1, 2, 3, 4]], SamplingConfig())
    assert [sample.ids for sample in samples] == [(70, 71, EOS), (70, 71, EOS), (EOS,), (70, 72), (70, 71)]


def test_end_tokens(engine, tmp_path):
    """vLLM is told all of them, and a completion is cut at the first, even if it was not."""
    engine.llm.outputs = [([70, EOS, 71], "length"), ([70, EOS], "length")]
    ((first, second),) = engine.generate([[5]], [[0, 1]], SamplingConfig())
    assert (first.ids, first.finish_reason) == (second.ids, second.finish_reason) == ((70, EOS), "stop")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 77]}')
    chat = VLLMEngine(str(tmp_path), make_tokenizer(chat_template="{{ 1 }}"))
    chat.llm.outputs = [([70, 77], "stop"), ([70, 77, 71], "length")]
    ((first, second),) = chat.generate([[5]], [[0, 1]], SamplingConfig())
    assert first.ids == second.ids == (70, 77)
    assert chat.llm.calls[0][1][0].stop_token_ids == [EOS, 77]
    assert (engine.describe()["end_tokens"], chat.describe()["end_tokens"]) == ([EOS], [EOS, 77])
    assert engine.describe()["chat_template"] != chat.describe()["chat_template"]


def test_the_tokenizer_that_vllm_takes(engine, monkeypatch):
    """Of the same revision, and from another place if vLLM is told so; none is loaded if one is given."""
    loaded = []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, **kwargs: loaded.append((name, kwargs)) or make_tokenizer()
    )
    VLLMEngine("a", make_tokenizer(), revision="main")
    VLLMEngine("a", revision="v2", trust_remote_code=True)
    VLLMEngine("a", "b", revision="v2")
    VLLMEngine("a", tokenizer="b", tokenizer_revision="v3")
    assert loaded == [
        ("a", {"revision": "v2", "trust_remote_code": True}),
        ("b", {"revision": None, "trust_remote_code": False}),
        ("b", {"revision": "v3", "trust_remote_code": False}),
    ]
    assert VLLMEngine("a", "b").llm.tokenizer == "b"
    assert engine.llm.tokenizer is None


def test_bad_input_and_output(engine, monkeypatch):
    with pytest.raises(ValueError, match="Prefix 1 is empty"):
        engine.generate([[5], []], [[0], [0]], SamplingConfig())
    with pytest.raises(ValueError, match="Prefix 1 has 512 tokens and leaves no room in the model's context of 512"):
        engine.generate([[5], [5] * 512], [[0], [0]], SamplingConfig())
    with pytest.raises(ValueError, match="`seeds` needs one entry per prefix, got 1 for 2 prefixes"):
        engine.generate([[5], [6]], [[0]], SamplingConfig())
    with pytest.raises(ValueError, match="Prefix 1 has the limit 0"):
        engine.generate([[5], [6]], [[0], [0]], SamplingConfig(), limits=[1, 0])
    engine.llm.outputs = [([70], "abort")]
    with pytest.raises(RuntimeError, match="reason 'abort'"):
        engine.generate([[5]], [[0]], SamplingConfig())
    assert engine.generate([[5]], [[]], SamplingConfig()) == [[]]
    with pytest.raises(ValueError, match="no `eos_token`"):
        VLLMEngine("some/model", make_tokenizer(eos_token=None))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install dapo-trl\[vllm\]"):
        VLLMEngine("some/model", make_tokenizer())


def test_tokenizer_and_name_come_from_the_model(engine):
    student = VLLMEngine(str(STUDENT), enable_prefix_caching=False)
    assert student.tokenizer.eos_token_id == EOS
    assert (engine.name, student.name) == ("some/model", "student")
    assert student.llm.enable_prefix_caching is False


def test_the_description_tells_weights_apart_and_loads_none(engine, tmp_path):
    """A finished stage asks for the description only; two policies of the same folder name differ by their weights."""
    assert "weights" not in engine.describe()
    described = []
    for part in ("first", "second"):
        (tmp_path / part / "policy").mkdir(parents=True)
        (tmp_path / part / "policy" / "model.safetensors").write_text(part)
        policy = VLLMEngine(str(tmp_path / part / "policy"), make_tokenizer())
        described.append(policy.describe())
        assert "llm" not in vars(policy)
    assert described[0]["model"] == described[1]["model"]
    assert described[0]["weights"] != described[1]["weights"]
