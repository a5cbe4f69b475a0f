"""
What is done to loaded models: wrap them in adapters, look under wrappers, warn; give their memory back.
"""

import contextlib
import copy
import gc
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dapo_trl.model_checks import check_active_adapter, check_peft_config


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from dapo_trl.dapo_config import DAPOConfig
    from dapo_trl.step_critic_config import StepCriticConfig

_HEADS = ("score", "classifier")  # of token classifiers; peft trains and saves the same

logger = logging.getLogger(__name__)


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_padding(model: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Make the model's configuration agree with the tokenizer on the padding token.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
    """
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def add_adapter(
    model: "PreTrainedModel | PeftModel", peft_config: "PeftConfig | None", args: "DAPOConfig | StepCriticConfig"
) -> "PreTrainedModel | PeftModel":
    """
    Wrap the model with an adapter, if one is asked for.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to wrap.
        peft_config ([`~peft.PeftConfig`] or `None`):
            Adapter; `None` leaves the model as it is.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration; reads `deepspeed_plugin` and `gradient_checkpointing`.

    Returns:
        The model.

    Raises:
        ImportError: if peft is not installed.
        TypeError: if `peft_config` is none.
        ValueError: if the adapter cannot be trained.
    """
    if peft_config is not None:
        check_peft_config(peft_config, model, model.config)
        from peft import get_peft_model

        kwargs = {} if getattr(model, "is_quantized", False) else adapter_dtype(args)
        model = get_peft_model(model, peft_config, **kwargs)
    if is_peft_model(model):
        check_active_adapter(model)
        if args.gradient_checkpointing:
            _checkpoint_with_adapter(model, args)
    return model


def transformers_model(model: Any) -> Any:
    """
    The transformers model under what accelerate, DeepSpeed and peft put around it.

    Args:
        model (`torch.nn.Module`):
            Model, wrapped or not.

    Returns:
        [`~transformers.PreTrainedModel`].
    """
    return _base_model(unwrapped(model))


def unwrapped(model: Any) -> Any:
    """
    The model under what accelerate and DeepSpeed put around it; an adapter stays.

    Args:
        model (`torch.nn.Module`):
            Model, wrapped or not.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`].
    """
    return extract_model_from_parallel(model)


@contextlib.contextmanager
def backbone_outputs_at(model: Any, index: torch.Tensor) -> Iterator[None]:
    """
    Within this context the model's LM head gets the backbone's hidden states at the given places only, as one row.

    Args:
        model (`torch.nn.Module`):
            Causal language model, wrapped or not. TRL's fused LM head calls its backbone.
        index (`torch.Tensor` of shape `(N,)`):
            Places (row * T + position).
    """

    def gather(module: Any, args: Any, output: Any) -> Any:
        states = output.last_hidden_state.flatten(0, 1)
        output["last_hidden_state"] = states.index_select(0, index.to(states.device))[None]
        return output

    handle = transformers_model(model).base_model.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _base_model(model: Any) -> Any:
    """The model under its adapter, where it has one."""
    return model.get_base_model() if is_peft_model(model) else model


def critic_adapter(peft_config: "PeftConfig | None") -> "PeftConfig | None":
    """
    The adapter for a step critic: one that trains and saves the scalar head too.

    Args:
        peft_config ([`~peft.PeftConfig`] or `None`):
            Adapter as given. Without a task type, or with that of a language model, a copy of it is made one of a token
            classifier: peft then trains and saves the head beside the adapter. That head is not among the modules of
            `target_modules="all-linear"`.

    Returns:
        [`~peft.PeftConfig`] or `None`.

    Raises:
        ValueError: if it is for another task.
    """
    task_type = getattr(peft_config, "task_type", None)
    if peft_config is None or not hasattr(peft_config, "task_type"):
        return peft_config
    if task_type not in (None, "CAUSAL_LM", "TOKEN_CLS"):
        raise ValueError(f'`peft_config` has `task_type="{task_type}"`. A step critic needs `task_type="TOKEN_CLS"`.')
    adapter: Any = copy.copy(peft_config)
    adapter.task_type = "TOKEN_CLS"
    if getattr(adapter, "target_modules", None) == "all-linear":  # peft leaves out the heads of other tasks only
        excluded = adapter.exclude_modules or []
        heads = rf"(.*\.)?({'|'.join(_HEADS)})"
        adapter.exclude_modules = f"{excluded}|{heads}" if isinstance(excluded, str) else [*excluded, *_HEADS]
    return adapter


def check_head_is_trained(model: "PreTrainedModel | PeftModel") -> None:
    """
    Refuse a critic with an adapter that leaves its scalar head as it was initialised.

    Raises:
        ValueError: if the head is neither trained nor saved.
    """
    if is_peft_model(model) and not any(
        parameter.requires_grad for name, parameter in model.named_parameters() if "modules_to_save" in name
    ):
        raise ValueError(
            "The adapter of `model` does not include the scalar head, which would stay random. Create it with "
            '`task_type="TOKEN_CLS"`, or pass the plain model and `peft_config`.'
        )


def warn_of_low_precision(model: "PreTrainedModel | PeftModel", args: "DAPOConfig | StepCriticConfig") -> None:
    """
    Warn when the weights to be trained are in a precision in which steps of this size vanish.

    A step of AdamW is about the learning rate; bfloat16 holds a weight of 0.02 to 1e-4. Weights belong in float32;
    mixed precision (`bf16=True`) is what saves time.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    low = dtypes & {torch.bfloat16, torch.float16}
    if low and args.learning_rate < 1e-4 and not is_peft_model(model):
        logger.warning(
            f"The weights to be trained are in {', '.join(map(str, low))}: with `learning_rate={args.learning_rate}` "
            "most updates are rounded away. Load the model in float32, and set `bf16=True` for mixed precision."
        )


def adapter_dtype(args: "DAPOConfig | StepCriticConfig") -> dict[str, Any]:
    """
    Arguments with which an adapter's weights get the precision that training needs.

    DeepSpeed ZeRO-3 gathers parameters into buffers of one dtype, so an adapter must keep the model's. Can go once
    https://github.com/deepspeedai/DeepSpeed/issues/8072 is fixed.

    Args:
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration; reads `deepspeed_plugin`.

    Returns:
        `dict[str, Any]`: for `get_peft_model` or `PeftModel.from_pretrained`, if the model is not quantized.
    """
    return {"autocast_adapter_dtype": False} if _is_zero3(args) else {}


def _is_zero3(args: Any) -> bool:
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def _checkpoint_with_adapter(model: Any, args: Any) -> None:
    """What gradient checkpointing needs of a model whose own weights are frozen."""
    if _is_zero3(args):
        # DeepSpeed partitions weights again before non-reentrant checkpointing computes with them, see
        # https://github.com/huggingface/trl/issues/2514. Can go once https://github.com/deepspeedai/DeepSpeed/pull/8130
        # is released.
        kwargs = dict(args.gradient_checkpointing_kwargs or {})
        if kwargs.get("use_reentrant") is False:
            logger.warning(
                "An adapter under DeepSpeed ZeRO-3 with gradient checkpointing needs `use_reentrant=True`, so that "
                "`gradient_checkpointing_kwargs` is changed to that. Set it, or leave it out, to silence this."
            )
        args.gradient_checkpointing_kwargs = kwargs | {"use_reentrant": True}
    # Checkpointed layers need an input that requires a gradient. Can go once
    # https://github.com/huggingface/transformers/issues/42489 is fixed.
    model.enable_input_require_grads()
