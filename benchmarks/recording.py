"""
What the benchmarks have in common: their records with command, machine and versions, intervals over seeds, and tables
written into documents.
"""

import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


REPOSITORY = Path(__file__).resolve().parents[1]
# Half-width of a 95% interval over this many seeds, in standard errors (Student's t).
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
T |= {11: 2.23, 12: 2.20, 13: 2.18, 14: 2.16, 15: 2.14, 16: 2.13, 17: 2.12, 18: 2.11, 19: 2.10, 20: 2.09}


def machine() -> str:
    """Cores and GPU, in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}, {gpu}"


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean of some seeds' shares and half of its 95% interval, in points. Of more than 20 seeds it is a little wide."""
    x = 100 * np.asarray(numbers)
    half = T[min(len(x), max(T))] * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return float(x.mean()), float(half)


def command_line() -> str:
    """The command that runs now, as somebody else would type it."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def origin(command: str, packages: Sequence[str]) -> dict[str, Any]:
    """Where numbers come from: command, date, machine and versions."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def origin_in_words(record: dict[str, Any], how: str = "") -> str:
    """The same as sentences; `how` is what there is to say of the machine's use."""
    installed = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"Command: `{record['command']}`, {record['date']}. Machine: {record['machine']}{how}. Versions: {installed}."
    )


def keep(record: dict[str, Any], name: str) -> None:
    """Write a record to `benchmarks/results`."""
    (REPOSITORY / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def write_between(path: Path, mark: str, text: str) -> None:
    """Put the text between `<!-- mark -->` and `<!-- /mark -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    content, number = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", path.read_text())
    if number != 1:
        raise SystemExit(
            f"{path} needs the marks <!-- {mark} --> and <!-- /{mark} --> once, found them {number} times."
        )
    path.write_text(content)
