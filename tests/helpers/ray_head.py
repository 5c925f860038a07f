"""A real Ray head of its own on loopback, with a dashboard that wants a token: what jobs are submitted to."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
_READY_S = 90.0
_END_S = 8.0
_NOT_YET = ("No available agent to submit job", "Failed to connect to Ray")


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """Where it listens, and the environment in which commands reach it."""

    pid: int
    dashboard: str
    address: str
    env: dict[str, str]

    def submit(self, *words: str, submission_id: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of the repository as it is, with launch/runtime_env.yaml."""
        options = ["--submission-id", submission_id, "--runtime-env", "launch/runtime_env.yaml", "--working-dir", "."]
        deadline = time.monotonic() + _READY_S
        while True:
            ended = self.job("submit", *options, *([] if wait else ["--no-wait"]), "--", *words)
            # The dashboard answers before the agent that starts jobs is there, and on a busy machine not at once.
            told = ended.stdout + ended.stderr
            if not any(words in told for words in _NOT_YET) or time.monotonic() > deadline:
                return ended
            time.sleep(1)

    def job(self, verb: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job VERB`."""
        return subprocess.run(
            [RAY, "job", verb, "--address", self.dashboard, *words],
            cwd=REPOSITORY,
            env=env or self.env,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


@contextmanager
def ray_head(num_cpus: int) -> Iterator[RayHead]:
    """Started in the foreground, so that ending that one process ends all of it."""
    port, dashboard, client, agent = _free_ports(4)
    # Sockets live below it, and a socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="qid-ray-"))
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    env.pop("PYTHONPATH", None)  # the job's code is what was submitted
    command = [RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client), "--num-cpus", str(num_cpus), "--temp-dir", str(folder)]
    command += ["--object-store-memory", str(100 << 20), "--include-dashboard", "true"]
    # By default one port for all: the agent of a second head on this machine would end, and that head with it.
    command += ["--dashboard-agent-listen-port", str(agent)]
    with open(folder / "head.log", "wb") as sink:
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{dashboard}/api/version", process, folder / "head.log")
        yield RayHead(pid=process.pid, dashboard=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{port}", env=env)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of the head and all that it started, workers of jobs among them, nothing is left."""
    parent = psutil.Process(process.pid)
    started = parent.children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([parent, *started], timeout=_END_S)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):  # there, and it wants a token
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not come up: {log.read_text(errors='replace')[-3000:]}")
