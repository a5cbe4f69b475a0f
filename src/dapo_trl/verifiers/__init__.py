"""
Verifiers: what a completion is worth, from its text alone.

A verifier has TRL's reward-function signature, so that it also works as `reward_funcs` of a `GRPOTrainer`, and returns
one reward per completion: a `float`, or `None` where it cannot judge.
"""

from dapo_trl.verifiers.code import CodeVerifier, check_tests, code_reward, default_code_verifier, extract_code
from dapo_trl.verifiers.math import MathVerifier, check_answers, default_verifier, extract_answer, math_reward


__all__ = [
    "CodeVerifier",
    "MathVerifier",
    "check_answers",
    "check_tests",
    "code_reward",
    "default_code_verifier",
    "default_verifier",
    "extract_answer",
    "extract_code",
    "math_reward",
]
