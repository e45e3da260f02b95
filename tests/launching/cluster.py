"""A SLURM cluster on this machine: a controller, two nodes and munge, in a folder of their own.

A job in the partition `high` preempts those in `low`, the default one.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
HANGS_S = 300
NODES = ("127.0.0.1", "127.0.0.2")  # by their names the processes of a job meet, so they must be addresses here

_CONF = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=1
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
KillWait=30
NodeName={nodes[0]} Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={nodes[1]} Port={ports[2]} CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def lacking() -> str | None:
    """Why there can be no cluster here, in a few words; None if there can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"no {', '.join(missing)}: install slurm-wlm and munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster of two nodes; yields the environment in which sbatch and the other commands find it."""
    host = socket.gethostname().split(".")[0]
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    text = _CONF.format(host=host, nodes=NODES, folder=folder, ports=_free_ports(3))
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-c", "-N", node] for node in NODES),
    ]
    started: list[subprocess.Popen[bytes]] = []
    with (folder / "daemons.log").open("wb") as log:
        try:
            for command in commands:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                if command[0] == "munged":
                    _wait_for(lambda: (folder / "munge.socket").exists(), folder)
            _wait_for(lambda: idle(environment) == 2, folder)
            yield environment
            # Else what ends a job would be left over, and wait for the daemons forever.
            subprocess.run(["scancel", "--user=root"], env=environment, check=True)
            _wait_for(lambda: idle(environment) == 2, folder)
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait(HANGS_S)


def idle(environment: Mapping[str, str]) -> int:
    """The number of nodes that can take a job: nothing of an earlier one is left there."""
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%n"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return len(set(done.stdout.splitlines())) if done.returncode == 0 else 0


def _wait_for(condition: Callable[[], bool], folder: Path) -> None:
    until = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < until, "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
