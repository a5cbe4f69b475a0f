"""
`report_figures.py`: marks are where the numbers are.
"""

import numpy as np
import pytest

from dapo_trl.diagnosis import CalibrationBin
from dapo_trl.intervals import Estimate
from dapo_trl.report_figures import (
    calibration_figure,
    curve_figure,
    histogram_figure,
    interval_figure,
    parts_figure,
)


def marks(figure, tag, style):
    return [found for name, found, _ in figure.marks if name == tag and found["class"] == style]


def test_intervals():
    """The axis is 300 long, from 8 on; what lies beyond it is cut at its end."""
    figure = interval_figure("Skill", [("a", "critic", Estimate(0.25, -0.5, 0.5))], 0.0, 1.0)
    (line,), (dot,) = marks(figure, "line", "interval critic"), marks(figure, "circle", "point critic")
    assert (line["x1"], line["x2"], dot["cx"]) == (8, 158, 83)
    assert figure.description == "a: 25.0% [-50.0%, 50.0%]"
    assert not marks(figure, "line", "zero")
    assert len(marks(interval_figure("", [("a", "critic", Estimate(0, 0, 0))], -0.2, 0.2), "line", "zero")) == 1


def test_curves():
    """Higher numbers are further up; a few points are marked, many are not; a constant is compared with."""
    few = curve_figure("Loss", {"training": [(0, 1.0), (10, 0.0)]}, "steps", ("constant", 0.5))
    (curve,) = marks(few, "polyline", "curve series0")
    (left, top), (right, bottom) = (map(float, point.split(",")) for point in curve["points"].split())
    assert left < right and top < bottom
    assert marks(few, "line", "constant")[0]["y1"] == pytest.approx((top + bottom) / 2, abs=0.1)
    assert len(marks(few, "circle", "point series0")) == 2
    assert few.legend == [("constant", "constant 0.5"), ("series0", "training")]
    many = curve_figure("Loss", {"a": [(x, 3.0) for x in range(50)], "b": [(1, 3.0)]}, "steps")
    assert not marks(many, "circle", "point series0")
    assert many.description == "a from 3 to 3; b from 3 to 3"


def test_calibration():
    """A calibrated bin is on the line; one of few problems is hollow, without an interval."""
    sure = CalibrationBin(0.5, Estimate(0.5, 0.4, 0.6), num_problems=5, num_states=9)
    rare = CalibrationBin(0.9, Estimate(1.0, 1.0, 1.0), num_problems=4, num_states=4)
    figure = calibration_figure([sure, rare])
    (line,), (dot,) = marks(figure, "line", "constant"), marks(figure, "circle", "point critic")
    assert dot["cx"] == pytest.approx((line["x1"] + line["x2"]) / 2)
    assert dot["cy"] == pytest.approx((line["y1"] + line["y2"]) / 2)
    assert len(marks(figure, "circle", "few critic")) == len(marks(figure, "line", "interval critic")) == 1
    assert figure.legend[-1] == ("few", "of fewer than 5 problems")


def test_histogram():
    """Every number is in a bar, those at the ends too."""
    values = np.array([-1.0, 0.0, 0.0, 0.01, 1.0])
    figure = histogram_figure("Advantages", values, -1, 1, "critic", "advantage")
    titles = [text for tag, _, text in figure.marks if tag == "rect"]
    assert sum(int(title.rpartition(": ")[2]) for title in titles) == 5
    assert figure.description.startswith("5 in all; median 0.00")
    bars = marks(figure, "rect", "fill critic")
    assert len(bars) == 40 and min(bar["height"] for bar in bars) == 0


def test_parts():
    """Their widths are their shares; an empty whole has none."""
    figure = parts_figure("Problems", [("right", "good", 30), ("wrong", "bad", 10)])
    widths = [marks(figure, "rect", f"fill {style}")[0]["width"] + 1 for style in ("good", "bad")]
    assert widths == [225, 75]
    assert "right: 30 of 40, 75%" in figure.description
    assert "right: 0 of 1, 0%" in parts_figure("Problems", [("right", "good", 0)]).description
