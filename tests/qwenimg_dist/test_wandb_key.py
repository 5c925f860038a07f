"""A key for W&B is found where `wandb` finds it, and its lack is said before anything is begun."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qwenimg_dist.config import LoggerConfig
from qwenimg_dist.wandb_key import check_key, key_place, server

ONLINE = LoggerConfig(wandb="online")
SERVER = "https://api.wandb.ai"


@pytest.fixture(autouse=True)
def _nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_CONFIG_DIR", raising=False)


def test_without_a_key_the_machine_and_the_way_out_are_named() -> None:
    with pytest.raises(ValueError, match=r"no W&B key for api\.wandb\.ai") as refused:
        check_key(ONLINE)
    for words in (socket.gethostname(), "WANDB_API_KEY", "logger=offline"):
        assert words in str(refused.value)
    check_key(LoggerConfig(wandb="offline"))
    check_key(LoggerConfig(wandb="off"))


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_the_environment_comes_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hidden")
    assert key_place(SERVER) == name
    check_key(ONLINE)


@pytest.mark.parametrize("name", [".netrc", "_netrc", "elsewhere"])
def test_netrc_is_by_server_and_port(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("machine api.wandb.ai login user password hidden\n")
    if name == "elsewhere":
        monkeypatch.setenv("NETRC", str(tmp_path / name))
    assert key_place(SERVER) == str(tmp_path / name)
    assert key_place("http://wandb.here:8080") == ""
    (tmp_path / name).write_text("machine wandb.here:8080 login user password hidden\n")
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.here:8080")
    assert key_place(server()) == str(tmp_path / name)
    (tmp_path / name).write_text("machine {\n")
    assert key_place(server()) == ""


def test_the_settings_that_a_login_left(tmp_path: Path) -> None:
    file = tmp_path / ".config" / "wandb" / "settings"
    file.parent.mkdir(parents=True)
    file.write_text("[default]\nbase_url = http://wandb.here:8080\n")
    assert server() == "http://wandb.here:8080"
    with pytest.raises(ValueError, match=r"no W&B key for wandb\.here:8080"):
        check_key(ONLINE)
    file.write_text("[default]\napi_key = hid%den\n")
    assert (server(), key_place(SERVER)) == (SERVER, str(file))
    file.write_text("damaged")
    assert key_place(SERVER) == ""


def test_wandb_itself_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the places above, those that need no process of its own to ask."""
    from wandb.sdk.lib.wbauth import read_netrc_auth

    key = "0123456789" * 4
    (tmp_path / "_netrc").write_text(f"machine wandb.here:8080 login user password {key}\n")
    assert read_netrc_auth(host="http://wandb.here:8080") == key
    assert key_place("http://wandb.here:8080")
    assert read_netrc_auth(host="http://wandb.here") is None
    assert not key_place("http://wandb.here")
