"""
`engines/transformers.py`: sampling follows the policy's own distribution, ends where the policy ends, repeats by seed.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch

import reference
from conftest import make_policy, make_tokenizer
from dapo_trl import TransformersEngine
from dapo_trl.engines import SamplingConfig, sample_seed
from dapo_trl.engines._decoding import inverse_cdf, reads_common_inputs


EOS = 1
PREFIXES = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41]]
SLIDING = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


def engine(architecture="llama", batch_size=8, **kwargs) -> TransformersEngine:
    return TransformersEngine(make_policy(architecture, **kwargs), make_tokenizer(), batch_size)


def make_other(name: str):
    """A tiny model of an architecture that differs in its inputs or in its cache."""
    import transformers

    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.2}
    own = {
        "Bloom": {"n_layer": 2, "n_head": 2},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24},
        "Mamba": {"state_size": 4},
        "Qwen3Next": {
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 0,
        },
    }
    config = getattr(transformers, f"{name}Config")(**(sizes | {"bos_token_id": None, "eos_token_id": 1} | own[name]))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def seeds_for(prefixes, n, seed=0):
    return [[sample_seed(seed, tuple(prefix), number) for number in range(n)] for prefix in prefixes]


def ids_of(samples):
    return [[completion.ids for completion in group] for group in samples]


def next_logits(model, ids):
    """Logits of the next token by a plain forward pass over one sequence, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def record_shapes(model):
    """Shapes of what goes through the model from now on."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def greedy(model, prefix, steps):
    """What `generate` makes of one prefix, without the settings that a model declares."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prefix]),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    return tuple(output[0, len(prefix) :].tolist())


def assert_follows_reference(model, prefix, seed, ids):
    """Every token is the one that number t of the seed's stream picks from a plain forward pass."""
    uniforms = np.random.Generator(np.random.Philox(key=seed)).random(len(ids))
    for step, token in enumerate(ids):
        logits = next_logits(model, [*prefix, *ids[:step]]).double().tolist()
        assert token == reference.sample_reference(logits, float(uniforms[step]))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "gpt_neox"])
def test_greedy_equals_generate(architecture, batch_size):
    """Prefixes of different lengths, padded and sorted, come back in their own order."""
    sampler = engine(architecture, batch_size)
    assert reads_common_inputs(sampler.model)
    samples = sampler.generate(PREFIXES, seeds_for(PREFIXES, 1), SamplingConfig(max_new_tokens=12, temperature=0))
    for prefix, (completion,) in zip(PREFIXES, samples, strict=True):
        assert completion.ids == greedy(sampler.model, prefix, 12)


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")],
)
def test_every_token_is_what_its_number_picks(architecture, implementation):
    """
    Batches, padding, shared prefixes and the cache change nothing; nor do sliding windows, shorter than the sequences.
    """
    sampler = engine(architecture, attn_implementation=implementation, **SLIDING.get(architecture, {}))
    assert reads_common_inputs(sampler.model)
    seeds = seeds_for(PREFIXES, 3)
    samples = sampler.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=10))
    for prefix, group, own_seeds in zip(PREFIXES, samples, seeds, strict=True):
        for completion, seed in zip(group, own_seeds, strict=True):
            assert_follows_reference(sampler.model, prefix, seed, completion.ids)


@pytest.mark.parametrize(("name", "common"), [("Bloom", False), ("GPT2", True), ("Mamba", False), ("Qwen3Next", True)])
def test_other_architectures(name, common):
    """Positions that are learned, position biases, states instead of keys: in the loop, or through `generate`."""
    model = make_other(name)
    assert reads_common_inputs(model) is common
    model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 3
    sampler = TransformersEngine(model, make_tokenizer(), 8)
    seeds, seen = seeds_for(PREFIXES, 4), []
    samples = sampler.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=18), seen.append)
    assert len(seen) == 16
    for prefix, group, own_seeds in zip(PREFIXES, samples, seeds, strict=True):
        for completion, seed in zip(group, own_seeds, strict=True):
            assert_follows_reference(model, prefix, seed, completion.ids)
            assert (completion.finish_reason == "stop") == (completion.ids[-1] == EOS)
            assert completion.finish_reason == "stop" or len(completion.ids) == 18


