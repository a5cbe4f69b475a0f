"""
Attention over prefix trees inside unmodified transformers models.

Three ways to the same rule (`key <= query < subtree_end[key]`, see `prefix_tree.py`):

- `"blocks"`: each stretch of queries that see nearly the same keys is one call of PyTorch's SDPA, on those keys only;
- `"flex"`: FlexAttention with a `BlockMask`, on CUDA;
- `"dense"`: a mask of T x T, for models that only have transformers' own ("eager") attention.

The first two are one attention function that transformers calls by its registered name; without a tree it is SDPA, so
that generation and padded batches run as before.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dapo_trl.prefix_tree import attention_blocks, tree_mask


ATTENTION_NAME = "prefix_tree"
FLEX_BLOCK_SIZE = 128  # FlexAttention's own


class BlockAttention:
    """
    Attention of packed trees, block by block: what the rule hides is hardly computed.

    Shapes: R rows, T tokens, H query heads, G key heads, D size of a head.

    Args:
        subtree_end (`torch.Tensor` of shape `(R, T)`):
            Position in the row after the last token below each token; T for padding at a row's end.
        width (`int`, *optional*, defaults to `256`):
            H * D, which decides how large blocks are.
    """

    def __init__(self, subtree_end: torch.Tensor, width: int = 256) -> None:
        self.query_sizes: list[int] = []
        self.key_sizes: list[int] = []
        keys: list[torch.Tensor] = []
        self._visible: list[torch.Tensor | None] = []  # None for a causal block
        ends = subtree_end.cpu()
        for row, row_ends in enumerate(ends):
            offset = row * ends.shape[1]
            for block in attention_blocks(row_ends.tolist(), width):
                own = torch.arange(block.start, block.stop)
                seen = torch.cat([*(torch.arange(start, stop) for start, stop in block.runs), own])
                visible = (seen <= own[:, None]) & (own[:, None] < row_ends[seen])
                is_causal = not block.runs and bool((row_ends[own] >= block.stop).all())
                self._visible.append(None if is_causal else visible)
                self.query_sizes.append(len(own))
                self.key_sizes.append(len(seen))
                keys.append(seen + offset)
        self._keys = {torch.device("cpu"): torch.cat(keys)}
        self._masks: dict[tuple[torch.dtype, torch.device], list[torch.Tensor | None]] = {}

    @property
    def num_products(self) -> int:
        """Products of a query and a key that are computed per head, a causal block counted whole."""
        return sum(queries * keys for queries, keys in zip(self.query_sizes, self.key_sizes, strict=True))

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """
        Attend.

        Args:
            query (`torch.Tensor` of shape `(R, H, T, D)`):
                Queries.
            key (`torch.Tensor` of shape `(R, G, T, D)`):
                Keys. H is a multiple of G.
            value (`torch.Tensor` of shape `(R, G, T, D)`):
                Values.
            scaling (`float`, *optional*):
                Factor of the scores. `None` for 1 / sqrt(D).
            dropout (`float`, *optional*, defaults to `0.0`):
                Dropout of the attention weights.

        Returns:
            `torch.Tensor` of shape `(R, T, H, D)`.
        """
        rows, _, length, _ = query.shape
        queries = _join_rows(query).transpose(0, 1)[None].split(self.query_sizes, dim=2)
        keys, values = (
            self._gather(_join_rows(states)).transpose(0, 1)[None].split(self.key_sizes, dim=2)
            for states in (key, value)
        )
        options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
            for q, k, v, mask in zip(queries, keys, values, self._float_masks(query), strict=True)
        ]
        return torch.cat([output[0].transpose(0, 1) for output in outputs]).unflatten(0, (rows, length))

    # Index and masks are made once for each device: a model may be split over several.

    def _gather(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values of each block in turn; as they are where no block needs any of another."""
        if sum(self.key_sizes) == len(states):
            return states
        if states.device not in self._keys:
            self._keys[states.device] = self._keys[torch.device("cpu")].to(states.device)
        return states.index_select(0, self._keys[states.device])

    def _float_masks(self, query: torch.Tensor) -> list[torch.Tensor | None]:
        """Additive masks: SDPA would make them from boolean ones in every layer."""
        key = (query.dtype, query.device)
        if key not in self._masks:
            self._masks[key] = [
                None
                if visible is None
                else torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf).to(query.device)
                for visible in self._visible
            ]
        return self._masks[key]


def _join_rows(states: torch.Tensor) -> torch.Tensor:
    """Heads of shape (R, H, T, D) as (R * T, H, D); no copy where the model made them from (R, T, H, D)."""
    return states.transpose(1, 2).flatten(0, 1)


