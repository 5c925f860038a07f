"""`python -m qwenimg_dist.report RUN`: write RUN/report.html. How a training run has it made beside itself."""

from __future__ import annotations

import sys
from pathlib import Path

from qwenimg_dist.report.run_report import write_run_report

if __name__ == "__main__":
    write_run_report(Path(sys.argv[1]))
