"""
Direct Advantage Policy Optimization (arXiv 2412.18279) for Hugging Face TRL: step values, a separate step critic, and
offline, step-level policy training. Not ByteDance's DAPO (arXiv 2503.14476).

Importing the package does no work: a public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dapo_trl._version import __version__


if TYPE_CHECKING:
    from dapo_trl.advantages import add_advantages, sibling_advantages, step_advantages
    from dapo_trl.callbacks import AccuracyCallback, SolutionTableCallback
    from dapo_trl.dapo_config import DAPOConfig
    from dapo_trl.dapo_trainer import DAPOTrainer
    from dapo_trl.diagnosis import diagnose
    from dapo_trl.engines import SamplingConfig
    from dapo_trl.engines.openai import OpenAIEngine
    from dapo_trl.engines.transformers import TransformersEngine
    from dapo_trl.engines.vllm import VLLMEngine
    from dapo_trl.evaluation import evaluate_policy
    from dapo_trl.formats import check_dataset
    from dapo_trl.losses import critic_loss, dapo_loss
    from dapo_trl.rollouts import RolloutConfig, collect_rollouts
    from dapo_trl.run_folder import held_out_problems
    from dapo_trl.stages import sample_stage, value_stage
    from dapo_trl.step_critic_config import StepCriticConfig
    from dapo_trl.step_critic_trainer import StepCriticTrainer
    from dapo_trl.steps import split_step_ids, split_steps
    from dapo_trl.verifiers.math import math_reward

_MODULE_OF_NAME = {
    "AccuracyCallback": "callbacks",
    "DAPOConfig": "dapo_config",
    "DAPOTrainer": "dapo_trainer",
    "OpenAIEngine": "engines.openai",
    "RolloutConfig": "rollouts",
    "SamplingConfig": "engines",
    "SolutionTableCallback": "callbacks",
    "StepCriticConfig": "step_critic_config",
    "StepCriticTrainer": "step_critic_trainer",
    "TransformersEngine": "engines.transformers",
    "VLLMEngine": "engines.vllm",
    "add_advantages": "advantages",
    "check_dataset": "formats",
    "collect_rollouts": "rollouts",
    "critic_loss": "losses",
    "dapo_loss": "losses",
    "diagnose": "diagnosis",
    "evaluate_policy": "evaluation",
    "held_out_problems": "run_folder",
    "math_reward": "verifiers.math",
    "sample_stage": "stages",
    "sibling_advantages": "advantages",
    "split_step_ids": "steps",
    "split_steps": "steps",
    "step_advantages": "advantages",
    "value_stage": "stages",
}

__all__ = [
    "AccuracyCallback",
    "DAPOConfig",
    "DAPOTrainer",
    "OpenAIEngine",
    "RolloutConfig",
    "SamplingConfig",
    "SolutionTableCallback",
    "StepCriticConfig",
    "StepCriticTrainer",
    "TransformersEngine",
    "VLLMEngine",
    "__version__",
    "add_advantages",
    "check_dataset",
    "collect_rollouts",
    "critic_loss",
    "dapo_loss",
    "diagnose",
    "evaluate_policy",
    "held_out_problems",
    "math_reward",
    "sample_stage",
    "sibling_advantages",
    "split_step_ids",
    "split_steps",
    "step_advantages",
    "value_stage",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
