"""
The worker processes of a run: one for each device of this machine, or one that joins those that torchrun, accelerate or
srun have started. Imports no torch.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.errors import RunError

STORE_DESCRIPTOR = "MEMPLAN_STORE_FD"
"""Set for workers that we start ourselves: the socket on which rank 0 serves the store."""
LOST_PEER = 75
"""Exit code of a worker that ended because another one had (EX_TEMPFAIL of sysexits.h)."""
GRACE_SECONDS = 5.0
"""
How long the others may take to end by themselves once one has failed. gloo notices at once and NCCL never does; without
all of them nothing can be computed or saved.
"""
_FIRST_HOST = re.compile(r"([^\[,]+)(?:\[([^\],-]+))?")


@dataclass(frozen=True)
class Membership:
    """This process as one of several that somebody else has started."""

    rank: int
    local_rank: int
    world_size: int
    variables: dict[str, str]
    """What torch needs to find the others, for the worker's environment."""


def membership(environment: Mapping[str, str], world_size: int) -> Membership | None:
    """
    Which of several processes this one is; None if it was started alone, and has to start the others itself.

    torchrun and `accelerate launch` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; srun sets variables
    of its own for each task of a step.

    Raises:
        RunError: there are not as many as the job's `world_size`.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = _from_torchrun(environment)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        found = _from_slurm(environment)
    else:
        return None
    if found.world_size != world_size:
        raise RunError(
            f"{found.world_size} processes were started, and the job's parallel degrees multiply to {world_size}",
            hint="start as many as `parallel.dp_shard` times `parallel.dp_replicate`, or change those",
        )
    return found if world_size > 1 else None


def _from_torchrun(environment: Mapping[str, str]) -> Membership:
    rank = int(environment["RANK"])
    return Membership(rank, int(environment.get("LOCAL_RANK", rank)), int(environment["WORLD_SIZE"]), {})


def _from_slurm(environment: Mapping[str, str]) -> Membership:
    rank, local_rank = environment["SLURM_PROCID"], environment["SLURM_LOCALID"]
    world_size = environment["SLURM_STEP_NUM_TASKS"]
    # Ports above 20000 and below those that Linux hands out by itself; other jobs on the node have other numbers.
    port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", world_size)
    per_node = re.match(r"\d+", here)
    variables = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": per_node[0] if per_node else world_size,
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(hosts)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }
    return Membership(int(rank), int(local_rank), int(world_size), variables)


def first_host(nodes: str) -> str:
    """
    The first host of a Slurm node list.

    >>> first_host("gpu[07-09,12],login1"), first_host("a,b"), first_host("n[3,5]")
    ('gpu07', 'a', 'n3')
    """
    found = _FIRST_HOST.match(nodes)
    return found[1] + (found[2] or "") if found else nodes


@dataclass(frozen=True)
class Ending:
    """How the workers of this machine ended."""

    code: int
    """What to exit with; 128 + signal where one was killed."""
    killed: tuple[int, int] | None = None
    """The rank of a worker that was killed, by what signal: it could not say anything itself."""
    stopped: int | None = None
    """The signal that was sent to us, if one was."""


class Workers:
    """
    Processes that run one command, with signals passed on to them.

    They have a session of their own, so that Ctrl-C reaches each of them once: through us. A second signal ends them at
    once. When one fails, the others have `grace_seconds` to end by themselves.

    Args:
        count: processes to start; 1 starts one that belongs to no group, or to the one its environment says.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        count: int = 1,
        keep_open: Sequence[int] = (),
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._grace_seconds = grace_seconds
        self._received: list[int] = []
        self._failed = False
        listener = _listen() if count > 1 else None
        self._processes = []
        try:
            for rank in range(count):
                variables = dict(environment)
                if listener is not None:
                    variables |= _variables(rank, count, listener, environment)
                serves = [listener.fileno()] if listener is not None and rank == 0 else []
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=variables,
                        start_new_session=True,
                        pass_fds=(*keep_open, *serves),
                        stdin=subprocess.DEVNULL,
                    )
                )
        except BaseException:
            self._signal(signal.SIGKILL)
            raise
        finally:
            if listener is not None:
                listener.close()

    def wait(self) -> Ending:
        """Wait for all of them."""
        ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for rank, process in enumerate(self._processes):
            threading.Thread(target=_report_end, args=(rank, process, ended), daemon=True).start()
        before = {signum: signal.signal(signum, self._forward) for signum in (signal.SIGINT, signal.SIGTERM)}
        codes: list[tuple[int, int]] = []
        try:
            while len(codes) < len(self._processes):
                try:
                    codes.append(ended.get(timeout=self._grace_seconds if self._failed else None))
                except queue.Empty:
                    self._signal(signal.SIGKILL)
                    codes += [ended.get() for _ in range(len(self._processes) - len(codes))]
                    # Killed by us: they say nothing about the cause.
                    codes = [(rank, code) for rank, code in codes if code != -signal.SIGKILL] or codes
                    break
                self._failed = self._failed or codes[-1][1] != 0
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return _ending(codes, self._received)

    def _forward(self, signum: int, frame: object) -> None:
        self._received.append(signum)
        self._signal(signum if len(self._received) == 1 else signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signum)


def _report_end(
    rank: int, process: subprocess.Popen[bytes], ended: queue.SimpleQueue[tuple[int, int]]
) -> None:
    ended.put((rank, process.wait()))


def _ending(codes: list[tuple[int, int]], received: list[int]) -> Ending:
    stopped = received[0] if received else None
    killed = next(((rank, -code) for rank, code in codes if code < 0), None)
    if killed is not None:
        return Ending(128 + (stopped or killed[1]), killed, stopped)
    failures = [code for _, code in codes if code != 0]
    own = [code for code in failures if code != LOST_PEER]
    return Ending((own or failures or [0])[0], None, stopped)


def _listen() -> socket.socket:
    """A socket on a port that is ours from now on."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def _variables(
    rank: int, count: int, listener: socket.socket, environment: Mapping[str, str]
) -> dict[str, str]:
    """torch's variables for one of `count` processes on this machine."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        STORE_DESCRIPTOR: str(listener.fileno()),
    }
    if "OMP_NUM_THREADS" not in environment:
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    if "GLOO_SOCKET_IFNAME" not in environment and sys.platform == "linux":
        # All on this machine: gloo need not resolve the machine's name, which may lead nowhere.
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables
