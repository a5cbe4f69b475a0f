"""
`engines/transformers.py`: sampling follows the policy's own distribution, ends where the policy ends, repeats by seed.
"""

from collections import Counter

import pytest
import torch

from conftest import make_policy, make_tokenizer
from dapo_trl import TransformersEngine
from dapo_trl.engines import SamplingConfig


EOS = 1
PREFIXES = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41]]


def engine(batch_size=8, **kwargs) -> TransformersEngine:
    return TransformersEngine(make_policy(**kwargs), make_tokenizer(), batch_size)


def greedy_loop(model, prefix, steps):
    """Greedy decoding of one unpadded sequence without a cache."""
    ids = list(prefix)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prefix) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_a_plain_loop(batch_size):
    """Prefixes of different lengths, padded and sorted, come back in their own order."""
    sampler = engine(batch_size)
    samples = sampler.generate(PREFIXES, 1, SamplingConfig(max_new_tokens=12, temperature=0), seed=0)
    for prefix, (completion,) in zip(PREFIXES, samples, strict=True):
        assert list(completion.ids) == greedy_loop(sampler.model, prefix, 12)


def test_finish_reasons():
    """A completion ends with the end token and stops, or has the full length and was cut."""
    completions = [c for group in engine().generate(PREFIXES, 64, SamplingConfig(max_new_tokens=40), 0) for c in group]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in completion.ids[:-1]
        assert 0 not in completion.ids or completion.finish_reason == "length" or completion.ids.index(0) < 39
        if completion.finish_reason == "length":
            assert len(completion.ids) == 40
        assert "<eos>" not in completion.text


def test_seeds():
    """The same seed repeats; another one does not; the caller's random state is left alone."""
    sampler, sampling = engine(), SamplingConfig(max_new_tokens=8)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = sampler.generate(PREFIXES, 4, sampling, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert sampler.generate(PREFIXES, 4, sampling, seed=0) == first
    assert sampler.generate(PREFIXES, 4, sampling, seed=1) != first
    ids = [completion.ids for group in first for completion in group]
    assert len(set(ids)) > len(ids) // 2  # batches do not repeat each other


def test_distribution_is_the_policys():
    """
    First tokens follow the softmax at temperature 1, although the model's own generation defaults would change it.
    """
    sampler = engine(batch_size=512)
    declared = sampler.model.generation_config
    declared.repetition_penalty, declared.top_k, declared.temperature, declared.top_p = 5.0, 3, 0.3, 0.5
    prefix, n = [10, 11, 12], 4096
    samples = sampler.generate([prefix], n, SamplingConfig(max_new_tokens=1), seed=0)[0]
    with torch.no_grad():
        expected = torch.softmax(sampler.model(torch.tensor([prefix])).logits[0, -1], dim=-1)
    counts = Counter(completion.ids[0] for completion in samples)
    observed = torch.tensor([counts[token] / n for token in range(len(expected))])
    assert 0.5 * (observed - expected).abs().sum() < 0.15  # total variation; with 3 tokens left it would be near 1
    top = expected.topk(5)
    error = (observed[top.indices] - top.values).abs()
    assert (error < 5 * (top.values * (1 - top.values) / n).sqrt()).all()


def test_top_k_and_temperature_apply_when_asked_for():
    sampler = engine(batch_size=256)
    samples = sampler.generate([[10, 11]], 256, SamplingConfig(max_new_tokens=1, top_k=2), seed=0)[0]
    assert len({completion.ids for completion in samples}) == 2


def test_every_declared_end_token_ends():
    """Chat models declare a second end token in their generation config: a completion ends at either."""
    sampler = engine()
    sampler.model.generation_config.eos_token_id = [EOS, 77]
    sampler = TransformersEngine(sampler.model, sampler.tokenizer, 8)
    assert sampler.eos_token_ids == [EOS, 77]
    completions = [c for group in sampler.generate(PREFIXES, 64, SamplingConfig(max_new_tokens=60), 0) for c in group]
    assert {c.ids[-1] for c in completions if c.finish_reason == "stop"} == {EOS, 77}


def test_context_bounds_the_completion():
    """A completion cannot run beyond the model's context; it is then cut, not an error."""
    sampler = engine(max_position_embeddings=16)
    samples = sampler.generate([[5] * 10], 8, SamplingConfig(max_new_tokens=100), seed=0)[0]
    assert max(len(completion.ids) for completion in samples) <= 6


def test_bad_input():
    sampler = engine(max_position_embeddings=16)
    with pytest.raises(ValueError, match="Prefix 1 has 16 tokens and leaves no room in the model's context of 16"):
        sampler.generate([[5], [5] * 16], 1, SamplingConfig(), seed=0)
    with pytest.raises(ValueError, match="Prefix 0 is empty"):
        sampler.generate([[]], 1, SamplingConfig(), seed=0)
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        sampler.generate([[5]], 0, SamplingConfig(), seed=0)
    with pytest.raises(ValueError, match="no `eos_token`"):
        TransformersEngine(make_policy(), make_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        TransformersEngine(make_policy(), make_tokenizer(), 0)


def test_training_mode_is_restored():
    sampler = engine()
    sampler.model.train()
    sampler.generate([[5]], 1, SamplingConfig(max_new_tokens=1), seed=0)
    assert sampler.model.training
