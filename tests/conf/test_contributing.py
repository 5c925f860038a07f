"""CONTRIBUTING shows the code as it is."""

from __future__ import annotations

import re

from qwenimg_dist.compose import conf_dir

ROOT = conf_dir().parent


def test_the_shown_diff_of_a_filter_is_that_filter() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    shown = re.split(r"^\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    files = dict(zip(shown[::2], shown[1::2], strict=True))
    assert len(files) == 4
    for name, lines in files.items():
        added = [line[1:] for line in lines.splitlines() if line.startswith("+")]
        code = (ROOT / name).read_text().splitlines()
        if name.endswith("__init__.py"):
            assert all(line in code for line in added)
        else:
            assert added == code, name
