"""Every command line of the README composes: its keys are there, its choices exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwenimg_dist.commands.main import COMMANDS
from qwenimg_dist.compose import load_config

ROOT = Path(__file__).parents[2]


def command_lines() -> list[str]:
    """Those of code blocks, continued lines joined, without comments."""
    found = []
    for block in re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^|\s)(?:qwenimg-dist|-m qwenimg_dist)\s+(.*)", line):
                found.append(match[1])
    return found


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if word != "..."]


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_readme_composes(line: str) -> None:
    command, *words = words_of(line)
    assert command in COMMANDS, line
    assert not [word for word in words if word.startswith("[")], f"a shell hands it on as it is: {line}"
    given = [word for word in words if "=" in word]
    load_config(given)


def test_the_lines_are_found() -> None:
    assert len(command_lines()) > 25
