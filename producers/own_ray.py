"""The Ray that a command starts for itself: on loopback alone, and with a token of its own.

Place in the flow: `ray_cluster.ray_session` starts and ends such a Ray inside `private()`. By itself Ray would make the
machine's outer address of 127.0.0.1 and listen on all of them; and it would write a token that lasts into the user's
home, where others of a shared machine may read it. What the user set (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`) holds. Refuses
nothing: a Ray without these switches starts as it would have.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Final

from ray._private import ray_constants

ADDRESS: Final = "127.0.0.1"
_MODE: Final = "RAY_AUTH_MODE"
_TOKEN: Final = "RAY_AUTH_TOKEN"  # noqa: S105 - the variable's name
_TOKEN_FILE: Final = "RAY_AUTH_TOKEN_PATH"  # noqa: S105


@contextlib.contextmanager
def private() -> Iterator[None]:
    """While such a Ray starts and runs. Its processes inherit the environment that this process has here."""
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN, _TOKEN_FILE)}
    given = before[_TOKEN] or before[_TOKEN_FILE] or before[_MODE] == "disabled"
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    # What Ray does by default where firewalls ask about every port: 127.0.0.1 stays what it is.
    ray_constants.ENABLE_RAY_CLUSTER = False
    if not given:
        os.environ[_TOKEN] = secrets.token_hex(32)
        _forget_token()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        if not given:
            _restore(before)
            _forget_token()


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _forget_token() -> None:
    """Ray reads the token once."""
    loader = getattr(importlib.import_module("ray._raylet"), "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()
