"""
What the tests share: tiny models and a tokenizer built in memory, rows made by hand or at random, and where data lie.
"""

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network, and none may wait for one
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[1]
STUDENT = REPOSITORY / "examples" / "student"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


SAMPLE = [  # texts with lines, indentation and characters of several bytes
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = 72 clips.\n#### 72",
    "First, add:\n\n  2 + 2 = 4.\n\n\nThen ∑ x² ≤ 7 — done.\n#### 4",
    "def f(x):\n    return x\n\n\ndef g(x):\n\treturn f(x)\n",
    "\n\nLeading lines, trailing spaces.  \n 中文推理：\n第一步。😀👍🏽\n",
]


def slow(*values, **options):
    """Parameters of a variant that the default tests leave to `make test-slow`: its siblings are among them."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def make_tokenizer(chat_template: str | None = None, **special_tokens: str | None):
    """A byte-level tokenizer without merges: any text goes in and comes out unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>"} | special_tokens
    tokens = {name: token for name, token in tokens.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = chat_template
    return tokenizer


def sentencepiece_tokenizer(texts=SAMPLE, vocab_size=200):
    """BPE as in Llama 2: spaces are ▁, unknown characters and newlines are byte tokens, the first space is dropped."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = sorted({char for text in texts for char in text.replace(" ", "▁") if char.isascii() and char != "\n"})
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = _merges(texts, pieces, vocab_size)
    vocab = {token: i for i, token in enumerate([*specials, "▁", *(p for p in pieces if p != "▁"), *merged.values()])}
    backend.model = models.BPE(vocab=vocab, merges=list(merged), byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _merges(texts, pieces, number):
    """The most frequent pairs of neighbouring characters, as merges."""
    pairs = {}
    for text in texts:
        text = "▁" + text.replace(" ", "▁")
        for pair in pairwise(text):
            if set(pair) <= {*pieces, "▁"}:
                pairs[pair] = pairs.get(pair, 0) + 1
    frequent = sorted(pairs, key=lambda pair: -pairs[pair])[:number]
    return {pair: "".join(pair) for pair in frequent}


class ScriptedEngine:
    """
    Gives each prefix the completions written down for it, over and over; `~` stands for a cut at the length limit.

    `requests` has the prefix of every completion that was asked for, `limits` the most tokens by prefix.
    """

    name = "script"
    num_calls = 1

    def __init__(self, script: dict[str, list[str]]):
        self.tokenizer = make_tokenizer()
        self.script = script
        self.requests: list[str] = []
        self.limits: dict[str, int] = {}

    def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
        texts = [self.tokenizer.decode(prefix) for prefix in prefixes]
        self.limits |= zip(texts, limits or [sampling.max_new_tokens] * len(texts), strict=True)
        return [
            [shortened(self.draw(text), self.limits[text], self.tokenizer) for _ in own]
            for text, own in zip(texts, seeds, strict=True)
        ]

    def draw(self, prefix: str):
        from dapo_trl.engines import Completion

        text = self.script[prefix][self.requests.count(prefix) % len(self.script[prefix])]
        self.requests.append(prefix)
        cut = text.endswith("~")
        text = text.removesuffix("~")
        ids = self.tokenizer(text).input_ids + ([] if cut else [self.tokenizer.eos_token_id])
        return Completion(tuple(ids), text, "length" if cut else "stop")

    def describe(self):
        return {"engine": "script"}

    def take_counts(self):
        return {}


def shortened(completion, limit: int, tokenizer):
    """What is left of a completion that must not have more tokens than `limit`."""
    from dapo_trl.engines import Completion

    if len(completion.ids) <= limit:
        return completion
    ids = completion.ids[:limit]
    return Completion(ids, tokenizer.decode(ids, skip_special_tokens=True), "length")


def answer_reward(prompts, completions, answer, **kwargs):
    """1 if the text ends with the answer, 0 if not, None if it says that nobody can know."""
    return [
        None if "?" in text else float(text.endswith(right)) for text, right in zip(completions, answer, strict=True)
    ]


def tiny_config(architecture: str = "llama", **kwargs):
    """Configuration of a tiny model for the tests' tokenizer."""
    import transformers

    names = {"gemma": "Gemma", "gemma2": "Gemma2", "gpt_neox": "GPTNeoX", "llama": "Llama", "mistral": "Mistral"}
    names |= {"qwen2": "Qwen2", "qwen3": "Qwen3"}
    config_class = getattr(transformers, f"{names[architecture]}Config")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture != "gpt_neox":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    defaults = {"vocab_size": 258, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1}
    return config_class(**(sizes | defaults | {"pad_token_id": 0} | kwargs))


def make_policy(architecture: str = "llama", seed: int = 0, **kwargs):
    """A tiny causal language model with random weights, far enough from uniform to be a good test."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, initializer_range=0.2, **kwargs))
    return model.float().eval()


def make_critic(architecture: str = "llama", seed: int = 0, **kwargs):
    """A tiny step critic with random weights."""
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(seed)
    config = tiny_config(architecture, initializer_range=0.2, num_labels=1, **kwargs)
    return AutoModelForTokenClassification.from_config(config).float().eval()


def random_state_rows(num_rows: int, seed: int = 0) -> list[dict]:
    """State rows of random words: prompts, prefixes and numbers of candidates all differ in length."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        candidates = {random_step(rng) for _ in range(rng.randint(2, 4))} | {"one more\n"}
        rows.append(
            {
                "prompt": f"{random_step(rng)}?\n",
                "prefix": [random_step(rng) for _ in range(rng.randint(0, 3))],
                "candidates": sorted(candidates),
                "advantages": [rng.uniform(-1, 1) for _ in candidates],
                "counts": [rng.randint(1, 5) for _ in candidates],
            }
        )
    return rows


def random_solution_rows(num_rows: int, seed: int = 0) -> list[dict]:
    """Solution rows of random words with counts behind their values."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        steps = [random_step(rng) for _ in range(rng.randint(1, 4))]
        rollouts = [rng.randint(1, 16) for _ in range(len(steps) + 1)]
        successes = [float(rng.randint(0, count)) for count in rollouts]
        rows.append(
            {
                "prompt": f"{random_step(rng)}?\n",
                "completions": steps,
                "values": [won / count for won, count in zip(successes, rollouts, strict=True)],
                "mc_successes": successes,
                "mc_rollouts": rollouts,
            }
        )
    return rows


def random_step(rng: random.Random) -> str:
    return (
        " ".join(rng.choice(["so", "then", "7", "is", "über", "12", "+", "="]) for _ in range(rng.randint(1, 6))) + "\n"
    )


@pytest.fixture(scope="session")
def commands():
    """Starts the command `dapo-trl` in processes of its own."""
    from commands import Commands

    with Commands() as commands:
        yield commands


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def quick_fingerprints():
    """No cache names for data sets in memory: `datasets` disassembles functions for them, half the time of a test."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        for module in (datasets.fingerprint, datasets.arrow_dataset):
            patch.setattr(module, "update_fingerprint", lambda *_: datasets.fingerprint.generate_random_fingerprint())
        yield


@pytest.fixture
def data_dir() -> Path:
    """
    Folder with the public data sets. They stay outside the repository; tests that read them skip where they are absent.
    """
    path = Path(os.environ.get("DAPO_TRL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"the data sets are not at {path}; set DAPO_TRL_DATA to where they are")
    return path
