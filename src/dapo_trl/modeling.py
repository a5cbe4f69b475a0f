"""
What both trainers do to models and tokenizers before training: load them, check them, wrap them.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_peft_available
from trl.trainer.utils import create_model_from_path, get_config_model_id


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

    from dapo_trl.dapo_config import DAPOConfig
    from dapo_trl.step_critic_config import StepCriticConfig

logger = logging.getLogger(__name__)

_CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification", "RewardModel")


def load_policy(
    model: "str | PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
    quantization_config: "BitsAndBytesConfig | None" = None,
) -> "PreTrainedModel | PeftModel":
    """
    The causal language model to train: loaded if given by name or path, checked in any case.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name on the Hub, path of a folder, or instance.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.

    Returns:
        The model.

    Raises:
        ValueError: if the path does not exist, the model is a classifier (such as a step critic) or an encoder-decoder,
            or arguments for loading are given with an instance.
    """
    if isinstance(model, str):
        _check_policy(read_config(model, args), model)
        return create_model_from_path(model, **_init_kwargs(args, quantization_config))
    _refuse_loading_arguments(args, quantization_config)
    base = _base_model(model)
    _check_policy(base.config, get_config_model_id(base.config) or type(base).__name__, type(base).__name__)
    return model


def load_critic(
    model: "str | PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
    quantization_config: "BitsAndBytesConfig | None" = None,
) -> "PreTrainedModel | PeftModel":
    """
    The step critic to train: a token classifier with one label.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name or path of any causal language model (its backbone is used under a new scalar head) or of a step
            critic, or an instance of `AutoModelForTokenClassification` with one label.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.

    Returns:
        The model.

    Raises:
        ValueError: if the path does not exist, an instance is no token classifier with one label, or arguments for
            loading are given with an instance.
    """
    if isinstance(model, str):
        read_config(model, args)
        kwargs = _init_kwargs(args, quantization_config) | {"num_labels": 1}
        architecture: Any = AutoModelForTokenClassification  # TRL annotates an instance, but takes the class
        return create_model_from_path(model, architecture, **kwargs)
    _refuse_loading_arguments(args, quantization_config)
    base = _base_model(model)
    if not type(base).__name__.endswith("ForTokenClassification"):
        raise ValueError(
            f"A step critic is a token classifier with one label, but `model` is a {type(base).__name__}. Pass the "
            "name or path of the model instead: its backbone is then loaded under a new scalar head."
        )
    if base.config.num_labels != 1:
        raise ValueError(
            f"A step critic has one label, the value of a step, but `model` has {base.config.num_labels}. Load it with "
            "`num_labels=1`."
        )
    return model


def read_config(model: str, args: "DAPOConfig | StepCriticConfig") -> PretrainedConfig:
    """
    Configuration of a model given by name or path, read before any weights are loaded.

    Raises:
        ValueError: if there is no such folder, or no such model can be reached.
    """
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or (os.sep != "/" and os.sep in model)
    if looks_like_path and not os.path.isdir(model):
        raise ValueError(f"`model` is {model!r}, but there is no such folder. Check the path.")
    kwargs = _model_init_kwargs(args)
    try:
        return AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        raise ValueError(
            f"`model` is {model!r}, which is neither a local folder with a `config.json` nor a model that can be "
            "reached on the Hub. Check the name and your connection."
        ) from error


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    model: "PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
) -> PreTrainedTokenizerBase:
    """
    The tokenizer, with a padding token that the model's configuration agrees with.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or `None`):
            Tokenizer; `None` loads the model's own.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that it is for.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `trust_remote_code`.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`].

    Raises:
        TypeError: if `processing_class` is no tokenizer.
        ValueError: if the tokenizer has no end-of-sequence token, or there is none to load.
    """
    if processing_class is None:
        model_id = get_config_model_id(model.config)
        if not model_id:
            raise ValueError(
                "The model was built in memory, so its tokenizer cannot be found. Pass `processing_class`."
            )
        processing_class = AutoTokenizer.from_pretrained(
            model_id,
            revision=_model_init_kwargs(args).get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` must be a tokenizer, got {type(processing_class).__name__}. Processors of "
            "vision-language models are not supported."
        )
    if processing_class.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no `eos_token`, so the end of a solution could not be learned. Set "
            "`tokenizer.eos_token` to the token that your model ends its answers with."
        )
    if processing_class.pad_token_id is None:
        processing_class.pad_token = processing_class.eos_token
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = processing_class.pad_token_id
    return processing_class


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
        ValueError: for prompt learning, or an adapter on top of an adapter.
    """
    if peft_config is not None:
        if not is_peft_available():
            raise ImportError("`peft_config` needs the peft library: `pip install dapo-trl[peft]`.")
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, got {type(peft_config).__name__}.")
        _refuse_prompt_learning(peft_config, "`peft_config`")
        if is_peft_model(model):
            raise ValueError(
                "`model` already has an adapter, and `peft_config` asks for another one. Omit `peft_config` to go on "
                "training it, or merge it first with `model.merge_and_unload()`."
            )
        # DeepSpeed ZeRO-3 gathers parameters into buffers of one dtype, so the adapter must keep the model's. Can go
        # once https://github.com/deepspeedai/DeepSpeed/issues/8072 is fixed.
        is_zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        is_quantized = getattr(model, "is_quantized", False)
        kwargs: dict[str, Any] = {"autocast_adapter_dtype": False} if is_zero3 and not is_quantized else {}
        model = get_peft_model(model, peft_config, **kwargs)
    if is_peft_model(model):
        _check_adapter(model)
    if is_peft_model(model) and args.gradient_checkpointing:
        # Checkpointed layers need an input that requires a gradient. Can go once
        # https://github.com/huggingface/transformers/issues/42489 is fixed.
        model.enable_input_require_grads()
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
            classifier: peft then trains and saves the head beside the adapter.

    Returns:
        [`~peft.PeftConfig`] or `None`.

    Raises:
        ValueError: if it is for another task.
    """
    task_type = getattr(peft_config, "task_type", None)
    if peft_config is None or task_type == "TOKEN_CLS" or not hasattr(peft_config, "task_type"):
        return peft_config
    if task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f'`peft_config` has `task_type="{task_type}"`. A step critic needs `task_type="TOKEN_CLS"`.')
    peft_config = copy.copy(peft_config)
    peft_config.task_type = "TOKEN_CLS"
    return peft_config


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


def _refuse_prompt_learning(config: "PeftConfig", name: str) -> None:
    if config.is_prompt_learning:
        raise ValueError(
            f"{name} is prompt learning ({config.peft_type}), whose virtual tokens would shift every step. "
            "Use LoRA, for example `peft.LoraConfig()`."
        )


def _check_adapter(model: "PreTrainedModel | PeftModel") -> None:
    config = model.peft_config[model.active_adapter] if isinstance(model.active_adapter, str) else None
    if config is not None:
        _refuse_prompt_learning(config, "The adapter of `model`")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of `model` is trained: its adapter was loaded for inference. Load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )


def _check_policy(config: PretrainedConfig, name: str, class_name: str = "") -> None:
    architectures = [class_name] if class_name else list(config.architectures or [])
    if any(kind in architecture for architecture in architectures for kind in _CLASSIFIERS):
        raise ValueError(
            f"`model` is {name!r}, a {architectures[0]}: that looks like a critic or reward model. A policy must be a "
            "causal language model."
        )
    if config.is_encoder_decoder:
        raise ValueError(f"`model` is {name!r}, an encoder-decoder model. Only causal language models are supported.")


def _model_init_kwargs(args: "DAPOConfig | StepCriticConfig") -> dict[str, Any]:
    """A copy of `model_init_kwargs`. The configuration has read them by now, if they were given as JSON."""
    kwargs: Any = args.model_init_kwargs
    return dict(kwargs or {})


def _init_kwargs(args: "DAPOConfig | StepCriticConfig", quantization_config: Any) -> dict[str, Any]:
    kwargs = _model_init_kwargs(args)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError("`quantization_config` is given twice: to the trainer and in `model_init_kwargs`.")
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state is not None and args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each process holds the whole model, or DeepSpeed places it
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def _refuse_loading_arguments(args: "DAPOConfig | StepCriticConfig", quantization_config: Any) -> None:
    if args.model_init_kwargs is not None or quantization_config is not None:
        name = "quantization_config" if quantization_config is not None else "model_init_kwargs"
        raise ValueError(f"`{name}` applies when a model is loaded, but `model` is an instance. Pass its name or path.")
