"""
The oldest supported versions as pip constraints: those that `setup.cfg` states, and else the ones last tested with.

    python tests/minimum_versions.py > constraints-min.txt
"""

import re
from configparser import ConfigParser
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
AT_MINIMUM = ("accelerate", "datasets", "peft", "transformers", "trl")


def main() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    stated = config["options"]["install_requires"] + config["options.extras_require"]["peft"]
    minimum = dict(re.findall(r"^([\w-]+) >= ([\w.]+)", stated, re.MULTILINE))
    tested = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name, version in (tested | {name: minimum[name] for name in AT_MINIMUM}).items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
