"""Compiles every kernel there is, two at a time: the tests, which one by one would, find them."""

import subprocess
import sys

import torch

from rnngrad.kernels import sums
from rnngrad.kernels.cells import CELLS
from rnngrad.kernels.fused import FusedKernel

PARTS = ("product", "forward", "backward", "backward with clipping")


def main(*dtypes: str) -> None:
    """Those of a dtype, or each dtype's in a process of its own."""
    if dtypes:
        sums.tensor_norms([torch.ones(1, dtype=getattr(torch, dtypes[0]))])
        for mode in CELLS:
            for part in PARTS:
                FusedKernel(mode)._compiled(getattr(torch, dtypes[0]), part)
        return
    line = (sys.executable, "-m", "tests.compiled")
    processes = [subprocess.Popen([*line, dtype]) for dtype in ("float32", "float64")]
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main(*sys.argv[1:])
