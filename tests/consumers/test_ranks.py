"""What one of two ranks meets is raised on both, and storage that was away is told from a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Results = Callable[[str], dict[str, Any]]
REFUSED, AWAY = "AgreedError", "StorageAwayError"


def test_both_ranks_raise_the_same_and_a_refusal_comes_first(results: Results) -> None:
    found = results("away")
    first = found["rank 0"].pop("away on the first")
    assert found["rank 1"].pop("away on the first") == [AWAY, "rank 0: OSError: [Errno 116] Stale"]
    assert first == ["OSError", "[Errno 116] Stale"]  # raised as it came: `is_away` knows it
    assert found["rank 0"] == found["rank 1"]
    assert found["rank 0"] == {
        "away on one": [AWAY, "[Errno 116] Stale"],
        "away and refused": [REFUSED, "refused"],
        "full and away": [REFUSED, "[Errno 28] No room"],
        "away on both": [AWAY, "[Errno 116] Stale"],
    }
