"""How the suite is shared out among workers of pytest-xdist (`make test`); without `-n` it changes nothing."""

from __future__ import annotations

import pytest

OF_THE_SESSION = {"gang_out", "damage_out", "options_out", "early_demo"}
"""Fixtures that cost a gang of ranks or a training: one worker makes them for all."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is one group, as its fixtures are the module's; files that share a fixture of the session are one too."""
    together = {item.path for item in items if OF_THE_SESSION & set(getattr(item, "fixturenames", ()))}
    for item in items:
        group = "session" if item.path in together else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
