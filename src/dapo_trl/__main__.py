"""
`python -m dapo_trl`, or `accelerate launch -m dapo_trl`: the command `dapo-trl`.
"""

import sys

from dapo_trl.cli import main


if __name__ == "__main__":
    sys.exit(main())
