"""
Attention over trees: against dense attention, inside tiny models against sequences one by one, and what stands in its
way.
"""

import json
import random
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM

from conftest import make_policy
from dapo_trl import prefix_tree
from dapo_trl.prefix_tree import PrefixTree, TreeRows, lay_out, tree_mask
from dapo_trl.tree_attention import (
    ATTENTION_NAME,
    BlockAttention,
    block_mask,
    candidate_attentions,
    prefix_tree_attention_forward,
    tree_arguments,
    tree_obstacle,
)


def pad_rows(rows: TreeRows, multiple: int = 1) -> torch.Tensor:
    """`subtree_end` of rows that are padded to the length of the longest, or a multiple; padding holds that length."""
    length = max(map(len, rows.subtree_end))
    length += -length % multiple
    return torch.tensor([ends + [length] * (length - len(ends)) for ends in rows.subtree_end])


def random_rows(seed: int, num_sequences: int = 12, longest: int = 40, multiple: int = 1) -> torch.Tensor:
    """`subtree_end` of random trees in several rows of different lengths, padded."""
    rng = random.Random(seed)
    tree, nodes, ends = PrefixTree(), [-1], []
    for number in range(num_sequences):
        ids = [1000 * number + i for i in range(rng.randint(1, longest))]
        nodes += tree.add(ids, after=rng.choice(nodes))
        ends.append(nodes[-1])
    budget = max(tree.depths[end] for end in ends) + 1 + longest
    return pad_rows(lay_out(tree, ends, budget), multiple)


def random_states(rows: int, length: int, heads: int = 4, key_heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Queries of H heads, keys and values of G, in float64; shapes (R, T, heads, D), from which models transpose."""
    generator = torch.Generator().manual_seed(seed)
    states = (
        torch.randn(rows, length, n, 8, dtype=torch.float64, generator=generator) for n in (heads, key_heads, key_heads)
    )
    return [state.requires_grad_() for state in states]


def dense_attention(states: list[torch.Tensor], mask: torch.Tensor, scaling: float | None = None) -> torch.Tensor:
    """Softmax over all keys, head by head; shapes (R, T, heads, D), query head h reads key head h * G // H."""
    query, key, value = states
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = []
    for head in range(query.shape[2]):
        group = head * key.shape[2] // query.shape[2]
        scores = query[:, :, head] @ key[:, :, group].mT * scaling
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value[:, :, group])
    return torch.stack(heads, dim=2)


