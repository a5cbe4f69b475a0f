"""
What is refused before anything is sampled, because it would fail after hours: settings of training that no trainer
takes, reports that nobody can receive, adapters that do not fit, models in parts that cannot be sampled from.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.integrations import get_reporting_integration_callbacks
from trl import get_peft_config

from dapo_trl.model_checks import check_peft_config
from dapo_trl.model_identity import weight_files
from dapo_trl.modeling import critic_adapter
from dapo_trl.recipe_arguments import trainer_configs
from dapo_trl.run_folder import CRITIC_SEEDS
from dapo_trl.settings import SettingsError


if TYPE_CHECKING:
    from dapo_trl.recipe import Recipe


_LARGEST_SEED = 2**32 - 1  # of NumPy


def refuse_bad_training(recipe: "Recipe") -> None:
    """
    Refuse what a trainer would refuse.

    Args:
        recipe ([`~dapo_trl.recipe.Recipe`]):
            The run.

    Raises:
        SettingsError: if a section cannot be used; the message names it.
    """
    for section, kind in trainer_configs().items():
        given = getattr(recipe.arguments, section)
        try:
            args = kind(str(recipe.folder / section), **recipe.training_arguments(given, recipe.model))
            largest = _LARGEST_SEED
            if section == "critic":
                largest -= CRITIC_SEEDS * (recipe.arguments.num_critics - 1)
            if not 0 <= args.seed <= largest:
                raise ValueError(f"`seed` must be from 0 to {largest}, got {args.seed}.")
            if section == "policy" and str(args.eval_strategy.value) != "no":
                raise ValueError(
                    "`eval_strategy` needs rows to evaluate on, which the policy has none of: a run measures its "
                    "accuracy instead. Remove it."
                )
            _refuse_reports(args.report_to)
            _refuse_parts(recipe, args)
        except (TypeError, ValueError, ImportError, RuntimeError) as error:
            raise SettingsError(f"`{section}`: {error}") from error


def _refuse_reports(names: Any) -> None:
    """Refuse a place for metrics that is unknown, not installed or closed."""
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"`report_to` is {names}: {error}") from error
    if "wandb" in (names or []) and not _is_wandb_ready():
        raise ValueError(
            "`report_to` is 'wandb', but nobody is logged in. Call `wandb login`, or set WANDB_API_KEY, or "
            "WANDB_MODE=offline."
        )


def _is_wandb_ready() -> bool:
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return True
    if parse_flag_from_env("WANDB_DISABLED") or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return bool(wandb.api.api_key)


def _refuse_parts(recipe: "Recipe", args: Any) -> None:
    """Refuse models whose weights lie in parts on several GPUs where one GPU needs them whole."""
    plugin: Any = args.deepspeed_plugin
    is_zero3 = plugin is not None and plugin.zero_stage == 3
    is_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    name = "DeepSpeed ZeRO-3" if is_zero3 else "FSDP"
    if not (is_zero3 or is_fsdp):
        return
    if recipe.model_config.use_peft:
        raise ValueError(
            f"{name} keeps the model in parts, but the adapter of `use_peft` is merged into a whole one after "
            "training. Use DeepSpeed ZeRO-2."
        )
    if recipe.arguments.engine == "transformers":
        raise ValueError(
            f"{name} holds the model in parts, but `engine: transformers` samples in every process with a whole one. "
            "Use DeepSpeed ZeRO-2, or servers (`engine: openai`)."
        )
    if is_zero3 and not plugin.deepspeed_config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"{name} would save models without the weights that the next stage loads. Use DeepSpeed ZeRO-2, or set "
            "`zero3_save_16bit_model: true` in the configuration of accelerate (in that of DeepSpeed, "
            "`stage3_gather_16bit_weights_on_model_save`)."
        )


def refuse_empty_folder(name: str, model: str | None) -> None:
    """
    Refuse a folder that holds no model.

    Args:
        name (`str`):
            Argument that names it.
        model (`str`, *optional*):
            Name or path of a model.

    Raises:
        SettingsError: if it is a folder without weights.
    """
    folder = Path(model or "")
    if not model or not folder.is_dir():
        return
    if not weight_files(model):
        raise SettingsError(f"`{name}` is {model!r}, a folder without weights: no `*.safetensors`. Check the path.")
    if not (folder / "config.json").exists() and (folder / "merged").exists():
        merged = str(folder / "merged")
        raise SettingsError(f"`{name}` is {model!r}, an adapter. The model that it makes is {merged!r}: name that.")


def refuse_misfit_adapter(recipe: "Recipe") -> None:
    """
    Refuse an adapter that does not fit the models, without loading their weights.

    Args:
        recipe ([`~dapo_trl.recipe.Recipe`]):
            The run.

    Raises:
        SettingsError: if there is one.
    """
    adapter: Any = get_peft_config(recipe.model_config)
    if adapter is None:
        return
    a = recipe.arguments
    models: list[tuple[str, Any, Any]] = [(recipe.model, adapter, AutoModelForCausalLM)]
    if a.values != "monte_carlo":
        critic = a.critic_model_name_or_path or recipe.model
        models.append((critic, critic_adapter(adapter), AutoModelForTokenClassification))
    for model, given, architecture in models:
        trusted, revision = a.trust_remote_code, recipe.revision_of(model)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
        try:
            check_peft_config(given, model, config, architecture, trusted)
        except ValueError as error:
            raise SettingsError(f"`use_peft` of {model!r}: {error}") from error