def test_half_precision():
    """Probabilities are computed in float32 whatever the model's type; the same call gives the same completions."""
    model = make_policy().bfloat16()
    sampler, seeds = TransformersEngine(model, make_tokenizer(), 8), seeds_for(PREFIXES, 4)
    samples = sampler.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=12))
    assert sampler.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=12)) == samples
    (first,) = sampler.generate([[20]], [[3]], SamplingConfig(max_new_tokens=1))
    assert_follows_reference(model, [20], 3, first[0].ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_what_the_cpu_draws():
    sampling, seeds = SamplingConfig(max_new_tokens=12), seeds_for(PREFIXES, 8)
    on_gpu = TransformersEngine(make_policy().cuda(), make_tokenizer(), 8)
    assert on_gpu.generate(PREFIXES, seeds, sampling) == engine().generate(PREFIXES, seeds, sampling)


def test_adapters():
    """A fresh LoRA adapter changes nothing, and its model runs in the loop too."""
    from peft import LoraConfig, get_peft_model

    sampling, seeds = SamplingConfig(max_new_tokens=8), seeds_for(PREFIXES, 3)
    expected = engine().generate(PREFIXES, seeds, sampling)
    adapted = get_peft_model(make_policy(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert reads_common_inputs(adapted)
    assert TransformersEngine(adapted, make_tokenizer(), 8).generate(PREFIXES, seeds, sampling) == expected


def test_finish_reasons():
    """A completion ends with the end token and stops, or has the full length and was cut."""
    samples = engine(batch_size=64).generate(PREFIXES, seeds_for(PREFIXES, 64), SamplingConfig(max_new_tokens=40))
    completions = [completion for group in samples for completion in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in completion.ids[:-1]
        assert completion.finish_reason == "stop" or len(completion.ids) == 40
        assert "<eos>" not in completion.text


def test_same_seed_same_completion():
    """Whatever else is in the batch, and however large it is. Other seeds give other completions."""
    sampling, seeds = SamplingConfig(max_new_tokens=16), seeds_for(PREFIXES, 5)
    expected = engine(batch_size=64).generate(PREFIXES, seeds, sampling)
    for batch_size in (1, 3, 7):
        assert engine(batch_size=batch_size).generate(PREFIXES, seeds, sampling) == expected
    backwards = engine().generate(PREFIXES[::-1], [group[::-1] for group in seeds[::-1]], sampling)
    assert [group[::-1] for group in backwards[::-1]] == expected
    alone = [engine().generate([prefix], [group], sampling)[0] for prefix, group in zip(PREFIXES, seeds, strict=True)]
    assert alone == expected
    ids = [completion.ids for group in expected for completion in group]
    assert len(set(ids)) == len(ids)


def test_longer_limit_continues():
    """The tokens up to a limit do not depend on it."""
    seeds = seeds_for(PREFIXES, 5)
    short = engine().generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=5))
    long = engine().generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=50))
    assert ids_of(short) == [[ids[:5] for ids in group] for group in ids_of(long)]


def test_equal_prefixes_with_seeds_of_their_own():
    """A prefix may come twice, with any number of seeds, none included."""
    sampling = SamplingConfig(max_new_tokens=6)
    (expected,) = engine().generate([[20]], [[1, 2, 3]], sampling)
    samples = engine().generate([[20], [10, 11], [20]], [[1], [], [2, 3]], sampling)
    assert samples == [expected[:1], [], expected[1:]]
    assert engine().generate([], [], sampling) == []


def test_prefixes_are_computed_once():
    """Two batches: the three longest prefixes with two samples each, padded to five; then the one that is left."""
    sampler = engine(batch_size=7)
    shapes = record_shapes(sampler.model)
    sampler.generate(PREFIXES, seeds_for(PREFIXES, 2), SamplingConfig(max_new_tokens=1))
    assert shapes == [(3, 5), (1, 1)]
    shapes.clear()
    sampler.generate([[20]], seeds_for([[20]], 17), SamplingConfig(max_new_tokens=1))  # more samples than fit
    assert shapes == [(1, 1)] * 3
    shapes.clear()
    sampler.generate([[20], [21], [20]], [[0], [0], [1]], SamplingConfig(max_new_tokens=1))
    assert shapes == [(2, 1)]


def test_finished_sequences_leave_the_batch():
    """At every token, over three quarters of the rows are sequences that need it, and the last one ends the loop."""
    sampler = engine(batch_size=256)
    shapes = record_shapes(sampler.model)
    samples = sampler.generate(PREFIXES, seeds_for(PREFIXES, 64), SamplingConfig(max_new_tokens=400))
    lengths = [len(completion.ids) for group in samples for completion in group]
    assert len(shapes) == max(lengths)  # the forward pass over the prefixes gives the first token
    for step, (rows, _) in list(enumerate(shapes))[1:]:
        running = sum(length > step for length in lengths)
        assert 0.75 * rows < running <= rows
    assert shapes[-1][0] < 256


def test_completions_are_reported_as_they_are_done():
    """Once each; a short one before a long one of the same batch."""
    reported = []
    samples = engine(batch_size=64).generate(
        PREFIXES, seeds_for(PREFIXES, 16), SamplingConfig(max_new_tokens=40), reported.append
    )
    assert Counter(reported) == Counter(completion for group in samples for completion in group)
    lengths = [len(completion.ids) for completion in reported]
    assert lengths == sorted(lengths)
    assert engine().take_counts() == {}


