"""Compiles kernels, once per machine, and runs them on torch's own threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types

_COMPILING = threading.Lock()
_COMPILED = ("activations", "vector", "product", "loops", "cells", "sums")
_ALIVE: list[Any] = []  # compiled code lives as long as its Python object


def compiled(function: Callable[..., None], dtype: torch.dtype, title: str) -> int:
    """The address of a kernel's machine code, compiled now or on an earlier day.

    Args:
        function: Takes a pointer to numbers of ``dtype``, then integers.
        dtype: float32 or float64.
        title: For the message: compiling takes seconds, so it is not done in silence.
    """
    with _COMPILING:
        return _compiled(function, str(dtype).removeprefix("torch."), title)


@cache
def _compiled(function: Callable[..., None], dtype: str, title: str) -> int:
    integers = function.__code__.co_argcount - 1
    pointer: Any = types.CPointer(getattr(types, dtype))  # type: ignore[no-untyped-call]
    signature = types.void(pointer, *[types.int64] * integers)
    with _cache_directory(dtype) as directory:
        known = any(directory.rglob(f"*.{function.__name__}-*.nbc"))
        if not known:
            _say(f"rnngrad: compiling the {title} for {dtype}, once on this machine ... ")
        began = time.perf_counter()
        try:
            kernel = numba.cfunc(signature, cache=True)(function)
            kept = ""
        except (RuntimeError, OSError):  # numba has found no directory to write to, or no room
            kernel = numba.cfunc(signature)(function)
            kept = f" (not kept: {directory} cannot be written to; NUMBA_CACHE_DIR names another)"
    seconds = f"{time.perf_counter() - began:.1f} s{kept}\n"
    if not known:
        _say(seconds)
    elif not kernel.cache_hits:  # what is there was compiled for another processor
        _say(f"rnngrad: compiled the {title} for {dtype} anew in {seconds}")
    _ALIVE.append(kernel)
    address: Any = kernel.address
    return int(address)


def _say(text: str) -> None:
    with suppress(OSError):  # nobody can be told: no reason not to compute
        print(text, end="", file=sys.stderr, flush=True)


@contextmanager
def _cache_directory(dtype: str) -> Iterator[Path]:
    """Has numba keep what it compiles in a directory named after the kernels' source.

    Left to itself numba notices a change in a function's own file only.
    """
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in _COMPILED]
    version = hashlib.sha256(b"".join(sources)).hexdigest()[:12]
    config: Any = numba.config
    before = config.CACHE_DIR
    base = before or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(base) / "rnngrad" / version / dtype
    config.CACHE_DIR = str(directory)
    try:
        yield directory
    finally:
        config.CACHE_DIR = before


def run(kernel: int, arguments: int, threads: int) -> None:
    """Runs a kernel on its ``arguments`` on ``threads`` threads, which share out the work.

    They are those that torch computes with: a second pool would fight with the first one, whose
    threads go on spinning for a while after every operation.
    """
    openmp = _openmp()
    if threads == 1:
        _callable(kernel)(arguments)
    elif openmp is not None:
        openmp(kernel, arguments, threads, 0)
    else:
        call = _callable(kernel)
        others = [_pool().submit(call, arguments) for _ in range(threads - 1)]
        call(arguments)
        for other in others:
            other.result()


@cache
def _callable(kernel: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)


@cache
def _openmp() -> Any:
    """OpenMP's entry to a parallel region, in the library that torch has loaded, if it is there.

    Not in a forked child, where the threads of its parent do not exist and are waited for in vain.
    """
    if _FORKED or sys.platform == "win32":
        return None
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if entry is not None:
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
    return entry


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="rnngrad")


def _after_fork() -> None:
    global _FORKED, _COMPILING
    _FORKED, _COMPILING = True, threading.Lock()
    _openmp.cache_clear()
    _pool.cache_clear()


_FORKED = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
