"""
Models and tokenizers given by name, path or as instances: checked before any weights are loaded, then loaded.
"""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file, is_peft_available
from trl.trainer.utils import create_model_from_path, get_config_model_id

from dapo_trl.model_checks import (
    check_critic_config,
    check_model_kind,
    check_peft_config,
    check_policy_config,
    refuse_data_parallel,
    refuse_prompt_learning,
)
from dapo_trl.modeling import adapter_dtype, critic_adapter, transformers_model


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

    from dapo_trl.dapo_config import DAPOConfig
    from dapo_trl.step_critic_config import StepCriticConfig


def check_policy(
    model: "str | PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
    quantization_config: "BitsAndBytesConfig | None" = None,
    peft_config: "PeftConfig | None" = None,
) -> PretrainedConfig:
    """
    Refuse what [`load_policy`] and [`add_adapter`] could not make a policy of, before any weights are loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name on the Hub, path of a folder, or instance.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train.

    Returns:
        [`~transformers.PretrainedConfig`]: of the model.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the path does not exist, the model is no causal language model, arguments for loading are given
            with an instance, the adapter cannot be trained, or several GPUs are visible to this one process.
    """
    check_model_kind(model)
    refuse_data_parallel(model, args)
    if isinstance(model, str):
        config, name, class_name = read_config(model, args), model, ""
        _check_adapter_folder(model, args, peft_config, "policy")
        _init_kwargs(args, quantization_config)
    else:
        _refuse_loading_arguments(args, quantization_config)
        base = transformers_model(model)
        config, class_name = base.config, type(base).__name__
        name = get_config_model_id(config) or class_name
    check_policy_config(config, name, class_name)
    check_peft_config(peft_config, model, config, trust_remote_code=args.trust_remote_code)
    return config


def load_policy(
    model: "str | PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
    quantization_config: "BitsAndBytesConfig | None" = None,
) -> "PreTrainedModel | PeftModel":
    """
    The causal language model to train: loaded if given by name or path, checked in any case.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name on the Hub, path of a folder, or instance. An adapter is loaded onto its base model, to go on with.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.

    Returns:
        The model.

    Raises:
        TypeError: if `model` is of the wrong kind.
        ValueError: as [`check_policy`].
    """
    check_policy(model, args, quantization_config)
    return _load(model, args, quantization_config) if isinstance(model, str) else model


def check_critic(
    model: "str | PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
    quantization_config: "BitsAndBytesConfig | None" = None,
    peft_config: "PeftConfig | None" = None,
) -> PretrainedConfig:
    """
    Refuse what [`load_critic`] and [`add_adapter`] could not make a step critic of, before any weights are loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name on the Hub, path of a folder, or instance.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train.

    Returns:
        [`~transformers.PretrainedConfig`]: of the model.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the path does not exist, no critic can be made of the model, an instance is no token classifier
            with one label, arguments for loading are given with an instance, the adapter cannot be trained, or several
            GPUs are visible to this one process.
    """
    check_model_kind(model)
    refuse_data_parallel(model, args)
    if isinstance(model, str):
        config = read_config(model, args)
        _check_adapter_folder(model, args, peft_config, "critic")
        _init_kwargs(args, quantization_config)
        check_critic_config(config, model)
    else:
        _refuse_loading_arguments(args, quantization_config)
        config = transformers_model(model).config
        _check_critic_instance(transformers_model(model))
    check_peft_config(
        critic_adapter(peft_config), model, config, AutoModelForTokenClassification, args.trust_remote_code
    )
    return config


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
            critic, or an instance of `AutoModelForTokenClassification` with one label. A critic's adapter is loaded
            onto its base model, to go on with.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization, for a model given by name or path.

    Returns:
        The model.

    Raises:
        TypeError: if `model` is of the wrong kind.
        ValueError: as [`check_critic`].
    """
    check_critic(model, args, quantization_config)
    if not isinstance(model, str):
        return model
    return _load(model, args, quantization_config, AutoModelForTokenClassification, num_labels=1)


def check_reference(ref_model: Any, model: Any) -> None:
    """
    Refuse a reference policy that is none.

    Args:
        ref_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] or `None`):
            The argument as it was given.
        model (`str` or `torch.nn.Module`):
            The policy.

    Raises:
        TypeError: if it is no model.
        ValueError: if it is the policy itself, or no causal language model.
    """
    if ref_model is None:
        return
    if isinstance(ref_model, str):
        raise TypeError(
            f"`ref_model` must be a model, got the string {ref_model!r}. Load it with "
            "`AutoModelForCausalLM.from_pretrained`, or omit it if it is the same as `model`."
        )
    if ref_model is model:
        raise ValueError(
            "`ref_model` is the same object as `model`. Omit it: the initial policy is then the reference."
        )
    check_model_kind(ref_model, "ref_model")
    base = transformers_model(ref_model)
    name = get_config_model_id(base.config) or type(base).__name__
    check_policy_config(base.config, name, type(base).__name__, "ref_model")


def read_config(model: str, args: "DAPOConfig | StepCriticConfig") -> PretrainedConfig:
    """
    Configuration of a model given by name or path, read before any weights are loaded; of an adapter, its base model's.

    Raises:
        ValueError: if there is no such folder, or no such model can be reached.
    """
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or (os.sep != "/" and os.sep in model)
    if looks_like_path and not os.path.isdir(model):
        raise ValueError(f"`model` is {model!r}, but there is no such folder. Check the path.")
    revision, adapter = _model_init_kwargs(args).get("revision"), _adapter_config(model, args)
    if adapter is None:
        name, source = model, model
    else:
        source, revision = adapter.base_model_name_or_path, adapter.revision
        name = f"{model}, an adapter of {source}"
        if not source:
            raise ValueError(
                f"`model` is {model!r}, an adapter that does not name its base model. Load both, with "
                "`PeftModel.from_pretrained(base_model, adapter, is_trainable=True)`."
            )
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"`model` is {name!r}, which is neither a local folder with a `config.json` nor a model that can be "
            "reached on the Hub. Check the name and your connection."
        ) from error


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    model: "str | PreTrainedModel | PeftModel",
    args: "DAPOConfig | StepCriticConfig",
) -> PreTrainedTokenizerBase:
    """
    The tokenizer, with a padding token.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or `None`):
            Tokenizer; `None` loads the model's own.
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that it is for.
        args ([`DAPOConfig`] or [`StepCriticConfig`]):
            Configuration with `trust_remote_code`.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`].

    Raises:
        TypeError: if `processing_class` is no tokenizer.
        ValueError: if the tokenizer has no end-of-sequence token, or there is none to load.
    """
    processing_class = _own_tokenizer(model, args) if processing_class is None else processing_class
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` must be a tokenizer, got {type(processing_class).__name__}. Load one with "
            "`AutoTokenizer.from_pretrained`; processors of vision-language models are not supported."
        )
    if processing_class.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no `eos_token`, so the end of a solution could not be learned. Set "
            "`tokenizer.eos_token` to the token that your model ends its answers with."
        )
    if processing_class.pad_token_id is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def _check_critic_instance(base: Any) -> None:
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