def test_distribution_is_the_policys():
    """
    First tokens follow the softmax at temperature 1, although the model's own generation defaults would change it.
    """
    sampler = engine(batch_size=512)
    declared = sampler.model.generation_config
    declared.repetition_penalty, declared.top_k, declared.temperature, declared.top_p = 5.0, 3, 0.3, 0.5
    prefix, n = [10, 11, 12], 4096
    samples = sampler.generate([prefix], seeds_for([prefix], n), SamplingConfig(max_new_tokens=1))[0]
    expected = torch.softmax(next_logits(sampler.model, prefix), dim=-1)
    counts = Counter(completion.ids[0] for completion in samples)
    observed = torch.tensor([counts[token] / n for token in range(len(expected))])
    assert 0.5 * (observed - expected).abs().sum() < 0.15  # total variation; with 3 tokens left it would be near 1
    top = expected.topk(5)
    error = (observed[top.indices] - top.values).abs()
    assert (error < 5 * (top.values * (1 - top.values) / n).sqrt()).all()


def test_top_k():
    """The k most likely tokens and no others; k = 1 is greedy."""
    sampler = engine(batch_size=256)
    samples = sampler.generate([[10, 11]], seeds_for([[10, 11]], 256), SamplingConfig(max_new_tokens=1, top_k=2))[0]
    assert {completion.ids[0] for completion in samples} == set(
        next_logits(sampler.model, [10, 11]).topk(2).indices.tolist()
    )
    seeds = seeds_for(PREFIXES, 2)
    single = sampler.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=9, top_k=1))
    assert single == sampler.generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=9, temperature=0))


def test_top_p():
    """The most likely tokens that together reach p, and no others."""
    sampler = engine(batch_size=512)
    probs, order = torch.softmax(next_logits(sampler.model, [10, 11]), dim=-1).sort(descending=True)
    size = int((probs.cumsum(0) < 0.3).sum()) + 1
    samples = sampler.generate([[10, 11]], seeds_for([[10, 11]], 512), SamplingConfig(max_new_tokens=1, top_p=0.3))[0]
    assert {completion.ids[0] for completion in samples} == set(order[:size].tolist())


def test_temperature():
    """Dividing the weights of the last layer by 2 is a temperature of 2."""
    seeds, plain = seeds_for(PREFIXES, 4), SamplingConfig(max_new_tokens=8)
    hot = engine().generate(PREFIXES, seeds, SamplingConfig(max_new_tokens=8, temperature=2.0))
    sampler = engine()
    assert sampler.generate(PREFIXES, seeds, plain) != hot
    sampler.model.lm_head.weight.data /= 2
    assert sampler.generate(PREFIXES, seeds, plain) == hot


def test_inverse_cdf_by_hand():
    """Shares of 0, 1/4, 0, 3/4, 0: the borders lie at 0, 1/4 and 1, and belong to the token that they start."""
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    uniforms = [0.0, math.nextafter(0.25, 0), 0.25, math.nextafter(1, 0)]
    picked = inverse_cdf(probs.expand(4, 5), torch.tensor(uniforms, dtype=torch.float64))
    assert picked.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("scale", [1.0, 1 - 1e-6, 1 + 1e-6])
