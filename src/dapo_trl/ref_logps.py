"""
Reference log-probabilities as a column of the data: `ref_logps`, one number per step, beside the fingerprint of what
they were computed from. Computed once, they can be saved, published and used on another machine; what does not fit is
refused.
"""

import hashlib
import json
import logging
import math
import re
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, Features, List, Value
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl.trainer.utils import maybe_gather_lm_head_ctx

from dapo_trl.modeling import transformers_model, unwrapped
from dapo_trl.tokenization import tokenizer_fingerprint


logger = logging.getLogger(__name__)

# entries of a configuration that do not change what the weights give for a sequence
_NOT_COMPUTED_FROM = re.compile(
    "^_|^(architectures|auto_map|dtype|torch_dtype|transformers_version|name_or_path|quantization_config|use_cache"
    "|initializer_range|vocab_size|max_position_embeddings|tie_word_embeddings|pretraining_tp|id2label|label2id"
    "|num_labels|problem_type|output_.*|return_dict|.*_token_id|.*dropout.*|.*gradient_checkpointing.*"
    "|.*attn_implementation.*|task_specific_params|finetuning_task)$"
)
_FEATURES = {
    "ref_logps": List(Value("float64")),
    "ref_fingerprint": {"model": Value("string"), "tokenizer": Value("string"), "data": Value("string")},
}


def row_fingerprint(row: dict[str, Any]) -> str:
    """
    Short hash of the token ids of a tokenized row.

    Args:
        row (`dict`):
            Tokenized row, before anything is cut off.

    Returns:
        `str`: 16 hexadecimal digits of a SHA-256.
    """
    return hashlib.sha256(json.dumps([row["context_ids"], row["branches"]]).encode()).hexdigest()[:16]


def read_ref_logps(row: dict[str, Any], tokens: dict[str, Any]) -> list[float]:
    """
    Reference log-probabilities that came with a row.

    Args:
        row (`dict`):
            Row with `ref_logps` (list of float or null, one per step; or null), and `ref_fingerprint` if that is known.
        tokens (`dict`):
            The same row, tokenized.

    Returns:
        `list[float]`: one per step, NaN where there is none.

    Raises:
        ValueError: if there are more or fewer numbers than steps, or they were computed for other tokens.
    """
    num_steps = sum(map(len, tokens["branches"]))
    if row["ref_logps"] is None:
        return [math.nan] * num_steps
    if len(row["ref_logps"]) != num_steps:
        raise ValueError(
            f"column `ref_logps`: expected {num_steps} numbers, one per step, got {len(row['ref_logps'])}. Remove the "
            "column to compute them anew."
        )
    fingerprint, own = row.get("ref_fingerprint"), row_fingerprint(tokens)
    if fingerprint is not None and fingerprint["data"] != own:
        raise ValueError(
            f"column `ref_logps`: computed for other tokens (fingerprint {fingerprint['data']!r}) than this row has "
            f"({own!r}): its prompt, its steps, or the chat template have changed. Remove the column to compute them "
            "anew."
        )
    for step, logp in enumerate(row["ref_logps"]):
        if logp is not None and not math.isfinite(logp):
            raise ValueError(
                f"column `ref_logps`: the number of step {step} is {logp}. A log-probability is finite; remove the "
                "column to compute them anew."
            )
    return [math.nan if logp is None else float(logp) for logp in row["ref_logps"]]


def check_ref_tokenizer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """
    Refuse numbers of another tokenizer; say so when nobody knows whose they are.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows, with or without `ref_logps`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if the numbers come from a model with another tokenizer.
    """
    if "ref_logps" not in dataset.column_names:
        return
    if "ref_fingerprint" not in dataset.column_names:
        logger.warning(
            f"`{name}_dataset` has `ref_logps`, but no `ref_fingerprint` that says whose. They are used as they are: "
            "make sure that they come from the reference policy, or remove the column to compute them anew."
        )
        return
    unknown = sum(
        logps is not None and fingerprint is None
        for logps, fingerprint in zip(dataset["ref_logps"], dataset["ref_fingerprint"], strict=True)
    )
    if unknown:
        logger.warning(
            f"`{name}_dataset`: {unknown} rows have `ref_logps`, but their `ref_fingerprint` is null. Their numbers "
            "are used as they are."
        )
    own = tokenizer_fingerprint(tokenizer)
    for index, fingerprint in enumerate(dataset["ref_fingerprint"]):
        if fingerprint is not None and fingerprint["tokenizer"] != own:
            raise ValueError(
                f"Row {index} of `{name}_dataset`: its `ref_logps` come from a model whose tokenizer has fingerprint "
                f"{fingerprint['tokenizer']!r}, this model's has {own!r}. Use that tokenizer, or remove the column to "
                "compute them anew."
            )


def check_ref_logps_are_complete(prepared: Dataset, name: str) -> None:
    """
    Refuse tokenized rows of which some step has no number.

    Args:
        prepared ([`~datasets.Dataset`]):
            Tokenized rows that are trained on.
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if a number is missing.
    """
    for row in prepared.select_columns(["ref_logps", "source_rows", "source_steps"]):
        for logp, source_row, step in zip(row["ref_logps"], row["source_rows"], row["source_steps"], strict=True):
            if math.isnan(logp):
                raise ValueError(
                    f"Row {source_row} of `{name}_dataset`: `ref_logps` has no number for step {step}, which is "
                    "trained on: they were computed with a smaller `max_length`, or a larger `min_advantage_gap` or "
                    "`min_reliability`. Remove the column to compute them anew."
                )


