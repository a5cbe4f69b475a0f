"""
What the trainers refuse of models and adapters: from the configuration alone where that says enough, so that nobody
waits for weights to be loaded first.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import is_peft_model
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import is_peft_available


if TYPE_CHECKING:
    from peft import PeftConfig

_CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification", "RewardModel")


def check_model_kind(model: Any, name: str = "model") -> None:
    """
    Refuse what is no model, or is wrapped in something that the trainer puts around it itself.

    Args:
        model (`str` or `torch.nn.Module`):
            The argument as it was given.
        name (`str`, *optional*, defaults to `"model"`):
            Name of the argument, for messages.

    Raises:
        TypeError: if it is of another kind.
        ValueError: if it is wrapped, or an adapter was put into it by `load_adapter`.
    """
    if isinstance(model, str):
        return
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"`{name}` is wrapped in `{type(model).__name__}`. Pass `{name}.module`, and start the script with "
            "`accelerate launch` to use several GPUs."
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"`{name}` is compiled. Pass the model itself, and set `torch_compile=True` to compile it.")
    if not isinstance(model, PreTrainedModel) and not (isinstance(model, torch.nn.Module) and is_peft_model(model)):
        kinds = "a name, a path, " if name == "model" else ""
        raise TypeError(f"`{name}` must be {kinds}a `PreTrainedModel` or a `PeftModel`, got {type(model).__name__}.")
    if getattr(model, "_hf_peft_config_loaded", False) and not is_peft_model(model):
        raise ValueError(
            f"`{name}` had an adapter put into it by `load_adapter`, which cannot be told from its own weights. Load "
            "it with `PeftModel.from_pretrained(base_model, adapter, is_trainable=True)`."
        )


def refuse_data_parallel(model: Any, args: Any) -> None:
    """
    Refuse several GPUs in one process: `Trainer` would wrap the model in `nn.DataParallel`, or TRL split it over them.

    Args:
        model (`str` or `torch.nn.Module`):
            The argument as it was given.
        args ([`~transformers.TrainingArguments`]):
            Configuration; reads `n_gpu`, and `model_init_kwargs` for a model given by name or path.

    Raises:
        ValueError: if several GPUs are visible. A model that is to lie on several devices, by a `device_map` of the
            user's own, is let through.
    """
    if args.n_gpu <= 1:
        return
    is_split = (
        "device_map" in (args.model_init_kwargs or {}) or len(set(getattr(model, "hf_device_map", {}).values())) > 1
    )
    if not is_split:
        raise ValueError(
            f"`nn.DataParallel` is not supported, and {args.n_gpu} GPUs are visible to this one process. Start the "
            "script with `accelerate launch`, or set `CUDA_VISIBLE_DEVICES` to a single one."
        )


def check_policy_config(config: PretrainedConfig, name: str, class_name: str = "", argument: str = "model") -> None:
    """
    Refuse what is no causal language model.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.
        name (`str`):
            Name or path of the model, for messages.
        class_name (`str`, *optional*):
            Class of the model, if it is an instance. By default what the configuration says.
        argument (`str`, *optional*, defaults to `"model"`):
            Name of the argument, for messages.

    Raises:
        ValueError: for a classifier (such as a step critic), an encoder-decoder, a vision-language model, an encoder or
            a model without a head.
    """
    kind = class_name or next(iter(config.architectures or []), "")
    if any(classifier in kind for classifier in _CLASSIFIERS):
        raise ValueError(
            f"`{argument}` is {name!r}, a {kind}: that looks like a critic or reward model. A policy must be a causal "
            "language model."
        )
    _refuse_architecture(config, name, argument)
    if not kind:
        raise ValueError(
            f"`{argument}` is {name!r}, whose `config.json` names no `architectures`. Save the model with "
            "`save_pretrained`."
        )
    known = {kind for kinds in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for kind in _as_tuple(kinds)}
    if hasattr(transformers, kind) and kind not in known:
        raise ValueError(
            f"`{argument}` is {name!r}, a {kind}, which is no causal language model. Load it with "
            "`AutoModelForCausalLM`, or choose another one."
        )


def check_critic_config(config: PretrainedConfig, name: str) -> None:
    """
    Refuse what no step critic can be made of.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of a model given by name or path.
        name (`str`):
            Name or path of the model, for messages.

    Raises:
        ValueError: for an encoder-decoder, a vision-language model, an encoder, a classifier with several labels, or an
            architecture without a token classifier.
    """
    _refuse_architecture(config, name, "model")
    kind = next(iter(config.architectures or []), "")
    if any(classifier in kind for classifier in _CLASSIFIERS) and config.num_labels != 1:
        raise ValueError(
            f"A step critic has one label, the value of a step, but `model` is {name!r}, a {kind} with "
            f"{config.num_labels}. Start from a causal language model or from a step critic."
        )
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(
            f"`model` is {name!r}, but transformers has no token classifier for {config.model_type!r} models, which a "
            "step critic is. Choose another one: it need not be of the policy's family."
        )


def check_peft_config(
    peft_config: Any,
    model: Any,
    config: PretrainedConfig,
    architecture: Any = AutoModelForCausalLM,
    trust_remote_code: bool = False,
) -> None:
    """
    Refuse an adapter that cannot be trained here.

    Args:
        peft_config ([`~peft.PeftConfig`] or `None`):
            The argument as it was given.
        model (`str` or `torch.nn.Module`):
            The model that it is for.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of that model.
        architecture (*optional*, defaults to [`~transformers.AutoModelForCausalLM`]):
            Class that loads that model.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a model given by name may have Python code of its own.

    Raises:
        ImportError: if peft is not installed.
        TypeError: if it is no `PeftConfig`.
        ValueError: for prompt learning, an adapter on top of an adapter, or of a model given by name: for LoRA on the
            LM head or on modules that the model has not.
    """
    if peft_config is None:
        return
    if not is_peft_available():
        raise ImportError("`peft_config` needs the peft library: `pip install dapo-trl[peft]`.")
    from peft import LoraConfig, PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.PeftConfig`, got {type(peft_config).__name__}. Write "
            "`peft.LoraConfig(...)`."
        )
    refuse_prompt_learning(peft_config, "`peft_config`")
    if not isinstance(model, str) and is_peft_model(model):
        raise ValueError(
            "`model` already has an adapter, and `peft_config` asks for another one. Omit `peft_config` to go on "
            "training it, or merge it first with `model.merge_and_unload()`."
        )
    if isinstance(model, str) and isinstance(peft_config, LoraConfig):
        _try_adapter(peft_config, config, architecture, trust_remote_code)


def refuse_prompt_learning(config: "PeftConfig", name: str) -> None:
    """
    Refuse adapters that are virtual tokens.

    Args:
        config ([`~peft.PeftConfig`]):
            Adapter.
        name (`str`):
            What it is called in messages.

    Raises:
        ValueError: if it is prompt learning.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"{name} is prompt learning ({config.peft_type}), whose virtual tokens would shift every step. "
            "Use LoRA, for example `peft.LoraConfig()`."
        )


