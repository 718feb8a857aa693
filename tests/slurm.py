"""A real Slurm on loopback, as Debian packages it, run by whoever runs the tests.

It has two nodes on one machine; their names are addresses, so that each finds the other by name.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import until

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=30
NodeName=127.0.0.[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] \
  CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE State=UP
"""
_NODES = ("127.0.0.1", "127.0.0.2")


@dataclass(frozen=True)
class Slurm:
    """A cluster that is up; `environment` is what its commands need."""

    environment: dict[str, str]

    def __call__(self, *words: object) -> str:
        done = subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`, such as JobState or Restarts."""
        shown = self("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in shown if word.startswith(f"{name}="))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running cluster; skips where the programs are missing or it does not come up."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        pytest.skip(f"no Slurm on this machine: {', '.join(missing)} missing")
    root = tmp_path_factory.mktemp("slurm")
    for name in ("state", *(f"spool-{node}" for node in _NODES)):
        (root / name).mkdir()
    config = root / "slurm.conf"
    config.write_text(_CONFIG.format(root=root, user=getpass.getuser(), ports=_free_ports()))
    environment = os.environ | {"PATH": path, "SLURM_CONF": str(config)}
    cluster = Slurm(environment)
    with contextlib.ExitStack() as stack:
        try:
            _start(root, environment, stack, cluster)
        except (OSError, subprocess.SubprocessError, TimeoutError) as error:
            pytest.skip(f"Slurm did not come up here: {error}")
        yield cluster
        cluster("scancel", "-f", "-u", getpass.getuser())
        until(lambda: not cluster("squeue", "-h").strip(), "an empty queue")


def _start(
    root: Path, environment: dict[str, str], stack: contextlib.ExitStack, cluster: Slurm
) -> None:
    key, sock = root / "munge.key", root / "munge.sock"
    subprocess.run(
        ["mungekey", "-c", "-k", str(key)], env=environment, check=True, capture_output=True
    )
    root.chmod(0o755)  # munged insists that others cannot write, and can reach its socket
    _daemon(
        *(stack, root, environment, "munged", "-F", f"--key-file={key}", "-S", str(sock)),
        *(f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log"),
        *(f"--seed-file={root}/munged.seed", "--force"),
    )
    _await(sock.exists, "munged")
    _daemon(stack, root, environment, "slurmctld", "-i", "-D")
    for node in _NODES:
        _daemon(stack, root, environment, "slurmd", "-D", "-N", node)
    _await(lambda: _states(environment) == ["idle"] * len(_NODES), "two idle nodes")


def _daemon(
    stack: contextlib.ExitStack, root: Path, environment: dict[str, str], *words: str
) -> None:
    with (root / f"{words[0]}.out").open("a") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)


def _states(environment: dict[str, str]) -> list[str]:
    asked = ["sinfo", "-h", "-N", "-o", "%T"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=30)
    return done.stdout.split()


def _await(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} in 30 s")
        time.sleep(0.1)


def _free_ports() -> list[int]:
    """Of the controller, and one after the other of the nodes."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            controller, first, second = (stack.enter_context(socket.socket()) for _ in range(3))
            controller.bind(("127.0.0.1", 0))
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            return [one.getsockname()[1] for one in (controller, first, second)]