def check_ref_model(dataset: Dataset, fingerprint: str, name: str) -> None:
    """
    Refuse numbers of another model than the reference policy.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows, with or without `ref_fingerprint`.
        fingerprint (`str`):
            Fingerprint of the reference, see [`model_fingerprint`].
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if a row's numbers come from another model.
    """
    if not {"ref_logps", "ref_fingerprint"} <= set(dataset.column_names):
        return
    for index, other in enumerate(dataset["ref_fingerprint"]):
        if other is not None and other["model"] != fingerprint:
            raise ValueError(
                f"Row {index} of `{name}_dataset`: its `ref_logps` come from a model with fingerprint "
                f"{other['model']!r}, the reference policy has {fingerprint!r}. Give the model that they were computed "
                "with, in the same precision, as `ref_model` (or as `model`, without `ref_model`), or remove the "
                "columns `ref_logps` and `ref_fingerprint` to compute them anew. To use the numbers as they are, "
                "remove `ref_fingerprint` only."
            )


def add_ref_logps(
    dataset: Dataset, prepared: Dataset, model_fingerprint: str, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """
    Put the numbers of tokenized rows back beside the rows that those were made of.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows as they were given.
        prepared ([`~datasets.Dataset`]):
            Tokenized rows with `ref_logps`, and where each pair comes from.
        model_fingerprint (`str`):
            Fingerprint of the reference.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.

    Returns:
        [`~datasets.Dataset`]: the rows with `ref_logps` and `ref_fingerprint`. Null for a row that is not trained on;
        a step that was cut off has null in the place of its number. Rows that came with `ref_logps` are returned as
        they are.
    """
    if "ref_logps" in dataset.column_names:
        return dataset
    numbers: dict[int, dict[int, float]] = {}
    data: dict[int, str] = {}
    columns = ["ref_logps", "source_rows", "source_steps", "source_fingerprints"]
    for row in prepared.select_columns(columns):
        for logp, source, step, fingerprint in zip(*(row[column] for column in columns), strict=True):
            numbers.setdefault(source, {})[step] = logp
            data[source] = fingerprint
    model = {"model": model_fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer)}

    def add(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in numbers:
            return {"ref_logps": None, "ref_fingerprint": None}
        steps = row.get("candidates") or row.get("completions") or (row["chosen"], row["rejected"])
        logps = [numbers[index].get(step) for step in range(len(steps))]
        return {"ref_logps": logps, "ref_fingerprint": model | {"data": data[index]}}

    features = Features({**dataset.features, **_FEATURES})
    return dataset.map(add, with_indices=True, features=features, desc="Adding reference log-probabilities")


def model_fingerprint(model: Any) -> str:
    """
    Short hash of what a model computes: of every parameter its name, shape and up to 256 of its values, evenly spread;
    of what its configuration says beside them, such as the base of rotary embeddings; and of the factors (such as
    lora_alpha / r) of an active adapter.

    The same wherever the model was loaded from, and for a model under an adapter that is switched off. Weights that are
    sharded are gathered one by one.

    Args:
        model (`torch.nn.Module`):
            Model, wrapped or not.

    Returns:
        `str`: 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(unwrapped(model)).items()):
        with maybe_gather_lm_head_ctx(parameter):
            values = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            flat = values.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(256, len(flat)), dtype=torch.float64).long()
            sample = flat[places.to(flat.device)].float().cpu()
            shape = tuple(values.shape)
        digest.update(f"{name} {shape}".encode())
        digest.update(sample.numpy().tobytes())
    digest.update(json.dumps(_computed_from(transformers_model(model).config), sort_keys=True, default=str).encode())
    for scaling in _adapter_scalings(unwrapped(model)):
        digest.update(f"{scaling}".encode())
    return digest.hexdigest()[:16]


def _computed_from(config: PretrainedConfig) -> dict[str, Any]:
    """
    What a configuration says about computation in evaluation mode: no names, paths and versions, nothing for training
    or generation, nothing that weights show. What is off counts as absent: other versions may not know of it.
    """
    given = config.get_text_config().to_diff_dict()
    return {
        name: value
        for name, value in given.items()
        if value is not None and value is not False and not _NOT_COMPUTED_FROM.search(name)
    }


def _base_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters by the names that they have without an adapter around; an active adapter's come with their own."""
    if not is_peft_model(model):
        return dict(model.named_parameters())
    base, adapters = {}, {}
    prefix = "base_model.model."
    active = set(model.active_adapters) if _has_active_adapter(model) else set()
    for name, parameter in model.named_parameters():
        parts = name.removeprefix(prefix).split(".")
        if any(part in model.peft_config for part in parts):
            if active & set(parts):
                adapters[".".join("adapter" if part in active else part for part in parts)] = parameter
        else:
            base[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = parameter
    return base | adapters


def _adapter_scalings(model: Any) -> list[float]:
    """Factors of the active adapter's layers, in their order; empty without one."""
    if not is_peft_model(model) or not _has_active_adapter(model):
        return []
    scalings = [getattr(layer, "scaling", {}) for layer in _adapter_layers(model)]
    return [scaling[name] for scaling in scalings for name in model.active_adapters if name in scaling]


def _has_active_adapter(model: Any) -> bool:
    return any(not layer.disable_adapters for layer in _adapter_layers(model))


def _adapter_layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
