"""No secret lies in the tree, and no dependency has a known hole; what code may not do, ruff's rules S refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Look like keys: pinned revisions and names of secrets; in tests also expected digests and keys made up to be hidden.
NOT_SECRET = r"revision: .?[0-9a-f]{40}|secretName: "
MADE_UP = ("HexHighEntropyString", "KeywordDetector", "BasicAuthDetector")
NOT_IN_TESTS = tuple(word for plugin in MADE_UP for word in ("--disable-plugin", plugin))


def scan(files: list[str], *options: str, cwd: Path = ROOT) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "detect_secrets",
        "scan",
        "--no-verify",
        "--exclude-lines",
        NOT_SECRET,
        *options,
        *files,
    ]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    results = json.loads(found.stdout)["results"]
    assert isinstance(results, dict)
    return results


@pytest.mark.slow
def test_no_secret_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    texts = [name for name in tracked.stdout.splitlines() if not name.endswith((".safetensors", "tokenizer.json"))]
    assert len(texts) > 300
    tests = [name for name in texts if name.startswith("tests/")]
    assert scan(tests, *NOT_IN_TESTS) == {}
    assert scan(sorted({*texts} - {*tests})) == {}


def test_the_scan_finds_one(tmp_path: Path) -> None:
    planted = tmp_path / "config.yaml"
    planted.write_text("wandb_api_key: " + "3f9a1c77b2e04d58" + "a6c1e9d07b5f24813c60aa19\n")
    assert list(scan(["config.yaml"], cwd=tmp_path)) == ["config.yaml"]


@pytest.mark.slow
def test_no_dependency_has_a_known_hole() -> None:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    audit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    if not audit.stdout.strip():
        pytest.skip(f"no answer from the advisory service: {audit.stderr[-200:]}")
    packages = json.loads(audit.stdout)["dependencies"]
    answered = [one for one in packages if "vulns" in one]
    if not answered:
        pytest.skip("the package index here has no advisories")
    holes = {one["name"]: [hole["id"] for hole in one["vulns"]] for one in answered if one["vulns"]}
    assert holes == {}
