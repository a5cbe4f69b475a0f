"""
Verifiers: what a completion is worth, from its text alone.

A verifier has TRL's reward-function signature, so that it also works as `reward_funcs` of a `GRPOTrainer`, and returns
one reward per completion: a `float`, or `None` where it cannot judge.
"""

from dapo_trl.verifiers.math import MathVerifier, check_answers, default_verifier, extract_answer, math_reward


__all__ = ["MathVerifier", "check_answers", "default_verifier", "extract_answer", "math_reward"]
