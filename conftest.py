"""
Settings of all tests, those of docstrings too.
"""

import os

import torch


if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed says on the console, once, that it found none