def assert_same(outputs: torch.Tensor, expected: torch.Tensor, states: list[torch.Tensor]) -> None:
    """Same values and same gradients of queries, keys and values, to 1e-10."""
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for gradient, other in zip(
        torch.autograd.grad(outputs, states, upstream), torch.autograd.grad(expected, states, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-10)


class TestBlockAttention:
    def attend(self, subtree_end: torch.Tensor, states: list[torch.Tensor], **kwargs) -> torch.Tensor:
        return BlockAttention(subtree_end)(*(state.transpose(1, 2) for state in states), **kwargs)

    def test_by_hand(self):
        """
        A root with two children. With equal keys each query takes the mean of the values that it sees: 3; of 3 and 5:
        4; of 3 and 8: 5.5.
        """
        states = [torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), torch.tensor([3.0, 5, 8]).view(1, 3, 1, 1)]
        outputs = self.attend(torch.tensor([[3, 2, 3]]), states)
        assert outputs.flatten().tolist() == pytest.approx([3, 4, 5.5], rel=1e-6)

    @pytest.mark.parametrize("scaling", [None, 0.7])
    @pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
    @pytest.mark.parametrize("longest", [5, 150])
    def test_equals_dense_attention(self, longest, heads, key_heads, scaling):
        """Padded rows, small trees in one block and large ones in many."""
        subtree_end = random_rows(seed=heads, longest=longest)
        assert len(subtree_end) > 1
        states = random_states(*subtree_end.shape, heads, key_heads)
        outputs = self.attend(subtree_end, states, scaling=scaling)
        assert_same(outputs, dense_attention(states, tree_mask(subtree_end), scaling), states)

    @given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 8), st.integers(1, 5))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_equals_dense_attention_however_it_is_cut(self, seed, num_sequences, longest, longest_block):
        """Small trees, with blocks that are shorter and cheaper than they would be."""
        subtree_end = random_rows(seed, num_sequences, longest)
        states = random_states(*subtree_end.shape)
        with mock.patch.multiple(prefix_tree, _LONGEST_BLOCK=longest_block, _BLOCK_COST=1, _GATHER_COST=0):
            outputs = self.attend(subtree_end, states)
        assert_same(outputs, dense_attention(states, tree_mask(subtree_end)), states)

    def test_causal_attention_is_something_else(self):
        """The control: the mask of a plain row lets siblings see each other, by far more than the tolerance."""
        subtree_end = random_rows(seed=0)
        states = random_states(*subtree_end.shape)
        causal = torch.ones(subtree_end.shape[1], subtree_end.shape[1], dtype=torch.bool).tril()
        difference = self.attend(subtree_end, states) - dense_attention(states, causal.expand(len(subtree_end), -1, -1))
        assert difference.abs().max() > 0.1

    def test_one_sequence_is_causal_attention(self):
        """A tree without branches: one block, without a mask, and PyTorch's own causal attention."""
        subtree_end = torch.full((2, 300), 300)
        states = random_states(2, 300, heads=2)
        attention = BlockAttention(subtree_end)
        assert attention.query_sizes == attention.key_sizes == [300, 300]
        expected = F.scaled_dot_product_attention(*(state.transpose(1, 2) for state in states), is_causal=True)
        assert_same(self.attend(subtree_end, states), expected.transpose(1, 2), states)

    def test_one_object_serves_layers_of_any_dtype(self):
        """Masks are made once for each dtype; half precision stays what it is."""
        subtree_end = random_rows(seed=1)
        attention = BlockAttention(subtree_end)
        states = random_states(*subtree_end.shape)
        for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float32, 1e-5), (torch.float64, 1e-10)):
            outputs = attention(*(state.transpose(1, 2).to(dtype) for state in states))
            assert outputs.dtype == dtype
            expected = dense_attention(states, tree_mask(subtree_end))
            torch.testing.assert_close(outputs.double(), expected, rtol=0, atol=tolerance)

    def test_dropout(self):
        """Dropping every weight leaves nothing; dropping none leaves all."""
        subtree_end = random_rows(seed=1)
        states = random_states(*subtree_end.shape)
        assert self.attend(subtree_end, states, dropout=1.0).abs().max() == 0
        assert torch.equal(self.attend(subtree_end, states, dropout=0.0), self.attend(subtree_end, states))

    def test_cost_of_a_searched_solution(self):
        """
        A prompt of 200 tokens, and 20 steps of 30 tokens with 8 candidates each, the first of which goes on: 5,000
        tokens. The prompt's tokens see 1 + ... + 200 = 20,100 keys. A candidate of step i starts below 200 + 30 i
        tokens: its 30 see 30 (200 + 30 i) + 1 + ... + 30 keys, that is 6,465 + 900 i. Eight of them, over i = 0 to 19:
        8 (20 x 6,465 + 900 x 190) = 2,402,400. Of all 2,422,500 none is computed twice, and at most as many in vain;
        a dense mask has 25,000,000.
        """
        tree, ends = PrefixTree(), []
        last = tree.add(range(200))[-1]
        for step in range(20):
            candidates = [tree.add([1000 * step + candidate, *range(200, 229)], after=last) for candidate in range(8)]
            ends += [nodes[-1] for nodes in candidates]
            last = candidates[0][-1]
        rows = lay_out(tree, ends)
        assert rows.num_tokens == 5_000
        visible = sum(position + 1 for position in rows.position_ids[0])
        assert visible == 2_422_500
        attention = BlockAttention(torch.tensor(rows.subtree_end))
        assert visible < attention.num_products <= 1.4 * visible  # measured: 1.30
        assert attention.num_products <= 5_000**2 / 5
        assert len(attention.query_sizes) < 60  # calls of SDPA; measured: 47