def check_active_adapter(model: Any) -> None:
    """
    Refuse an adapter that could not be trained.

    Args:
        model ([`~peft.PeftModel`]):
            Model with adapter.

    Raises:
        ValueError: for prompt learning, or an adapter that was loaded for inference.
    """
    config = model.peft_config[model.active_adapter] if isinstance(model.active_adapter, str) else None
    if config is not None:
        refuse_prompt_learning(config, "The adapter of `model`")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of `model` is trained: its adapter was loaded for inference. Load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )


def refuse_adapted_head(model: Any) -> None:
    """
    Refuse an adapter on the LM head: log-probabilities are computed from the head's own weights.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.

    Raises:
        ValueError: if there is one. A head that is trained as a whole (`modules_to_save`) is no adapter.
    """
    if not is_peft_model(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(model.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper):
        raise ValueError(
            "`peft_config` puts an adapter on the LM head. Log-probabilities are computed from its weights directly, "
            "so that adapter would never be trained. Remove `lm_head` from `target_modules` (and "
            "`trainable_token_indices` if the embeddings are tied to it), or train it whole by `modules_to_save`."
        )


def _refuse_architecture(config: PretrainedConfig, name: str, argument: str) -> None:
    if config.is_encoder_decoder:
        raise ValueError(
            f"`{argument}` is {name!r}, an encoder-decoder model. Only causal language models are supported."
        )
    if hasattr(config, "vision_config") or config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"`{argument}` is {name!r}, a vision-language model, which is not supported. Use a text model, or save the "
            "language model in it as one of its own."
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"`{argument}` is {name!r}, an encoder ({config.model_type}): each token sees those after it, so that a "
            "step would be judged by what follows. Use a causal language model."
        )


def _try_adapter(peft_config: Any, config: PretrainedConfig, architecture: Any, trust_remote_code: bool) -> None:
    """Put the adapter on a model without weights; ZeRO-3 cannot have one, so that peft complains after loading."""
    from peft import get_peft_model

    if is_deepspeed_zero3_enabled():
        return
    peft_config = copy.deepcopy(peft_config)
    peft_config.init_lora_weights = True  # others start from weights
    with torch.device("meta"):
        model: Any = architecture.from_config(config, trust_remote_code=trust_remote_code)
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ValueError(f"`peft_config` does not fit `model`: {error}") from error
    refuse_adapted_head(model)


def _as_tuple(kinds: Any) -> tuple[str, ...]:
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)
