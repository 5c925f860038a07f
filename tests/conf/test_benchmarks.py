"""`make bench` and the README know the benchmarks that there are."""

from __future__ import annotations

import importlib.util
import re

from qwenimg_dist.compose import conf_dir

ROOT = conf_dir().parent
BENCH = ROOT / "tests" / "bench"
PROGRAMS = {file.stem for file in BENCH.glob("*.py") if 'if __name__ == "__main__"' in file.read_text()} - {"all"}


def test_all_of_them_are_run_by_make_bench() -> None:
    spec = importlib.util.spec_from_file_location("bench_all", BENCH / "all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.BENCHMARKS) == len(set(module.BENCHMARKS))
    assert set(module.BENCHMARKS) == PROGRAMS


def test_the_readme_names_only_benchmarks_that_there_are() -> None:
    named = set(re.findall(r"tests/bench/(\w+)\.py", (ROOT / "README.md").read_text()))
    assert named
    assert named <= PROGRAMS | {"all"}
