"""``rnngrad-bench``: layers and training steps beside what a user would pick instead.

All in one process, one contender's turn after the other's in random order, so that a machine that
slows down slows all of them down. A turn is one run that is not timed, so that memory and caches
are then as in a loop of that contender's own, and two that are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rnngrad import __version__, rivals
from rnngrad.bptt import record
from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS, Clipper
from rnngrad.config import default_trainer
from rnngrad.init import INITS
from rnngrad.measure import MEASURES, Dynamics, Observer
from rnngrad.model import build_model
from rnngrad.nn import GRU, LSTM, RNN
from rnngrad.optim import OPTIMS
from rnngrad.report import bench_figure
from rnngrad.rivals import Step
from rnngrad.task import TASKS, Task
from rnngrad.tracking import Tracker
from rnngrad.training import Training

LAYERS: dict[str, tuple[Any, Any]] = {
    "RNN": (RNN, nn.RNN),
    "GRU": (GRU, nn.GRU),
    "LSTM": (LSTM, nn.LSTM),
}
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
SHAPES = (
    (100, 20, 50),
    (200, 32, 100),
    (120, 128, 128),
    (400, 64, 256),
    (784, 100, 100),
    (2000, 16, 128),
)
"""``(T, B, H)``."""


@dataclass
class Table:
    """Numbers and what they mean.

    Args:
        title: What was measured.
        columns: Names, with units.
        rows: One list a row.
        notes: Lines to stand under it.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = [self.columns, *([_text(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        return "\n".join([self.title, "", lines[0], "-" * len(lines[0]), *lines[1:], *self.notes])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, and half the distance between the quartiles."""

    median: float
    spread: float


def alternate(
    contenders: Mapping[str, Step], seconds: float, *, settle: bool = True
) -> dict[str, Timing]:
    """Times each, in about ``seconds`` for all of them.

    Without ``settle`` a turn is one run: for those so long that they settle on their way.
    """
    order = list(contenders)
    taken: dict[str, list[float]] = {name: [] for name in order}
    for step in contenders.values():
        step()
    began = time.perf_counter()
    shuffle = random.Random(0).shuffle
    rounds = 0
    while rounds < 3 or time.perf_counter() - began < seconds:
        shuffle(order)
        for name in order:
            if settle:
                contenders[name]()
            for _ in range(2 if settle else 1):
                start = time.perf_counter()
                contenders[name]()
                taken[name].append(time.perf_counter() - start)
        rounds += 1
    timings = {}
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(middle, (high - low) / 2)
    return timings


def recorded_layer(layer: Any, x: Tensor) -> Step:
    """Ours, with the norms of ∂L/∂h_t, ∂L/∂c_t and the direct part."""

    def step() -> object:
        layer.zero_grad()
        x.grad = None
        with record(layer) as tape:
            layer(x)[0].square().mean().backward()
        return tape["l0"].hidden_norm

    return step


def operations(kind: str, steps: int, batch: int, hidden: int, inputs: int, grad_x: bool) -> int:
    """Floating-point operations of the matrix products, there and back, and nothing else."""
    one = 2 * steps * batch * GATES[kind] * hidden
    return one * (3 * hidden + (3 if grad_x else 2) * inputs)


def layer_tables(shapes: Sequence[tuple[int, int, int]], seconds: float) -> Iterator[Table]:
    """Beside torch.nn, a loop of cells and JAX; and beside sgemm."""
    rate = sgemm()
    flops = Table(
        f"Operations a second; torch's sgemm reaches {rate / 1e9:.0f} GFLOP/s here",
        ["layer", "T", "B", "H", "GFLOP/s", "of sgemm (%)"],
    )
    for wide in (False, True):
        inputs = "I = H, with gradient to x" if wide else "I = 10, no gradient to x"
        table = Table(
            f"Layers, forward and backward: {inputs}",
            ["layer", "T", "B", "H", "ours (ms)", "+-", "torch.nn (ms)", "x faster"]
            + ["cells (ms)", "x faster", "JAX (ms)", "x faster"],
        )
        for kind, (make, theirs) in LAYERS.items():
            faster: dict[str, list[float]] = {"torch.nn": [], "cells": [], "JAX": []}
            for steps, batch, hidden in shapes:
                torch.manual_seed(0)
                size = hidden if wide else 10
                ours, plain = make(size, hidden), theirs(size, hidden)
                plain.load_state_dict(ours.state_dict())
                x = torch.randn(steps, batch, size, requires_grad=wide)
                contenders = {
                    "ours": recorded_layer(ours, x),
                    "torch.nn": rivals.plain_layer(plain, x),
                    "cells": rivals.loop_of_cells(plain, x),
                }
                if _has_jax():
                    contenders["JAX"] = rivals.jax_scan(plain, x)
                timing = alternate(contenders, seconds)
                mine = timing["ours"]
                row = [kind, steps, batch, hidden, 1e3 * mine.median, 1e3 * mine.spread]
                for name, ratios in faster.items():
                    if name in timing:
                        ratios.append(timing[name].median / mine.median)
                    other = timing.get(name)
                    row += [None, None] if other is None else [1e3 * other.median, ratios[-1]]
                table.rows.append(row)
                if not wide:
                    done = operations(kind, steps, batch, hidden, size, wide) / mine.median
                    flops.rows.append([*row[:4], done / 1e9, 100 * done / rate])
            means = (
                f"{_mean(ratios):.2f} x {name} (at least {min(ratios):.2f})"
                for name, ratios in faster.items()
                if ratios
            )
            table.notes.append(f"{kind}, geometric mean: {', '.join(means)}")
        if not _has_jax():
            table.notes.append("JAX is not installed: pip install 'rnngrad[bench]'")
        yield table
    yield flops


def recording_table(shapes: Sequence[tuple[int, int, int]], seconds: float) -> Table:
    """What recording adds to a layer."""
    table = Table(
        "Recording on against off, layer alone (I = 10)",
        ["layer", "T", "B", "H", "off (ms)", "+-", "on (ms)", "+-", "cost (%)"],
    )
    for kind, (make, _) in LAYERS.items():
        for steps, batch, hidden in shapes:
            layer, x = make(10, hidden), torch.randn(steps, batch, 10)
            contenders = {"on": recorded_layer(layer, x), "off": rivals.plain_layer(layer, x)}
            timing = alternate(contenders, seconds)
            on, off = timing["on"], timing["off"]
            numbers = [1e3 * t for t in (off.median, off.spread, on.median, on.spread)]
            percent = 100 * (on.median / off.median - 1)
            table.rows.append([kind, steps, batch, hidden, *numbers, percent])
    ratios = [1 + row[-1] / 100 for row in table.rows]
    table.notes.append(f"geometric mean: {100 * (_mean(ratios) - 1):.1f} %")
    return table


def sgemm() -> float:
    """The rate of torch's own product for large float32 matrices, in operations a second."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        taken.append(time.perf_counter() - start)
    return float(2 * 1024**3 / statistics.median(taken))


def training_step(kind: str, task: Task, batch_size: int, hidden: int) -> Step:
    """One step of ``rnngrad.training.Training``, recorded, without the files."""
    cell = CELLS.default(kind.lower(), hidden_size=hidden)
    model = build_model(cell, task, INITS.default("torch"), seed=0)
    optimizer = OPTIMS.default("adam").build(model.parameters())
    clip = Clipper(CLIPS.default("norm", max_norm=1.0), model.named_parameters())
    done = [0]

    def step() -> float:
        done[0] += 1
        inputs, targets, _ = task.training_batch(0, done[0], batch_size)
        optimizer.zero_grad()
        with record(model):
            loss = task.loss(model(inputs).outputs, targets)
            loss.backward()
        clip()
        optimizer.step()
        return loss.item()

    return step


def step_table(seconds: float) -> Table:
    """Whole training steps."""
    table = Table(
        "Training steps: data, forward, loss, backward, record (ours), clip, Adam",
        ["task", "layer", "ours (ms)", "+-", "by hand (ms)", "+-", "x faster"],
    )
    tasks = {
        "adding T=100 H=128": (TASKS.default("adding", length=100), 128),
        "copy T=100 H=80": (TASKS.default("copy", length=80), 80),
        "order T=125 H=50": (TASKS.default("temporal_order", length=125), 50),
    }
    for name, (task, hidden) in tasks.items():
        for kind, (_, theirs) in LAYERS.items():
            contenders = {
                "ours": training_step(kind, task, 20, hidden),
                "by hand": rivals.loop_by_hand(theirs(task.input_size, hidden), task, 20),
            }
            timing = alternate(contenders, seconds)
            ours, hand = timing["ours"], timing["by hand"]
            numbers = [1e3 * t for t in (ours.median, ours.spread, hand.median, hand.spread)]
            table.rows.append([name, kind, *numbers, hand.median / ours.median])
    ratios = [row[-1] for row in table.rows]
    table.notes.append(f"geometric mean: {_mean(ratios):.2f} (at least {min(ratios):.2f}); B = 20")
    return table


def measured_run(kind: str, task: Task, hidden: int, measure: str | None, steps: int) -> Step:
    """``steps`` updates of a run with the defaults of ``trainer``, its files included.

    ``measure`` is a preset; ``None`` neither measures nor records but at the first and last step.
    """
    cell, trainer = CELLS.default(kind.lower(), hidden_size=hidden), default_trainer()
    chosen = None if measure is None else MEASURES.default(measure)
    every = steps if measure is None else trainer.log_every

    def step() -> None:
        model = build_model(cell, task, INITS.default("torch"), seed=0)
        named = list(model.named_parameters())
        with tempfile.TemporaryDirectory() as folder:
            with Tracker(folder, task.chance_loss, task.time_steps) as tracker:
                Training(
                    model,
                    task,
                    OPTIMS.default("adam").build(model.parameters()),
                    Clipper(CLIPS.default("norm", max_norm=1.0), named),
                    tracker,
                    seed=0,
                    steps=steps,
                    batch_size=trainer.batch_size,
                    eval_every=trainer.eval_every,
                    eval_size=trainer.eval_size,
                    log_every=every,
                    stop_when_solved=False,
                    observer=None
                    if not isinstance(chosen, Dynamics)
                    else Observer(chosen, model, task.time_steps),
                ).run()

    return step


def measure_table(seconds: float, steps: int, shapes: int) -> Table:
    """What recording and each preset of ``measure`` add to a run."""
    presets = {"off": None, "none": "none", "standard": "standard", "full": "full"}
    table = Table(
        f"Runs of {steps} updates with the default schedule, B = 50: recording and measuring",
        ["task", "layer", "off (s)", "+-"]
        + [f"measure={name} (%)" for name in presets if presets[name]],
        notes=["off: nothing is recorded or measured but at the first and the last update"],
    )
    tasks = {
        "order T=125 H=50": (TASKS.default("temporal_order", length=125), 50, "RNN"),
        "copy T=100 H=80": (TASKS.default("copy", length=80), 80, "GRU"),
        "adding T=100 H=128": (TASKS.default("adding", length=100), 128, "LSTM"),
    }
    for name, (task, hidden, kind) in [*tasks.items()][:shapes]:
        runs = {
            preset: measured_run(kind, task, hidden, chosen, steps)
            for preset, chosen in presets.items()
        }
        timing = alternate(runs, seconds, settle=False)
        off = timing["off"]
        costs = [100 * (timing[p].median / off.median - 1) for p in presets if presets[p]]
        table.rows.append([name, kind, off.median, off.spread, *costs])
    return table


def growth_table(seconds: float) -> Table:
    """How time grows with ``T``, ``B``, ``H`` and the number of runs at once."""
    table = Table(
        "Growth of the LSTM, recorded (R runs without), from T = 200, B = 32, H = 100, I = 10",
        ["axis", "size", "time (ms)", "+-", "a step, row, unit or run (us)"],
    )
    start = {"T": 200, "B": 32, "H": 100}
    for axis, sizes in {"T": (50, 200, 800), "B": (8, 32, 128), "H": (25, 100, 400)}.items():
        for size in sizes:
            shape = start | {axis: size}
            x = torch.randn(shape["T"], shape["B"], 10)
            timing = alternate({"": recorded_layer(LSTM(10, shape["H"]), x)}, seconds)[""]
            one = 1e6 * timing.median / size
            table.rows.append([axis, size, 1e3 * timing.median, 1e3 * timing.spread, one])
    for runs in (1, 4, 16):
        x = torch.randn(runs, start["T"], start["B"], 10)
        timing = alternate({"": stacked_layer(LSTM(10, start["H"]), x)}, seconds)[""]
        one = 1e6 * timing.median / runs
        table.rows.append(["R", runs, 1e3 * timing.median, 1e3 * timing.spread, one])
    return table


def stacked_layer(layer: Any, x: Tensor) -> Step:
    """``R`` runs as one program: ``x [R, T, B, I]``, stacked weights, ``torch.vmap``."""
    weights = {
        name: value.detach().repeat(len(x), *[1] * value.dim()).requires_grad_()
        for name, value in layer.named_parameters()
    }

    def one(weights: Any, x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, weights, (x,))[0]
        return output

    def step() -> None:
        for value in weights.values():
            value.grad = None
        torch.vmap(one)(weights, x).square().mean().backward()

    return step


def memory_table(lengths: Sequence[int]) -> Table:
    """Peak memory and time of one training step with and without recomputation."""
    table = Table(
        "Memory of one step of an LSTM, B = 32, H = 128, I = 10, above what stood before it",
        ["T", "segments", "peak (MiB)", "time (s)", "x the time", "norms differ by"],
    )
    for steps in lengths:
        segments = round(math.sqrt(steps))
        full, parts = (
            json.loads(_python("-m", "rnngrad.bench", "--measure-memory", str(steps), str(n)))
            for n in (1, segments)
        )
        pairs = list(zip(full["norms"], parts["norms"], strict=True))
        differ = max(abs(a - b) for a, b in pairs) / max(a for a, _ in pairs)
        for count, found in ((1, full), (segments, parts)):
            ratio = found["seconds"] / full["seconds"]
            error = 0.0 if count == 1 else differ
            table.rows.append([steps, count, found["peak"], found["seconds"], ratio, error])
    return table


def measure_memory(steps: int, segments: int) -> dict[str, Any]:
    """One step, in a process of its own: its peak above what stood before, in MiB."""
    torch.manual_seed(0)
    layer = LSTM(10, 128)
    layer.recompute_segments = segments
    x = torch.randn(steps, 32, 10)
    recorded_layer(layer, x[: 2 * segments])()  # compiles
    before = _resident()
    norms = recorded_layer(layer, x)()
    peak = _resident(most=True) - before
    start = time.perf_counter()
    recorded_layer(layer, x)()
    seconds = time.perf_counter() - start
    assert isinstance(norms, Tensor)
    return {"peak": peak, "seconds": seconds, "norms": norms.mean(1).tolist()}


def _resident(*, most: bool = False) -> float:
    """Memory of this process in MiB: now, and from then on the most."""
    if not most:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def start_table() -> Table:
    """What one waits for before the first step."""
    table = Table("Start-up", ["what", "seconds"])
    use = (
        "import torch; from rnngrad.nn import LSTM; "
        "LSTM(3, 4)(torch.zeros(2, 2, 3))[0].sum().backward()"
    )
    with tempfile.TemporaryDirectory() as fresh:
        for what, command, environment in (
            ("import torch, to compare", ("-c", "import torch"), {}),
            ("import rnngrad.nn", ("-c", "import rnngrad.nn"), {}),
            ("rnngrad --help", ("-m", "rnngrad", "--help"), {}),
            ("first LSTM on a machine, compiled", ("-c", use), {"NUMBA_CACHE_DIR": fresh}),
            ("every later one", ("-c", use), {"NUMBA_CACHE_DIR": fresh}),
        ):
            taken = []
            for _ in range(1 if what.startswith("first") else 3):
                start = time.perf_counter()
                _python(*command, **environment)
                taken.append(time.perf_counter() - start)
            table.rows.append([what, statistics.median(taken)])
    return table


def _python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def conditions() -> dict[str, str]:
    """What the numbers depend on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": f"{processor}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(
            [f"rnngrad {__version__}"]
            + [f"{name} {_version(name)}" for name in ("torch", "numba", "jax")]
        ),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _has_jax() -> bool:
    return _version("jax") != "not installed"


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def tables(quick: bool) -> Iterator[Table]:
    """All tables, as they are ready."""
    seconds = 0.2 if quick else 6.0
    yield from layer_tables(SHAPES[:1] if quick else SHAPES, seconds)
    yield recording_table(SHAPES[:1] if quick else SHAPES, seconds)
    yield step_table(seconds)
    yield measure_table(seconds, 5 if quick else 500, 1 if quick else 3)
    yield growth_table(seconds / 3)
    if sys.platform == "linux":  # which alone says how much memory was held at most
        yield memory_table((1000,) if quick else (1000, 3000, 10000))
    yield start_table()


def main() -> None:
    """Times layers and whole training steps beside what a user would pick instead."""
    parser = argparse.ArgumentParser(prog="rnngrad-bench", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, in half a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", default="bench", help="folder of the figure (default: bench)")
    parser.add_argument("--measure-memory", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        print(json.dumps(measure_memory(*arguments.measure_memory)))
        return
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"rnngrad-bench: --out={out}: cannot be written ({error.strerror})", file=sys.stderr)
        sys.exit(2)
    found = conditions()
    results = []
    if not arguments.json:
        print("\n".join(f"{name:10}{value}" for name, value in found.items()), end="\n\n")
    for table in tqdm(tables(arguments.quick), desc="rnngrad-bench", unit="table", disable=None):
        results.append(table)
        if not arguments.json:
            tqdm.write(f"{table}\n")
    bench_figure(results, found).savefig(out / "bench.png", dpi=130)
    if arguments.json:
        print(json.dumps({"conditions": found, "tables": [asdict(table) for table in results]}))
    else:
        print(f"figure    {out / 'bench.png'}")


if __name__ == "__main__":
    main()
