"""Run all benchmarks, one after the other, each in a process of its own.

    python tests/bench/all.py [--quick] [--out FOLDER]        FOLDER gets one JSON file per benchmark

A benchmark that fails is named, the others still run; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
BENCHMARKS: Final = (
    "padding",
    "loader",
    "data_wait",
    "backpressure",
    "picture_path",
    "filters",
    "ocr",
    "producer",
    "near_duplicates",
    "million_rows",
    "inspect_rows",
    "consumer_step",
    "traffic",
    "memory",
    "saving",
    "post_training",
    "plan",
    "gpu",
)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="small sizes and few repeats: shows that it runs")
    options.add_argument("--out", type=Path, default=None, help="folder for the JSON files")
    args = options.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    failed = []
    for name in BENCHMARKS:
        command = [sys.executable, str(HERE / f"{name}.py")]
        command += ["--quick"] * args.quick
        command += ["--out", str(args.out / f"{name}.json")] if args.out else []
        print(f"==== {name} ====", flush=True)
        if subprocess.run(command, env=environment, cwd=HERE.parents[1], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
