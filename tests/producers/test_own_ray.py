"""Who can reach a Ray that a command starts for itself: nobody outside this machine, and nobody without its token."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from producers import own_ray
from producers.ray_cluster import ray_session
from qwenimg_dist.compose import load_config

STRANGER = "import ray, sys; ray.init(address=sys.argv[1], logging_level='CRITICAL'); print(len(ray.nodes()))"
_NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def listening(processes: list[psutil.Process]) -> set[tuple[str, str]]:
    """(name, address) of every TCP socket on which one of them listens."""
    found = set()
    for process in processes:
        for one in process.net_connections(kind="tcp"):
            if one.status == psutil.CONN_LISTEN:
                found.add((process.name(), one.laddr.ip.removeprefix("::ffff:")))
    return found


def stranger(address: str, home: Path, token: str | None) -> subprocess.CompletedProcess[str]:
    """Another program that asks this Ray for its nodes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(home), "RAY_AUTH_MODE": "token"} | ({"RAY_AUTH_TOKEN": token} if token else {})
    env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # it would look for this machine's other address
    return subprocess.run(
        [sys.executable, "-c", STRANGER, address], env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_it_listens_on_loopback_alone_and_wants_the_token_of_this_session(tmp_path: Path) -> None:
    before = {name: os.environ.get(name) for name in _NAMES}
    with ray_session(load_config([]).cluster):

        @ray.remote
        def here() -> str:
            return ray.util.get_node_ip_address()

        assert ray.get(here.remote()) == "127.0.0.1"
        # The worker's own server among them.
        sockets = listening([psutil.Process(), *psutil.Process().children(recursive=True)])
        assert {"raylet", "gcs_server"} <= {name for name, _ in sockets}
        assert {address for _, address in sockets} <= {"127.0.0.1", "::1"}, sockets
        address = ray.get_runtime_context().gcs_address
        token = os.environ["RAY_AUTH_TOKEN"]
        assert not list(tmp_path.rglob("auth_token"))  # what lasts would be there for everybody's next Ray
        assert stranger(address, tmp_path, "0" * 64).returncode != 0
        known = stranger(address, tmp_path, token)
        assert known.returncode == 0, known.stderr[-2000:]
        assert known.stdout.strip() == "1"
    assert {name: os.environ.get(name) for name in _NAMES} == before
    with ray_session(load_config([]).cluster):  # another one, with another token
        assert os.environ["RAY_AUTH_TOKEN"] != token
        assert ray.get(ray.remote(lambda: 7).remote()) == 7


def test_what_the_user_set_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_ray.private():
        made = os.environ["RAY_AUTH_TOKEN"]
        assert len(made) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with own_ray.private():
        assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with own_ray.private():
        assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(KeyError), own_ray.private():
        raise KeyError("a start that fails leaves nothing behind")
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_check_of_sockets_sees_one_that_is_open_to_all() -> None:
    with socket.socket() as one:
        one.bind(("0.0.0.0", 0))
        one.listen()
        assert "0.0.0.0" in {address for _, address in listening([psutil.Process()])}
