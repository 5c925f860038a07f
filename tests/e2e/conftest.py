"""What several end-to-end tests share."""

from __future__ import annotations

import pytest
from early_demo import EarlyDemo, make_early_demo


@pytest.fixture(scope="session")
def early_demo(tmp_path_factory: pytest.TempPathFactory) -> EarlyDemo:
    """An early checkpoint of the demo, not to be changed; see `early_demo.py`."""
    return make_early_demo(tmp_path_factory.mktemp("early"))
