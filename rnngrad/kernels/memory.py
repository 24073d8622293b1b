"""Memory for what a kernel keeps from the way there to the way back, used again step after step.

malloc takes large memory from the system anew each time, and the system clears every page of it: a
good part of a step. Here it is kept, up to ``IDLE_BYTES``, and taken in pages of 2 MiB where there
are any.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 2**20
"""Bytes from which on memory is kept for reuse; what is smaller malloc keeps itself."""
IDLE_BYTES = 2**29
"""The most that is kept while nobody uses it."""

_IDLE: list[mmap.mmap] = []
_LOCK = threading.RLock()  # a block may come back, by the garbage collector, while one is sought


def empty(count: int, dtype: torch.dtype, spare: int) -> Tensor:
    """``[count]``, not initialised, in memory that may be read ``spare`` bytes beyond its end."""
    size = count * dtype.itemsize + spare
    if size < LARGE:
        return torch.empty(size // dtype.itemsize + 1, dtype=dtype)
    block = _take(size)
    lease = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(lease, _give_back, block).atexit = False
    # the tensor holds the lease, and the lease's end gives the block back
    return torch.frombuffer(lease, dtype=dtype, count=size // dtype.itemsize)


def release() -> None:
    """Gives idle memory back to the system."""
    with _LOCK:
        _IDLE.clear()


def _take(size: int) -> mmap.mmap:
    with _LOCK:
        fitting = [block for block in _IDLE if size <= len(block) <= 2 * size]
        if fitting:
            best = min(fitting, key=len)
            _IDLE.remove(best)
            return best
    rounded = -(-size // 2**21) * 2**21
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows, where it is private
        return mmap.mmap(-1, rounded)
    # private: by default a forked child would write into its parent's memory
    block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    with _LOCK:
        _IDLE.append(block)
        while sum(map(len, _IDLE)) > IDLE_BYTES:
            _IDLE.pop(0)


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