def check_flex_blocks(subtree_end: torch.Tensor) -> None:
    """Skipped blocks hold nothing visible, full ones nothing hidden, and no block is both partial and full."""
    size = 128
    mask = block_mask(subtree_end)
    rows, length = subtree_end.shape
    assert mask.shape == (rows, 1, length, length)
    seen = mask.to_dense()[:, 0].bool()
    visible = tree_mask(subtree_end).unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (R, Q, 128, K, 128)
    assert torch.equal(seen, visible.any(4).any(2))
    full = torch.zeros_like(seen)
    for row in range(rows):
        for query in range(length // size):
            count = mask.full_kv_num_blocks[row, 0, query]
            blocks = mask.full_kv_indices[row, 0, query, :count].tolist()
            partial = mask.kv_indices[row, 0, query, : mask.kv_num_blocks[row, 0, query]].tolist()
            full[row, query, blocks] = True
            assert not set(blocks) & set(partial)
            assert sorted(blocks + partial) == seen[row, query].nonzero().flatten().tolist()
    assert torch.equal(full, visible.all(4).all(2))


class TestBlockMask:
    def test_by_hand(self):
        """
        Four blocks: a prompt of one block, a branch of two, and one of one block. The last does not see the branch.
        """
        subtree_end = torch.tensor([[512] * 128 + [384] * 256 + [512] * 128])
        mask = block_mask(subtree_end)
        assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
        assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 1]
        assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]

    @pytest.mark.parametrize("longest", [20, 200, 600])
    @pytest.mark.parametrize("seed", range(3))
    def test_blocks_hold_what_is_visible(self, seed, longest):
        check_flex_blocks(random_rows(seed, longest=longest, multiple=128))

    def test_rule_of_single_pairs(self):
        subtree_end = random_rows(seed=0, multiple=128)
        rows, length = subtree_end.shape
        row, query, key = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
        assert torch.equal(block_mask(subtree_end).mask_mod(row, 0, query, key), tree_mask(subtree_end))

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("seed", range(2))
    def test_flex_attention_equals_dense_attention(self, seed):
        """FlexAttention without a compiler computes all pairs, so this is about the mask's form and its rule."""
        subtree_end = random_rows(seed, multiple=128)
        states = [state.detach().float() for state in random_states(*subtree_end.shape)]
        query, key, value = (state.transpose(1, 2) for state in states)
        outputs = flex_attention(query, key, value, block_mask=block_mask(subtree_end), enable_gqa=True)
        expected = dense_attention(states, tree_mask(subtree_end))
        torch.testing.assert_close(outputs.transpose(1, 2), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("length", [1, 127, 200])
    def test_refuses_other_lengths(self, length):
        message = f"Rows must be a multiple of 128 tokens long, got {length}. Pad them."
        with pytest.raises(ValueError, match=message):
            block_mask(torch.full((1, length), length))


class TestTreeArguments:
    SUBTREE_END = torch.tensor([[3, 2, 3], [1, 3, 3]])

    def test_blocks(self):
        """Four dimensions, or transformers would make its own mask of it."""
        arguments = tree_arguments(self.SUBTREE_END, "blocks", torch.float32)
        assert torch.equal(arguments["attention_mask"], self.SUBTREE_END[:, None, None])
        assert isinstance(arguments["tree"], BlockAttention)
        assert arguments.keys() == {"attention_mask", "tree"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dense(self, dtype):
        arguments = tree_arguments(self.SUBTREE_END, "dense", dtype)
        mask = arguments.pop("attention_mask")
        assert arguments == {}
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, tree_mask(self.SUBTREE_END)[:, None])
        assert set(mask.flatten().tolist()) == {0, torch.finfo(dtype).min}

    def test_flex(self):
        subtree_end = random_rows(seed=0, multiple=128)
        arguments = tree_arguments(subtree_end, "flex", torch.float32)
        assert arguments["attention_mask"].shape == (len(subtree_end), 1, subtree_end.shape[1], subtree_end.shape[1])
        assert arguments.keys() == {"attention_mask"}


# ---- Inside models ----

TREE_SEQUENCES = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 11, 12, 13, 14], [5, 6, 11, 15], [20, 21], [20, 22, 23]]