def test_tokens_without_probability_are_never_drawn(scale):
    """Large vocabulary, many zeros, sums that rounding took off 1; numbers at both ends and at every border."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50_000, generator=generator) * 5
    logits[:, torch.rand(50_000, generator=generator) < 0.9] = -torch.inf
    logits[:, -100:] = -torch.inf
    probs = logits.softmax(-1) * scale
    borders = probs.double().cumsum(-1)[0] / probs.double().sum()
    edges = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53, 1 - 2.0**-52], dtype=torch.float64)
    uniforms = torch.cat([edges, borders[borders < 1][::50], torch.rand(500, dtype=torch.float64, generator=generator)])
    picked = inverse_cdf(probs.expand(len(uniforms), -1), uniforms)
    assert (probs[0, picked] > 0).all()


def test_inverse_cdf_equals_reference():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 50, generator=generator) * 3
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator)
    expected = [
        reference.sample_reference(row, uniform)
        for row, uniform in zip(logits.double().tolist(), uniforms.tolist(), strict=True)
    ]
    assert inverse_cdf(logits.softmax(-1), uniforms).tolist() == expected


def test_every_declared_end_token_ends():
    """Chat models declare a second end token in their generation config: a completion ends at either."""
    sampler = engine()
    sampler.model.generation_config.eos_token_id = [EOS, 77]
    sampler = TransformersEngine(sampler.model, sampler.tokenizer, 64)
    assert sampler.eos_token_ids == sampler.describe()["end_tokens"] == [EOS, 77]
    samples = sampler.generate(PREFIXES, seeds_for(PREFIXES, 64), SamplingConfig(max_new_tokens=60))
    ends = {c.ids[-1] for group in samples for c in group if c.finish_reason == "stop"}
    assert ends == {EOS, 77}


@pytest.mark.parametrize("architecture", ["llama", "GPT2"])
def test_context_bounds_the_completion(architecture):
    """
    A completion cannot run beyond the model's context; it is then cut, not an error. Its companions go on to their own
    limit: what one prefix gets does not depend on the others.
    """
    model = make_other("GPT2") if architecture == "GPT2" else make_policy(max_position_embeddings=24)
    sampler = TransformersEngine(model, make_tokenizer(), 64)
    prefixes, seeds, sampling = [[5] * 20, [6] * 3], [[0], list(range(9))], SamplingConfig(max_new_tokens=100)
    samples = sampler.generate(prefixes, seeds, sampling)
    for prefix, own_seeds, group in zip(prefixes, seeds, samples, strict=True):
        lengths = {len(completion.ids) for completion in group if completion.finish_reason == "length"}
        assert lengths == {24 - len(prefix)}
        assert sampler.generate([prefix], [own_seeds], sampling) == [group]


@pytest.mark.parametrize("name", ["llama", "Mamba"])
def test_limits_replace_the_longest(name):
    """Each prefix has its own: what comes out is the beginning of the same completion with more room."""
    model = make_other(name) if name == "Mamba" else make_policy()
    sampler, limits = TransformersEngine(model, make_tokenizer(), 64), [3, 20, 1, 8]
    seeds, prefixes = seeds_for(PREFIXES, 6), [[10, 11], *PREFIXES[1:]]
    whole = sampler.generate(prefixes, seeds, SamplingConfig(max_new_tokens=30))
    bounded = sampler.generate(prefixes, seeds, SamplingConfig(max_new_tokens=12), limits=limits)
    for full, group, limit in zip(whole, bounded, limits, strict=True):
        assert [completion.ids for completion in group] == [completion.ids[:limit] for completion in full]
        reasons = ["stop" if EOS in completion.ids[:limit] else "length" for completion in full]
        assert [completion.finish_reason for completion in group] == reasons


def test_bad_input():
    sampler, seeds = engine(max_position_embeddings=16), [[0], [0]]
    with pytest.raises(ValueError, match="Prefix 1 has 16 tokens and leaves no room in the model's context of 16"):
        sampler.generate([[5], [5] * 16], seeds, SamplingConfig())
    with pytest.raises(ValueError, match="Prefix 0 is empty"):
        sampler.generate([[]], [[0]], SamplingConfig())
    with pytest.raises(ValueError, match="`limits` needs one entry per prefix, got 1 for 2 prefixes"):
        sampler.generate([[5], [6]], seeds, SamplingConfig(), limits=[4])
    with pytest.raises(ValueError, match="Prefix 1 has the limit 0: a completion needs room for 1 token"):
        sampler.generate([[5], [6]], seeds, SamplingConfig(), limits=[4, 0])
    with pytest.raises(ValueError, match="`seeds` needs one entry per prefix, got 2 for 1 prefixes"):
        sampler.generate([[5]], seeds, SamplingConfig())
    with pytest.raises(ValueError, match="no `eos_token`"):
        TransformersEngine(make_policy(), make_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        TransformersEngine(make_policy(), make_tokenizer(), 0)


@pytest.mark.parametrize("make", [make_policy, lambda: make_other("Mamba")], ids=["loop", "generate"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_predictions_are_an_error(make, temperature):
    model = make()
    model.get_output_embeddings().weight.data[7] = torch.nan
    sampler = TransformersEngine(model, make_tokenizer())
    with pytest.raises(ValueError, match="not numbers"):
        sampler.generate([[5]], [[0]], SamplingConfig(temperature=temperature))


def test_caller_is_left_alone():
    """Random state, gradients, and the mode of every module are as they were, also after an error."""
    sampler = engine()
    sampler.model.train()
    sampler.model.model.layers[0].eval()
    modes = [module.training for module in sampler.model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    sampler.generate(PREFIXES, seeds_for(PREFIXES, 2), SamplingConfig(max_new_tokens=4))
    with pytest.raises(ZeroDivisionError):
        sampler.generate(PREFIXES, seeds_for(PREFIXES, 2), SamplingConfig(max_new_tokens=4), lambda _: 1 / 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [module.training for module in sampler.model.modules()] == modes
    assert torch.is_grad_enabled()
