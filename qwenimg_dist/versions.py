"""Which programs made something: versions of the packages that move numbers, and the project's own commit.

Place in the flow: `environment.json` of a run and the certificate of each checkpoint. Refuses to fail: what is not
installed, or is no checkout, is left out.
"""

from __future__ import annotations

import contextlib
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

from qwenimg_dist import __version__

PACKAGES: Final = ("torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy", "ray")
_GIT_TIMEOUT_S: Final = 10.0


def package_versions() -> dict[str, str]:
    """Package -> version, of those that are installed; `qwenimg-dist` among them."""
    versions = {"qwenimg-dist": __version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+changes` if files differ; None if it is none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").stdout.strip()
        changed = _git(root, "diff", "--quiet", "HEAD").returncode == 1
    except (OSError, subprocess.SubprocessError):
        return None
    return (commit + "+changes" * changed) if commit else None


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