def tiny_model(name: str, **kwargs):
    """A tiny model of any kind of transformers' causal language models, with random weights."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    if name != "Mamba":
        sizes |= {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes | tokens | {"initializer_range": 0.2} | kwargs)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def logits_at_ends(model, attention: str, is_plain: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits at the end of each sequence, in trees (over two rows; or in these rows as if plain) and of it alone."""
    tree = PrefixTree()
    rows = lay_out(tree, [tree.add(ids)[-1] for ids in TREE_SEQUENCES], max_tokens_per_row=10)
    length = max(map(len, rows.input_ids))
    inputs = {
        name: torch.tensor([row + [0] * (length - len(row)) for row in getattr(rows, name)])
        for name in ("input_ids", "position_ids")
    }
    implementation = model.config._attn_implementation
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits[0, -1] for ids in TREE_SEQUENCES]
        if attention != "dense":
            model.set_attn_implementation(ATTENTION_NAME)
        subtree_end = torch.full((len(rows.input_ids), length), length) if is_plain else pad_rows(rows)
        arguments = tree_arguments(subtree_end, attention, torch.float32)
        logits = model(**inputs, **arguments, use_cache=False).logits
        model.set_attn_implementation(implementation)
    for place, expected in zip(rows.places, alone, strict=True):
        yield logits[place], expected


class TestModels:
    @pytest.mark.parametrize("attention", ["blocks", "dense"])
    @pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "GPTNeoX", "Llama4Text"])
    def test_scores_trees_like_sequences(self, name, attention):
        for logits, expected in logits_at_ends(tiny_model(name), attention):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("attention", ["blocks", "dense"])
    def test_plain_rows_score_something_else(self, attention):
        """
        The control. At ten tokens a row they are 5 6 11 12 13 14 15 7 8 9 and 5 6 7 10 20 22 23 21: with all that is
        before them in sight, only the sequences that a row begins with, the third and the second, score the same.
        """
        pairs = logits_at_ends(tiny_model("Llama"), attention, is_plain=True)
        assert [torch.allclose(*pair, atol=1e-3) for pair in pairs] == [False, True, True, False, False, False]

    @pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
    def test_eager_models_take_a_dense_mask(self, name):
        """They ask for what only their own attention has; a window of 8 holds sequences of 6."""
        model = tiny_model(name, sliding_window=8)
        model.set_attn_implementation("eager")  # what Gemma2 has by itself depends on the version of transformers
        assert candidate_attentions(model) == ["dense"]
        assert tree_obstacle(model, longest=6) is None
        for logits, expected in logits_at_ends(model, "dense"):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["Mistral", "Mixtral", "Phi3", "Gemma3Text", "Cohere2"])
    def test_wide_windows_hide_nothing(self, name):
        """A window of 8 is no obstacle to sequences of 6, so that trees must be scored, and like sequences."""
        model = tiny_model(name, sliding_window=8)
        assert candidate_attentions(model) == ["blocks"]
        assert tree_obstacle(model, longest=6) is None
        for logits, expected in logits_at_ends(model, "blocks"):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_padded_batches_score_as_with_sdpa(self):
        model = make_policy()
        ids = torch.randint(2, 258, (3, 12), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]
        with torch.no_grad():
            expected = model(ids, attention_mask=mask.long()).logits
            model.set_attn_implementation(ATTENTION_NAME)
            logits = model(ids, attention_mask=mask.long()).logits
            without_mask = model(ids).logits
        assert torch.equal(logits[mask], expected[mask])
        assert not torch.equal(without_mask[0], without_mask[1])

    @pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}])
    def test_generates_as_with_sdpa(self, options):
        """Padded on the left, with a cache."""
        model = make_policy()
        ids = torch.randint(2, 258, (3, 8), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(8) >= torch.tensor([0, 3, 6])[:, None]).long()
        outputs = []
        for implementation in ("sdpa", ATTENTION_NAME):
            model.set_attn_implementation(implementation)
            torch.manual_seed(0)
            outputs.append(model.generate(ids, attention_mask=mask, max_new_tokens=16, **options))
        assert torch.equal(*outputs)

    def test_leaves_no_trace_in_checkpoints(self, tmp_path):
        """What is saved is what would be saved without it, and loads anywhere."""
        model = make_policy()
        for name in ("sdpa", ATTENTION_NAME):
            model.set_attn_implementation(name)
            model.save_pretrained(tmp_path / name)
        configs = [(tmp_path / name / "config.json").read_text() for name in ("sdpa", ATTENTION_NAME)]
        assert configs[0] == configs[1]
        assert ATTENTION_NAME not in configs[1]
        assert not [key for key in json.loads(configs[1]) if "attn" in key]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / ATTENTION_NAME)
        assert loaded.config._attn_implementation == "sdpa"


