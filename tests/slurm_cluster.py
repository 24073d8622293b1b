"""A Slurm cluster of one node, this machine, for as long as it is asked for.

Needs the programs of slurm-wlm and munge (``apt-get install slurm-wlm munge``) and the rights of
root. All that it writes lies in one folder, and it ends no process but its own.

``python -m tests.slurm_cluster COMMAND...`` runs a command inside one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=rnngrad
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes}
PartitionName=main Nodes={host} Default=YES State=UP
"""


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


@contextmanager
def cluster(*, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Starts the cluster; gives the environment in which Slurm's commands find it.

    Args:
        cpus: That its node claims to have.

    Raises:
        RuntimeError: It is not ready within 30 seconds; with what the daemons say.
    """
    with ExitStack() as running:
        # a folder of its own: munge insists that all may enter those above, which pytest's are not
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o755)
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        host = _configure(folder, cpus)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        munge = [f"--{name}={folder}/munge.{file}" for name, file in files.items()]
        _start(running, folder, environment, "munged", "--foreground", *munge)
        _wait(lambda: (folder / "munge.socket").exists(), "munged", folder)
        _start(running, folder, environment, "slurmctld", "-D")
        _start(running, folder, environment, "slurmd", "-D", "-N", host)
        _wait(lambda: _ask(environment, "sinfo", "-h", "-o", "%t") == "idle", "the node", folder)
        running.callback(_end_jobs, environment)
        yield environment


def _configure(folder: Path, cpus: int) -> str:
    """Writes what the daemons read; the name of the node."""
    for part in ("state", "spool"):
        (folder / part).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host, ports = socket.gethostname(), _free_ports(2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**21  # half of it
    text = CONFIGURATION.format(host=host, folder=folder, cpus=cpus, megabytes=memory, ports=ports)
    (folder / "slurm.conf").write_text(text)
    return host


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(running: ExitStack, folder: Path, environment: Mapping[str, str], *command: str) -> None:
    log = running.enter_context(open(folder / f"{command[0]}.log", "wb"))
    # in a session of its own: Ctrl-C is for the tests, which then end it in order
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, start_new_session=True
    )

    def end() -> None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    running.callback(end)


def _wait(ready: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{what} is not ready:\n{logs}")
        time.sleep(0.1)


def _ask(environment: Mapping[str, str], *command: str) -> str:
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    return answer.stdout.strip()


def _end_jobs(environment: Mapping[str, str]) -> None:
    """Leaves no process of a job behind."""
    _ask(environment, "scancel", "--state=PENDING", "--user=root")
    _ask(environment, "scancel", "--user=root")
    deadline = time.monotonic() + 40
    while _ask(environment, "squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> int:
    """Runs the command line inside a cluster; its exit code."""
    if lacking := missing():
        print(f"no {', '.join(lacking)}: apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    with cluster() as found:
        return subprocess.run(sys.argv[1:], env=found).returncode


if __name__ == "__main__":
    sys.exit(main())
