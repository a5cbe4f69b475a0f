"""
The figure of a critic's calibration: mean outcomes by value.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from dapo_trl.diagnosis import CalibrationBin


logger = logging.getLogger(__name__)


def draw_calibration(bins: Sequence[CalibrationBin], path: Path) -> None:
    """
    Draw mean outcomes by value, with 95% intervals; of a calibrated critic they lie on the diagonal. Nothing depends on
    the figure: what fails is a warning.

    Args:
        bins (sequence of [`~dapo_trl.diagnosis.CalibrationBin`]):
            See [`~dapo_trl.diagnosis.Diagnosis`].
        path (`Path`):
            Picture to write.
    """
    try:
        _draw(bins, path)
    except Exception as error:
        logger.warning(f"The figure {path} could not be drawn: {type(error).__name__}: {error}")


def _draw(bins: Sequence[CalibrationBin], path: Path) -> None:
    from matplotlib.figure import Figure

    values = [part.value for part in bins]
    outcomes = [part.outcome.mean for part in bins]
    # the ends of an interval may, by rounding, lie on the wrong side of its mean
    errors = [
        [max(part.outcome.mean - part.outcome.low, 0.0) for part in bins],
        [max(part.outcome.high - part.outcome.mean, 0.0) for part in bins],
    ]
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#bbbbbb", zorder=0, label="calibrated")
    axis.errorbar(values, outcomes, errors, color="#4477aa", marker="o", linestyle="-", capsize=3, label="critic")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axis.set(xlabel="value by the critic", ylabel="share of completions that end correct, 95% interval")
    axis.set_title(f"Calibration on {sum(part.num_states for part in bins):,} held-out states, in bins of as many")
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=120)