class TestForward:
    """The attention function itself, where a model asks for what cannot be had."""

    STATES = torch.zeros(1, 1, 3, 8)
    TREE = torch.tensor([[3, 2, 3]])

    @pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux"])
    def test_refuses_what_blocks_do_not_have(self, name):
        arguments = tree_arguments(self.TREE, "blocks", torch.float32)
        with pytest.raises(NotImplementedError, match=f"Identity asks for `{name}`"):
            prefix_tree_attention_forward(torch.nn.Identity(), *[self.STATES] * 3, **arguments, **{name: 1.0})
        outputs, weights = prefix_tree_attention_forward(
            torch.nn.Identity(), *[self.STATES] * 3, **arguments, **{name: None}
        )
        assert outputs.shape == (1, 3, 1, 8)
        assert weights is None

    def test_refuses_a_layer_that_loses_the_tree(self):
        """Positions of subtrees are no mask: without the tree beside them they must not be taken for one."""
        mask = tree_arguments(self.TREE, "blocks", torch.float32)["attention_mask"]
        with pytest.raises(NotImplementedError, match="Identity does not pass keyword arguments on to its attention"):
            prefix_tree_attention_forward(torch.nn.Identity(), *[self.STATES] * 3, mask)


class TestCandidateAttentions:
    @pytest.mark.parametrize(
        ("implementation", "on_cpu", "on_cuda"),
        [
            ("sdpa", ["blocks"], ["flex", "blocks"]),
            ("flex_attention", ["blocks"], ["flex", "blocks"]),
            (ATTENTION_NAME, ["blocks"], ["flex", "blocks"]),
            ("eager", ["dense"], ["dense"]),
            ("flash_attention_2", [], []),
        ],
    )
    def test_by_implementation_and_device(self, implementation, on_cpu, on_cuda):
        model = tiny_model("Llama")
        model.config._attn_implementation = implementation
        assert candidate_attentions(model) == on_cpu
        with mock.patch.object(type(model), "device", torch.device("cuda")):
            assert candidate_attentions(model) == on_cuda


class TestTreeObstacle:
    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("Mistral", {"sliding_window": 8}),
            ("Mixtral", {"sliding_window": 8}),
            ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
            ("Gemma2", {"sliding_window": 8}),
            ("Gemma3Text", {"sliding_window": 8}),
            ("Llama4Text", {"attention_chunk_size": 8}),
        ],
    )
    def test_windows(self, name, kwargs):
        """A window of 8 tokens holds a sequence of 8, but not of 9."""
        model = tiny_model(name, **kwargs)
        assert tree_obstacle(model, longest=8) is None
        message = "its attention looks back 8 tokens only, and the longest sequence has 9"
        assert tree_obstacle(model, longest=9) == message

    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("Llama", {}),
            ("Mistral", {"sliding_window": None}),
            ("Qwen2", {"use_sliding_window": False, "sliding_window": 8}),
            ("Gemma3Text", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
            ("GPTNeoX", {}),
        ],
    )
    def test_no_window(self, name, kwargs):
        """Also where the configuration names a window that no layer uses."""
        assert tree_obstacle(tiny_model(name, **kwargs), longest=10**6) is None

    @pytest.mark.parametrize("name", ["Mamba", "Qwen3Next", "RecurrentGemma"])
    def test_states_from_token_to_token(self, name):
        message = "its layers carry a state from token to token, which cannot branch"
        assert tree_obstacle(tiny_model(name), longest=4) == message

    def test_other_kinds_of_layers(self):
        """Its convolution reads neighbours in the row, whatever the mask says."""
        model = tiny_model("Lfm2", layer_types=["conv", "full_attention"])
        assert tree_obstacle(model, longest=4) == "it has layers of kind 'conv', which cannot branch"

    def test_attention_without_a_mask(self):
        model = tiny_model("Llama")
        model.config._attn_implementation = "flash_attention_2"
        assert tree_obstacle(model, longest=4) == (
            "attention implementation 'flash_attention_2' takes no mask of its own; load the model with "
            '`attn_implementation="sdpa"`'
        )
