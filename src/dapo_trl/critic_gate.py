"""
The gate before the policy: a critic without skill is refused, unless the recipe allows it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_trl.diagnosing import describe
from dapo_trl.diagnosis import ENOUGH_PROBLEMS, MAX_CALIBRATION_ERROR, MIN_SKILL
from dapo_trl.run_folder import critic_folders


_NEEDED = (
    f"A fit critic has a skill above {MIN_SKILL:.0%}, and advantages that correlate with those of the outcomes, beyond "
    f"doubt if there are {ENOUGH_PROBLEMS} problems or more; of so many, its values are not for certain more than "
    f"{MAX_CALIBRATION_ERROR:g} off on average."
)
_CURES = (
    "Try more data (`num_train_problems`, `num_completions`) in another `output_dir`; or another base model "
    "(`critic_model_name_or_path`), learning rate or number of epochs (`critic.learning_rate`, "
    "`critic.num_train_epochs`), there or, after deleting {folders} and `data`, here; or do without the critic: "
    "`values: monte_carlo`, "
    "or `values: shrinkage`, which then shrinks towards the mean outcome. With `allow_unfit_critic: true` the same "
    "command goes on with this critic from here."
)

_CURES_OF_SHIFTED = (
    "Train a critic in this iteration: `later_critics: train`, after deleting {data}. Or do without: `values: "
    "shrinkage` in another `output_dir`, which then shrinks towards the mean outcome. With `allow_unfit_critic: true` "
    "the same command goes on with these values from here."
)


class UnfitCriticError(ValueError):
    """The critic of a run should not be trained on."""


def refuse_unfit(found: Mapping[str, Any], folder: Path, is_shifted: bool = False) -> None:
    """
    Refuse a critic that is not fit to train on.

    Args:
        found (`dict`):
            What [`~dapo_trl.diagnosing.diagnose_once`] gave.
        folder (`Path`):
            Folder of the iteration.
        is_shifted (`bool`, *optional*, defaults to `False`):
            Whether it is the first iteration's, with values that are moved to the outcomes of this one.

    Raises:
        UnfitCriticError: if it is not fit: with what was measured, and what to try.
    """
    if found["is_fit"]:
        return
    folders = critic_folders(folder) or [folder / "critic"]
    cures = _CURES.format(folders=", ".join(f"`{path.name}`" for path in folders))
    who = f"The mean of {len(folders)} critics in {folder}" if len(folders) > 1 else f"The critic in {folders[0]}"
    if is_shifted:
        who = f"What the first iteration's critic says in {folder}"
        cures = _CURES_OF_SHIFTED.format(data=folder / "data")
    parts = [f"{who} is refused. {found['verdict']}"]
    if found["measures"]:
        parts += [f"{describe(found)}.", _NEEDED]
    if found.get("num_problems", 0) < ENOUGH_PROBLEMS:
        parts.append(
            "It is measured on every tenth of the problems that have right and wrong solutions (after the first "
            "iteration, on those that no critic was trained on), which are too few here to be sure of anything: with "
            f"{10 * ENOUGH_PROBLEMS} of them in the first, {ENOUGH_PROBLEMS} are held out."
        )
    raise UnfitCriticError(" ".join([*parts, cures]))
