"""A Ray cluster of several nodes on this machine, for tests; nothing of it listens beyond loopback.

Started as a process of its own. It prints its address and that for Ray's client, obeys the lines it reads (``add``,
``narrow``, ``kill N``), and ends with its standard input. The first node has the cluster's own services and no CPU,
each other one CPU.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # read on Linux, too: 127.0.0.1 stays what it is
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
# A dead node is noticed after two seconds, not fifteen; one that is only slow has time.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 4,
    "agent_register_timeout_ms": 300_000,  # a node ends where a helper of it takes longer to start
}
_ATTEMPTS = 4


class RunningCluster:
    """The other end of the pipes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address, self.client = self.answer().split()

    def tell(self, line: str) -> str:
        """Have something done, and wait until it is."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the cluster could not be started, or has ended")
        return line


@contextmanager
def running(*nodes: str, environment: Mapping[str, str]) -> Iterator[RunningCluster]:
    """A cluster with nodes of these kinds; all of its processes have what ``environment`` holds."""
    command = [sys.executable, str(Path(__file__))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **environment, **ENVIRONMENT},
    )  # fmt: skip
    try:
        cluster = RunningCluster(process)
        for node in nodes:
            cluster.tell(node)
        yield cluster
    finally:
        process.communicate(timeout=300)


def main() -> None:
    from ray.cluster_utils import Cluster

    port = free_port()
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, "ray_client_server_port": port}
    cluster = tried(lambda: Cluster(initialize_head=True, head_node_args=head))
    say(f"{cluster.address} ray://127.0.0.1:{port}")
    nodes = []
    for line in sys.stdin:
        what, _, number = line.strip().partition(" ")
        if what == "kill":
            os.kill(nodes[int(number)].all_processes["raylet"][0].process.pid, signal.SIGKILL)
        else:
            cores = os.sched_getaffinity(0)
            if what == "narrow":  # a machine with another number of cores
                os.sched_setaffinity(0, {min(cores)})
            nodes.append(tried(lambda: cluster.add_node(**NODE)))
            os.sched_setaffinity(0, cores)
        say("done")
    cluster.shutdown()


def free_port() -> int:
    """Below those that the system gives to whoever asks for any, and above those that Ray takes."""
    for number in random.Random(os.getpid()).sample(range(24_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", number))
            return number
    raise RuntimeError("no port is free")


def tried(start: Callable[[], Any]) -> Any:
    """Once more where a node did not start, as on a machine that is too busy for Ray's patience."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return start()
        except Exception:
            time.sleep(1.0)
    return start()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
