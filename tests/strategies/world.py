"""A world of two processes that lives as long as the tests: jobs in, results out.

Importing torch, Lightning and transformers takes a process longer than a tiny run, so the same
ranks do one job after another, in a process group that is made once. They look to Lightning as if
torchrun had started them. A job is named by its module and function and is called on every rank:

    def double(rank_value: int) -> int: ...

    assert two_ranks.run("tests.strategies.some_module:double", 3) == [6, 6]

Arguments and results are pickled. A job that fails or takes too long ends the world, and the next
one gets a new world: what half a collective leaves behind is no ground for another test.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0  # imports, on a machine that does other things too
GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
LOG_TAIL = 3000  # characters of what a rank printed last


class RanksFailed(AssertionError):
    """A job has failed or hung on some rank; the message holds what each of them said."""


class World:
    """Ranks that wait for jobs; they are started by the first.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.seconds = 0.0
        """How long the last job took."""
        self._folder = Path(tempfile.mkdtemp(prefix="ranks"))
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._starts = 0

    def run(self, job: str, *args: Any, timeout: float = 200.0) -> list[Any]:
        """Call a function on every rank.

        Args:
            job: ``module:function``.
            args: What it is called with.
            timeout: Seconds until it counts as hung.

        Returns:
            What each rank's call returned, in the order of the ranks.

        Raises:
            RanksFailed: It raised an exception, or hung, on a rank.
        """
        if not self._ranks:
            self._start()
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send((job, args))
        replies = self._replies(timeout)
        self.seconds = time.perf_counter() - started
        if all(reply is not None and reply[0] for reply in replies):
            return [reply[1] for reply in replies]
        told = self._told(job, replies, timeout)
        self.close()
        raise RanksFailed(told)

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.wait()
        for pipe in self._pipes:
            pipe.close()
        self._ranks, self._pipes = [], []

    def _start(self) -> None:
        self._starts += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = Pipe()
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.strategies.world", str(theirs.fileno())],
                    cwd=ROOT,
                    env=os.environ | environment(rank, self.size, port),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            theirs.close()
            self._ranks.append(process)
            self._pipes.append(ours)
        replies = self._replies(START_SECONDS)
        if not all(reply is not None and reply[0] for reply in replies):
            told = self._told("start", replies, START_SECONDS)
            self.close()
            raise RanksFailed(told)

    def _replies(self, timeout: float) -> list[Any]:
        """What each rank answers; ``None`` for one that does not, or has died."""
        replies: list[Any] = [None] * self.size
        pending = list(range(self.size))
        end = time.monotonic() + timeout
        while pending and (left := end - time.monotonic()) > 0:
            ready = wait([self._pipes[rank] for rank in pending], timeout=left)
            for rank in [rank for rank in pending if self._pipes[rank] in ready]:
                pending.remove(rank)
                try:
                    replies[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    replies[rank] = (False, f"died with code {self._ranks[rank].wait()}")
                if not replies[rank][0]:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        for rank in pending:  # where it stands goes to its log
            self._ranks[rank].send_signal(signal.SIGUSR1)
        if pending:
            time.sleep(0.5)
        return replies

    def _told(self, job: str, replies: list[Any], timeout: float) -> str:
        lines = [f"{job} failed on {self.size} ranks"]
        for rank, reply in enumerate(replies):
            if reply is not None and reply[0]:
                lines.append(f"----- rank {rank}: did it")
                continue
            what = f"no answer (limit {timeout:.0f} s)" if reply is None else reply[1]
            log = self._log(rank).read_text(errors="replace")[-LOG_TAIL:]
            lines.append(f"----- rank {rank}: {what}\n----- rank {rank} printed last:\n{log}")
        return "\n".join(lines)

    def _log(self, rank: int) -> Path:
        return self._folder / f"world{self._starts}-rank{rank}.log"


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes of one node, and what our tests tell theirs."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "OMP_NUM_THREADS": "1",
        "LIT_LLM_TRACEBACK": "1",  # a mistake is raised, not turned into an exit code
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'recipes'}",
        # deepspeed looks for ninja there
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


# ----- the ranks' side ----------------------------------------------------------------------------


def work(pipe: Connection) -> None:
    """Do jobs until the pipe is closed."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    pipe.send(_done("tests.strategies.world:prepare", ()))
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        kept = dict(os.environ)
        pipe.send(_done(job, args))
        os.environ.clear()
        os.environ.update(kept)
        gc.collect()


def prepare() -> None:
    """Import what takes long, and make the process group that all jobs use."""
    import torch
    import torch.distributed as dist

    import lit_llm.cli  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def _done(job: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    module, _, function = job.partition(":")
    try:
        return True, getattr(importlib.import_module(module), function)(*args)
    except BaseException:
        return False, traceback.format_exc()


def _end_with_parent(parent: int) -> None:
    """A rank that hangs in a collective does not see that its tests were killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))
    os._exit(0)  # no farewell to the other ranks, which are gone too
