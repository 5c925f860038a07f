"""Prompts from a file: lines of a text file, or rows of a `.jsonl` with whatever a reward needs to know besides; or a
set that comes with the package: `text` are prompts that quote what is to be written, English and Chinese.

Place in the flow: `sample`, `eval` and `pairs` read `sample.prompts_file` through it. Refuses a row without a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from qwenimg_dist.config import Config
from qwenimg_dist.rewards.base import Prompt

_COLUMNS: Final = ("prompt", "caption", "text")
BUILT_IN: Final = {"text": Path(__file__).resolve().parent / "rewards" / "assets" / "text_prompts.txt"}


def prompts_of(config: Config) -> list[Prompt]:
    """`sample.prompts`, then those of `sample.prompts_file`. Raises ValueError naming the file and line."""
    found = [Prompt(text=text) for text in config.sample.prompts]
    if config.sample.prompts_file is not None:
        given = config.sample.prompts_file
        found += read_prompts_file(BUILT_IN.get(given, Path(given)))
    return found


def read_prompts_file(file: Path) -> list[Prompt]:
    """One prompt per line, blank ones left out; of a `.jsonl`, the key `prompt`, the others are its metadata."""
    if not file.is_file():
        raise ValueError(
            f"sample.prompts_file={file} is not a file (nor one of the built-in sets: {', '.join(BUILT_IN)})"
        )
    lines = file.read_text(encoding="utf-8-sig").split("\n")  # a prompt may hold what else Unicode calls a line's end
    if file.suffix != ".jsonl":
        return [Prompt(text=line.strip()) for line in lines if line.strip()]
    return [_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _row(file: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
    name = next((name for name in _COLUMNS if isinstance(row, dict) and isinstance(row.get(name), str)), None)
    if name is None or not row[name].strip():
        raise ValueError(f"{file}, line {number}: no prompt under {' or '.join(_COLUMNS)}")
    return Prompt(text=row[name].strip(), metadata={key: value for key, value in row.items() if key != name})
