"""The control of experiments/tiny.py: no experts, the same operations per token, everything else equal.

Command   python -m moejax.main --config=experiments/tiny_dense.py --workdir=runs/tiny_dense
Hardware  2 CPU cores, 2 GB of memory
Time      300 CPU seconds in all, data and evaluation included
Result    held-out bits per byte 1.78 (three seeds in the README)
"""

import importlib.util
import pathlib


def get_config():
    """experiments/tiny.py with dense layers as wide as the two experts that see a token."""
    path = pathlib.Path(__file__).with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("tiny", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    c = tiny.get_config()
    c.moe.every = 0
    c.model.ffn = c.moe.experts_per_token * c.moe.ffn
    return c
