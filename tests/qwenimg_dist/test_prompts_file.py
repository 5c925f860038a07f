"""Prompts of a file: lines, or rows with what a reward needs to know; a bad row is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenimg_dist.compose import load_config
from qwenimg_dist.prompts_file import prompts_of, read_prompts_file
from qwenimg_dist.rewards import refusals


def test_lines_and_rows_after_those_of_the_command(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_bytes("\ufeff a red circle \n\n一只狐狸\n".encode())
    config = load_config(["sample.prompts=[first]", f"sample.prompts_file={lines}"])
    assert [one.text for one in prompts_of(config)] == ["first", "a red circle", "一只狐狸"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": " a sign ", "quote": "OPEN"}\n\n{"caption": "b", "n": [1]}\n')
    found = read_prompts_file(rows)
    assert [(one.text, dict(one.metadata)) for one in found] == [("a sign", {"quote": "OPEN"}), ("b", {"n": [1]})]


@pytest.mark.parametrize("row", ["[1]", '{"prompt": 3}', '{"prompt": " "}', "{", '"text"'])
def test_a_bad_row_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2"):
        read_prompts_file(file)
    with pytest.raises(ValueError, match="is not a file"):
        read_prompts_file(tmp_path / "none.txt")


def test_other_ends_of_lines_than_n_are_part_of_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n'.encode())
    assert [one.text for one in read_prompts_file(file)] == ["a\u2028b", "c"]


def test_the_set_of_text_prompts_has_a_text_to_judge_in_every_one() -> None:
    found = prompts_of(load_config(["sample.prompts_file=text"]))
    assert len(found) == len({one.text for one in found}) >= 24
    config = load_config(["reward.weights.ocr=1"]).reward
    assert refusals(config, found) == []
    assert sum(any("\u4e00" <= letter <= "\u9fff" for letter in one.text) for one in found) >= 8
