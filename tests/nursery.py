"""Command lines in processes of their own, without the seconds that importing torch takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

ROOT = Path(__file__).parent.parent

_NURSERY = """
import json, os, sys
import torch._dynamo  # by torch.optim, when the first optimiser is made
from rnngrad import __main__, config, diagnosis, snapshot, tracking
from rnngrad.kernels import fused, loops
for registry in config.REGISTRIES.values():
    registry.load()
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.chdir(order["folder"])
        os.environ |= order["environment"]
        sys.path.insert(0, order["folder"])
        sys.argv = ["rnngrad", *order["arguments"]]
        code = 1
        try:
            __main__.main()
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """Starts each command line in a new process, born of one that has imported everything.

    In that one nothing has been computed; a child has its memory, and from there on its own.
    """

    def __enter__(self) -> Nursery:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def run(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, str]:
        """Exit code, or minus the signal that killed it, and what it said.

        Args:
            folder: It works there, and finds modules there.
            arguments: After ``rnngrad``.
            environment: Variables that it has beside ours.
        """
        said = folder / ".said"
        order = {
            "folder": str(folder),
            "said": str(said),
            "arguments": arguments,
            "environment": dict(environment),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        text = said.read_text()
        said.unlink()
        return code, text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
