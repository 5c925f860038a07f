"""Are the packages there, within the bounds that this package was installed with, and the same on all nodes?

Read from package metadata, so nothing is imported. Different versions of what travels between nodes (Ray, torch,
DeepSpeed, Python) are failures: Ray refuses or hangs, and ranks compute different things.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Final

from packaging.requirements import InvalidRequirement, Requirement

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning

PACKAGE: Final = "qwenimg-dist"
_SAME_EVERYWHERE: Final = ("python", "torch", "deepspeed", "ray", PACKAGE)


def check(context: Context) -> Sequence[Finding]:
    answers = context.nodes.ask(look, timeout_s=context.timeout_s)
    found = answers.findings("versions")
    for node, there in answers.values.items():
        found += judge(node, there)
    return [*found, *judge_together(answers.values)]


def look() -> dict[str, Any]:
    """Python, installed versions and requirements, on a node."""
    wanted = requirements()
    versions: dict[str, str | None] = {}
    for requirement in wanted:
        name = Requirement(requirement).name
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        versions[PACKAGE] = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        versions[PACKAGE] = None
    return {"python": platform.python_version(), "versions": versions, "requirements": wanted}


def requirements() -> list[str]:
    """What the installed package needs, extras left out."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(line)
    return found


def judge(node: str, there: Mapping[str, Any]) -> list[Finding]:
    """One node's packages against their bounds."""
    found, versions = [], there["versions"]
    if not there["requirements"]:
        told = f"{PACKAGE} is not installed as a package, so there are no bounds to compare with"
        return [warning(f"versions on {node}", told, "pip install it (or `pip install -e .`) on every node")]
    for line in there["requirements"]:
        requirement = Requirement(line)
        version = versions.get(requirement.name)
        fix = f"pip install '{requirement.name}{requirement.specifier}' on {node}"
        if version is None:
            found.append(failure(f"{requirement.name} on {node}", "is not installed", fix))
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(failure(f"{requirement.name} on {node}", f"{version} is not {requirement.specifier}", fix))
    if not found:
        shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "ray") if versions.get(name))
        found.append(ok(f"versions on {node}", f"Python {there['python']}, {shown}: within bounds"))
    return found


def judge_together(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """All nodes' packages against each other."""
    found: list[Finding] = []
    flat = {node: {"python": there["python"], **there["versions"]} for node, there in nodes.items()}
    for name in dict.fromkeys(name for versions in flat.values() for name in versions):
        by_version: dict[str, list[str]] = {}
        for node, versions in flat.items():
            by_version.setdefault(str(versions.get(name)), []).append(node)
        if len(by_version) > 1:
            told = "; ".join(f"{version} on {', '.join(where)}" for version, where in by_version.items())
            say = failure if name in _SAME_EVERYWHERE else warning
            found.append(say(f"{name} on all nodes", f"differs: {told}", "take one image for all nodes"))
    return found
