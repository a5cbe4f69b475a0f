"""
What the benchmarks have in common: machine and versions for the record, and tables written into documents.
"""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch


REPOSITORY = Path(__file__).resolve().parents[1]


def machine() -> str:
    """Cores and GPU, in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}, {gpu}"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_between(path: Path, mark: str, text: str) -> None:
    """Put the text between `<!-- mark -->` and `<!-- /mark -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    content, number = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", path.read_text())
    if number != 1:
        raise SystemExit(
            f"{path} needs the marks <!-- {mark} --> and <!-- /{mark} --> once, found them {number} times."
        )
    path.write_text(content)
