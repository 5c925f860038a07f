"""Where this process would find a key for W&B, and the refusal where there is none.

Place in the flow: `produce` asks before it writes, rank 0 before the engine loads the weights, `doctor` on every node.
Looks where `wandb` looks: the environment, the settings file, netrc. A key is found, never shown, and not tried, which
`wandb.init` does. Refuses nothing else: what cannot be read is no key.
"""

from __future__ import annotations

import configparser
import netrc
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from qwenimg_dist.config import LoggerConfig

_SERVER: Final = "https://api.wandb.ai"
_VARIABLES: Final = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check_key(config: LoggerConfig) -> None:
    """Raise ValueError if the config wants W&B's server, and no key for it can be found here."""
    url = server()
    if config.wandb == "online" and not key_place(url):
        raise ValueError(
            f"logger=online, and there is no W&B key for {urlsplit(url).netloc} on {socket.gethostname()}: set "
            "WANDB_API_KEY there (on a cluster before `ray start`, see launch/README.md) or `wandb login`, or choose "
            "logger=offline or logger=off"
        )


def server() -> str:
    """URL of the server that runs are sent to."""
    return os.environ.get("WANDB_BASE_URL") or _settings().get("base_url") or _SERVER


def key_place(url: str) -> str:
    """Where a key for this server is; empty if there is none."""
    for name in _VARIABLES:
        if os.environ.get(name):
            return name
    if _settings().get("api_key"):
        return str(_settings_file())
    file = _netrc_file()
    try:
        found = netrc.netrc(file).authenticators(urlsplit(url).netloc)
    except (OSError, netrc.NetrcParseError):
        return ""
    return str(file) if found and found[2] else ""


def _netrc_file() -> Path:
    if given := os.environ.get("NETRC"):
        return Path(given).expanduser()
    usual, other = Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()
    return other if other.exists() and not usual.exists() else usual


def _settings_file() -> Path:
    return Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"


def _settings() -> dict[str, str]:
    """What `wandb login --host` and the like left for all runs of this user."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(_settings_file())
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser.items("default")) if parser.has_section("default") else {}
