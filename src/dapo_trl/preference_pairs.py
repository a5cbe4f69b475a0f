"""
State rows -> TRL preference rows: the state is the prompt, a good next step is chosen, a bad one rejected.
"""

import logging
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dapo_trl.advantages import check_probabilities, with_true_rewards
from dapo_trl.dataset_checks import refuse_missing_columns
from dapo_trl.tokenization import render_prompt, template_arguments


logger = logging.getLogger(__name__)

NEGATIVES = ("closest", "worst")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "tokenizer_fingerprint")


def to_preference_pairs(
    dataset: Dataset,
    negatives: str = "closest",
    threshold: float | None = None,
    min_gap: float = 0.1,
    values: str = "values",
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """
    Preference rows of single steps, which TRL's `DPOTrainer` trains on (Step-DPO, with negatives of choice).

    The chosen step is the candidate of the highest value. Rejected is one whose value is lower by `min_gap` at least
    and, if there is a threshold, below that: with `"closest"` the one that is most similar to the chosen step, which
    looks right and is not (hard negatives of DriveDPO, arXiv 2509.17940); with `"worst"` the one of the lowest value.
    Similarity is that of the two texts, [`difflib.SequenceMatcher.ratio`]; of equals the one of the lower value is
    taken.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with values of their candidates and, optionally, `rewards` of those that end the solution.
        negatives (`str`, *optional*, defaults to `"closest"`):
            `"closest"` or `"worst"`.
        threshold (`float`, *optional*):
            Value that a rejected step must be below. `None` for no such bound.
        min_gap (`float`, *optional*, defaults to `0.1`):
            By how much the chosen step's value must exceed the rejected one's.
        values (`str`, *optional*, defaults to `"values"`):
            Column of the candidates' values, such as `"critic_values"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template renders conversational prompts: a step in the middle of an answer is no
            message of its own.

    Returns:
        [`~datasets.Dataset`]: rows with `prompt` (text of the prompt and the steps so far), `chosen` and `rejected`
        (text of a step), `chosen_value`, `rejected_value`; `problem_id` where the states have it, and token ids
        (`prompt_ids`, `chosen_ids`, `rejected_ids`, with the `tokenizer_fingerprint`) where all have them. States
        without such a pair are left out, and their number is logged. TRL adds an end token to each text, also to that
        of a step in the middle: see `docs/siblings/drivedpo.md`.

    Raises:
        TypeError: if `dataset` is no data set.
        ValueError: if a column is missing, a row is bad, an argument is out of range, or no state has a pair.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.preference_pairs import to_preference_pairs

    >>> state = {"prompt": "1+2+4=", "prefix": [], "candidates": ["3+4\\n", "2+4\\n", "no\\n"]}
    >>> rows = Dataset.from_list([state | {"values": [0.9, 0.2, 0.1]}])
    >>> for negatives in ("closest", "worst"):
    ...     row = to_preference_pairs(rows, negatives)[0]
    ...     print(repr(row["chosen"]), repr(row["rejected"]))
    '3+4\\n' '2+4\\n'
    '3+4\\n' 'no\\n'

    ```
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"`negatives` must be 'closest' or 'worst', got {negatives!r}.")
    if not 0 <= min_gap <= 1:
        raise ValueError(f"`min_gap` must lie in [0, 1], got {min_gap}.")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is a value that rejected steps are below, in (0, 1], or None; got {threshold}.")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}.")
    cure = "They are state rows, see `docs/formats.md`."
    refuse_missing_columns(dataset, "Preference pairs need", ("prompt", "prefix", "candidates", values), cure)
    pairs = []
    for index, row in enumerate(dataset):
        try:
            v_C = _values(row, values)
            places = _choose(row["candidates"], v_C, negatives, threshold, min_gap)
            if places is not None:
                pairs.append(_pair(row, v_C, *places, processing_class))
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
    left_out = len(dataset) - len(pairs)
    if not pairs:
        raise ValueError(
            f"None of {len(dataset)} states has two candidates whose values differ by `min_gap={min_gap}`"
            + ("" if threshold is None else f", the lower one below `threshold={threshold}`")
            + ". Lower the one or raise the other, or sample more completions."
        )
    if left_out:
        logger.info("%d of %d states have no pair of candidates that differ enough.", left_out, len(dataset))
    if any("chosen_ids" not in pair for pair in pairs):  # not half a column
        pairs = [{name: cell for name, cell in pair.items() if name not in _IDS} for pair in pairs]
    return Dataset.from_list(pairs)


def _choose(
    candidates: Sequence[str], v_C: Sequence[float], negatives: str, threshold: float | None, min_gap: float
) -> tuple[int, int] | None:
    """Places of the chosen and the rejected candidate."""
    chosen = max(range(len(v_C)), key=v_C.__getitem__)
    highest = v_C[chosen] - min_gap + 1e-9  # 0.6 - 0.5 must not fail 0.1 by its last bit
    worse = [place for place in range(len(v_C)) if v_C[place] <= highest and place != chosen]
    worse = [place for place in worse if v_C[place] < v_C[chosen] and (threshold is None or v_C[place] < threshold)]
    if not worse:
        return None

    def similarity(place: int) -> float:
        return SequenceMatcher(None, candidates[chosen], candidates[place], autojunk=False).ratio()

    if negatives == "worst":
        return chosen, min(worse, key=v_C.__getitem__)
    return chosen, max(worse, key=lambda place: (similarity(place), -v_C[place]))


def _pair(
    row: dict[str, Any],
    v_C: Sequence[float],
    chosen: int,
    rejected: int,
    processing_class: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    pair = {name: row[name] for name in ("problem_id",) if name in row}
    pair["prompt"] = _prompt_text(row, processing_class) + "".join(row["prefix"])
    for name, place in (("chosen", chosen), ("rejected", rejected)):
        pair |= {name: row["candidates"][place], f"{name}_value": v_C[place]}
    if row.get("candidates_ids") is not None:
        pair["prompt_ids"] = [*row["prompt_ids"], *(token for step in row["prefix_ids"] for token in step)]
        pair |= {"chosen_ids": row["candidates_ids"][chosen], "rejected_ids": row["candidates_ids"][rejected]}
        pair |= {name: row[name] for name in ("tokenizer_fingerprint",) if name in row}
    return pair


def _prompt_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The prompt as the model reads it, without the token that its tokenizer puts before every text."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    if tokenizer is None:
        raise ValueError("its prompt is conversational. Pass the model's tokenizer as `processing_class`.")
    text, _ = render_prompt(row["prompt"], tokenizer, **template_arguments(row))
    adds_begin = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_begin else text


def _values(row: dict[str, Any], column: str) -> list[float]:
    """Values of the candidates, true rewards in their place."""
    values = row[column]
    if values is None or None in values:
        raise ValueError(f"it has no {column!r} for all candidates. Fill them in, or drop the row.")
    if len(values) != len(row["candidates"]):
        raise ValueError(f"it has {len(values)} {column!r} for {len(row['candidates'])} candidates.")
    v_C = with_true_rewards(values, row.get("rewards"))
    check_probabilities(np.asarray(v_C, dtype=np.float64))
    return v_C