def block_mask(subtree_end: torch.Tensor) -> Any:
    """
    FlexAttention's block mask of packed trees, on the device and without a tensor of T x T.

    A block of keys is skipped where no query of the other block sees any of it, and needs no mask where all do. Both
    follow from the smallest and the largest `subtree_end` of the block.

    Args:
        subtree_end (`torch.Tensor` of shape `(R, T)`):
            Position after the last token below each token; T, a multiple of 128, for padding at a row's end.

    Returns:
        [`~torch.nn.attention.flex_attention.BlockMask`] of shape `(R, 1, T, T)`.

    Raises:
        ValueError: if T is no multiple of 128.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = subtree_end.shape[1]
    if length % FLEX_BLOCK_SIZE:
        raise ValueError(f"Rows must be a multiple of {FLEX_BLOCK_SIZE} tokens long, got {length}. Pad them.")
    subtree_end = subtree_end.to(torch.int32)
    by_block = subtree_end.unflatten(1, (-1, FLEX_BLOCK_SIZE))
    smallest, largest = by_block.amin(-1)[:, None, :], by_block.amax(-1)[:, None, :]  # (R, 1, key blocks)
    number = torch.arange(length // FLEX_BLOCK_SIZE, device=subtree_end.device)
    queries, keys = number[None, :, None], number[None, None, :]
    first_query = queries * FLEX_BLOCK_SIZE
    is_full = (keys < queries) & (smallest >= first_query + FLEX_BLOCK_SIZE)
    is_seen = (keys == queries) | ((keys < queries) & (largest > first_query))
    partial, full = is_seen & ~is_full, is_full

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many blocks of keys each block of queries has, and which: those come first."""
        indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < subtree_end[row, key])

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK_SIZE, mask_mod=sees, seq_lengths=(length, length)
    )


def prefix_tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    tree: BlockAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The attention function that transformers calls under the name `"prefix_tree"`.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        query (`torch.Tensor` of shape `(R, H, T, D)`):
            Queries.
        key (`torch.Tensor` of shape `(R, G, T, D)`):
            Keys.
        value (`torch.Tensor` of shape `(R, G, T, D)`):
            Values.
        attention_mask (`torch.Tensor` or `BlockMask` or `None`):
            `subtree_end` of shape `(R, 1, 1, T)` beside `tree`; a block mask; or, without a tree, SDPA's mask.
        tree ([`BlockAttention`], *optional*):
            Attention of packed trees.
        scaling (`float`, *optional*):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the attention weights.
        **kwargs:
            Whatever else the layer passes on.

    Returns:
        `tuple`: output of shape `(R, T, H, D)`, and `None`.

    Raises:
        NotImplementedError: if the layer asks for what cannot be combined with a tree.
    """
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if tree is None:
        if attention_mask is not None and attention_mask.dtype == torch.long:
            raise NotImplementedError(f"{type(module).__name__} does not pass keyword arguments on to its attention")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for name in ("softcap", "position_bias", "s_aux"):  # a sliding window is known to hold every sequence
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} asks for `{name}`")
    return tree(query, key, value, scaling, dropout), None


AttentionInterface.register(ATTENTION_NAME, prefix_tree_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def candidate_attentions(model: PreTrainedModel) -> list[str]:
    """
    Ways in which a model could attend over trees, the best first.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.

    Returns:
        `list[str]`: of `"flex"`, `"blocks"` and `"dense"`; empty if its attention takes no mask.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation == "eager":
        return ["dense"]
    if implementation in ("sdpa", "flex_attention", ATTENTION_NAME):
        # FlexAttention has no dropout
        has_dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
        return ["flex", "blocks"] if model.device.type == "cuda" and not has_dropout else ["blocks"]
    return []


def tree_obstacle(model: PreTrainedModel, longest: int) -> str | None:
    """
    What is known to keep a model from attending over trees, before it is tried.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        longest (`int`):
            Longest sequence of the data in tokens. A sliding window that holds it is no obstacle.

    Returns:
        `str` or `None`: the reason, as a clause about the model.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if not candidate_attentions(model):
        return (
            f"attention implementation {implementation!r} takes no mask of its own; load the model with "
            '`attn_implementation="sdpa"`'
        )
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token, which cannot branch"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = _window(config, kinds)
    if window is not None and window < longest:
        return f"its attention looks back {window} tokens only, and the longest sequence has {longest}"
    if other := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return f"it has layers of kind {', '.join(sorted(map(repr, other)))}, which cannot branch"
    return None


def _window(config: PreTrainedConfig, kinds: set[str]) -> int | None:
    """How far attention looks back, where that is limited."""
    windows = []
    has_kinds = getattr(config, "layer_types", None) is not None
    if "sliding_attention" in kinds or (not has_kinds and getattr(config, "use_sliding_window", True)):
        windows.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in kinds or not has_kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        windows.append(config.window_size)
    return min((window for window in windows if window is not None), default=None)


def tree_arguments(subtree_end: torch.Tensor, attention: str, dtype: torch.dtype, width: int = 256) -> dict[str, Any]:
    """
    What a model's forward needs besides `input_ids` and `position_ids`.

    Args:
        subtree_end (`torch.Tensor` of shape `(R, T)`):
            Position after the last token below each token; T for padding at a row's end.
        attention (`str`):
            `"blocks"`, `"flex"` or `"dense"`.
        dtype (`torch.dtype`):
            The model's, for a dense mask.
        width (`int`, *optional*, defaults to `256`):
            The model's, for blocks.

    Returns:
        `dict`: keyword arguments. `attention_mask` is never `None`: transformers would then guess where sequences begin
        from the jumps of the positions.
    """
    if attention == "flex":
        return {"attention_mask": block_mask(subtree_end)}
    if attention == "blocks":
        # Four dimensions: transformers hands such a mask on as it is.
        return {"attention_mask": subtree_end[:, None, None, :], "tree": BlockAttention(subtree_end, width)}
    if attention != "dense":
        raise ValueError(f"`attention` must be 'blocks', 'flex' or 'dense', got {attention!r}.")
    mask = torch.zeros((), dtype=dtype, device=subtree_end.device)
    return {"attention_mask": mask.masked_fill(~tree_mask(subtree_end), torch.finfo(dtype).min)[:, None]}
