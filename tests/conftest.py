"""How the suite is shared out among workers of pytest-xdist (`make test`); without `-n` it changes nothing.

A file is one group, since its fixtures are the module's. Files that share a fixture of the session are one group too:
one worker makes its gang of ranks, or its training, for all of them. (`--dist loadgroup` would take marks for this; the
mark of xdist 3.8 has no effect with pytest 9.2.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

OF_THE_SESSION = re.compile(r"\b(gang_out|damage_out|options_out|early_demo|\w*results: (Results|Callable))\b")


def group_of(node_id: str, root: Path) -> str:
    """What must run in one worker with a test."""
    name = node_id.partition("::")[0]
    file = root / name
    return "session" if file.is_file() and OF_THE_SESSION.search(file.read_text(encoding="utf-8")) else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In place of `--dist loadfile`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid, config.rootpath)

    return ByFile(config, log)