def _adapter_config(model: str, args: "DAPOConfig | StepCriticConfig") -> Any:
    """Configuration of the adapter that is at a name or path; `None` if that is a whole model."""
    revision = _model_init_kwargs(args).get("revision")
    if find_adapter_config_file(model, revision=revision) is None:
        return None
    if not is_peft_available():
        raise ImportError(
            f"`model` is {model!r}, an adapter, which needs the peft library: `pip install dapo-trl[peft]`."
        )
    from peft import PeftConfig

    return PeftConfig.from_pretrained(model, revision=revision)


def _check_adapter_folder(model: str, args: Any, peft_config: Any, wanted: str) -> None:
    """Refuse an adapter, given by name or path, of another task or with `peft_config` on top."""
    adapter = _adapter_config(model, args)
    if adapter is None:
        return
    refuse_prompt_learning(adapter, f"`model` is {model!r}, whose adapter")
    if peft_config is not None:
        raise ValueError(
            f"`model` is {model!r}, an adapter, and `peft_config` asks for another one. Omit `peft_config` to go on "
            "training it, or merge it into its base model first and pass that."
        )
    is_critic = adapter.task_type in ("TOKEN_CLS", "SEQ_CLS")
    if wanted == "policy" and is_critic:
        raise ValueError(
            f"`model` is {model!r}, an adapter with `task_type={adapter.task_type!r}`: that looks like a critic or "
            "reward model. A policy must be a causal language model."
        )
    if wanted == "critic" and adapter.task_type != "TOKEN_CLS":
        raise ValueError(
            f"`model` is {model!r}, an adapter with `task_type={adapter.task_type!r}`, not a step critic's. Merge it "
            "into its base model and pass that: its backbone is then loaded under a new scalar head."
        )


def _load(model: str, args: Any, quantization_config: Any, architecture: Any = None, **kwargs: Any) -> Any:
    """A model given by name or path; an adapter on its base model, to be trained further."""
    # TRL annotates `architecture` as an instance, but takes the class
    kwargs = _init_kwargs(args, quantization_config) | kwargs
    adapter = _adapter_config(model, args)
    if adapter is None:
        return create_model_from_path(model, architecture, **kwargs)
    from peft import PeftModel

    revision = kwargs.pop("revision", None)
    if adapter.revision:
        kwargs["revision"] = adapter.revision
    base = create_model_from_path(adapter.base_model_name_or_path, architecture, **kwargs)
    dtype = {} if getattr(base, "is_quantized", False) else adapter_dtype(args)
    return PeftModel.from_pretrained(base, model, is_trainable=True, revision=revision, **dtype)


def _own_tokenizer(model: Any, args: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; of an adapter without one, its base model's."""
    source = model if isinstance(model, str) else get_config_model_id(model.config)
    if not source:
        raise ValueError("The model was built in memory, so its tokenizer cannot be found. Pass `processing_class`.")
    places = [(source, _model_init_kwargs(args).get("revision"))]
    adapter = _adapter_config(model, args) if isinstance(model, str) else None
    if adapter is not None:
        places.append((adapter.base_model_name_or_path, adapter.revision))
    for place, revision in places:
        with contextlib.suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=args.trust_remote_code)
    raise ValueError(f"There is no tokenizer at {source!r} that could be loaded. Pass `processing_class`.")


def _model_init_kwargs(args: "DAPOConfig | StepCriticConfig") -> dict[str, Any]:
    """A copy of `model_init_kwargs`. The configuration has read them by now, if they were given as JSON."""
    kwargs: Any = args.model_init_kwargs
    return dict(kwargs or {})


def _init_kwargs(args: "DAPOConfig | StepCriticConfig", quantization_config: Any) -> dict[str, Any]:
    kwargs = _model_init_kwargs(args)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "`quantization_config` is given twice: to the trainer and in `model_init_kwargs`. Leave one out."
            )
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state is not None and args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each process holds the whole model, or DeepSpeed places it
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def _refuse_loading_arguments(args: "DAPOConfig | StepCriticConfig", quantization_config: Any) -> None:
    if args.model_init_kwargs is not None or quantization_config is not None:
        name = "quantization_config" if quantization_config is not None else "model_init_kwargs"
        raise ValueError(f"`{name}` applies when a model is loaded, but `model` is an instance. Pass its name or path.")
