"""
`settings.py`: values get the types of their fields, or are refused by name.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dapo_trl.settings import did_you_mean, read_settings


@dataclass
class Config:
    steps: int = 1
    rate: float = 0.1
    limit: int | None = None
    name: str = ""
    kind: Literal["a", "b"] = "a"
    on: bool = False
    either: dict[str, Any] | str | None = None
    urls: list[str] = field(default_factory=list)
    section: dict[str, Any] = field(default_factory=dict)
    hidden: int = field(default=0, init=False)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"steps": 3}, 3),
        ({"steps": 3.0}, 3),
        ({"steps": "1e3"}, 1000),
        ({"rate": 1}, 1.0),
        ({"rate": "1e-4"}, 1e-4),
        ({"limit": None}, None),
        ({"limit": "5"}, 5),
        ({"name": "1e-4"}, "1e-4"),
        ({"name": 5}, "5"),
        ({"kind": "b"}, "b"),
        ({"on": True}, True),
        ({"on": "False"}, False),
        ({"either": "text"}, "text"),
        ({"either": {"a": 1}}, {"a": 1}),
        ({"urls": ["x"]}, ["x"]),
        ({"section": None}, {}),
    ],
)
def test_types(given, read):
    (value,) = read_settings(given, Config).values()
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 1.5}, "`part.steps` must be a whole number, got 1.5."),
        ({"steps": True}, "`part.steps` must be a whole number, got True."),
        ({"steps": "x"}, "`part.steps` must be a whole number, got 'x'."),
        ({"steps": "inf"}, "`part.steps` must be a whole number, got 'inf'."),
        ({"rate": [1]}, "`part.rate` must be a number, got [1]."),
        ({"limit": "x"}, "`part.limit` must be a whole number or null, got 'x'."),
        ({"on": 1}, "`part.on` must be true or false, got 1."),
        ({"name": None}, "`part.name` must be text, got None."),
        ({"urls": "x"}, "`part.urls` must be a list, got 'x'."),
        ({"hidden": 1}, "`part` has no entry 'hidden'. There are: steps, "),
        ({"stps": 1}, "`part` has no entry 'stps'; did you mean 'steps'?"),
        ([1], "`part` must hold entries, `name: value` a line, but is [1]."),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError) as caught:
        read_settings(given, Config, section="part")
    assert str(caught.value).startswith(message)


def test_many_names_are_not_listed():
    assert did_you_mean("x", [f"name-{number}" for number in range(30)]) == "."
