"""What `pairs` has done: a line for every prompt, in one of two files, durable before the next one counts.

    FOLDER/pairs.jsonl      a pair per line, as `produce source=pairs` reads it
    FOLDER/ties.ndjson      prompts whose pictures are too much alike; another suffix, so that no source takes them
    FOLDER/settings.json    what the pictures depend on: model, sampler, rewards, seeds, margin
    FOLDER/pictures/..      the pictures that the pairs name

A prompt is done if and only if a line of either file names its key. Pictures are written before the line; those of a
prompt that was cut off are drawn again under the same names. Refuses to go on with other settings: pairs of two
models, or of two margins, in one file would look alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from qwenimg_dist.config import flatten
from qwenimg_dist.data.facets import hold_lock
from qwenimg_dist.files import fsync_dir, write_json
from qwenimg_dist.rewards.base import Prompt

PAIRS: Final = "pairs.jsonl"
TIES: Final = "ties.ndjson"
SETTINGS: Final = "settings.json"
PICTURES: Final = "pictures"

Outcome = Literal["kept", "tie"]


def key_of(prompt: Prompt) -> str:
    """The same for the same text and metadata, wherever it stands in the file."""
    return hashlib.sha256(json.dumps([prompt.text, prompt.metadata], sort_keys=True).encode()).hexdigest()[:20]


def seeds_of(key: str, seed: int, count: int) -> list[int]:
    """Seeds of one prompt's pictures; others for another prompt, so that not all pairs begin at the same noise."""
    return [int.from_bytes(hashlib.sha256(f"{key}/{seed}/{i}".encode()).digest()[:4]) for i in range(count)]


class Book:
    """The open folder. Use it as a context: it holds a lock."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the folder is of other settings, or in use, or a line of it is damaged."""
        self.folder = folder
        self._stack = contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(hold_lock(folder / ".pairs.lock", f"another `pairs` is working on {folder}"))
        with contextlib.ExitStack() as stack:
            stack.callback(self._stack.close)
            self._check(settings)
            self._done: set[str] = set()
            self.gaps: list[float] = []
            self.num_ties = 0
            for record in self._recover(PAIRS):
                self._done.add(record["key"])
                self.gaps.append(float(record["gap"]))
            for record in self._recover(TIES):
                self._done.add(record["key"])
                self.num_ties += 1
            self._sinks = {name: self._stack.enter_context(open(folder / name, "ab", 0)) for name in (PAIRS, TIES)}
            fsync_dir(folder)
            stack.pop_all()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, key: str) -> bool:
        return key in self._done

    @property
    def num_kept(self) -> int:
        return len(self.gaps)

    def write(self, outcome: Outcome, record: Mapping[str, Any]) -> None:
        """Add the prompt's line; it is on the disk when this returns."""
        sink = self._sinks[PAIRS if outcome == "kept" else TIES]
        line = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        while line:
            line = line[sink.write(line) :]
        os.fsync(sink.fileno())
        self._done.add(record["key"])
        if outcome == "kept":
            self.gaps.append(float(record["gap"]))
        else:
            self.num_ties += 1

    def newest(self, count: int) -> list[dict[str, Any]]:
        """The last pairs, in their order."""
        with open(self.folder / PAIRS, encoding="utf-8") as lines:
            last = [line for number, line in enumerate(lines) if number >= self.num_kept - count]
        return [json.loads(line) for line in last]

    def _check(self, settings: Mapping[str, Any]) -> None:
        file = self.folder / SETTINGS
        if not file.is_file():
            if (self.folder / PAIRS).exists():
                raise ValueError(f"{self.folder} has {PAIRS} but no {SETTINGS}: choose another pairs.path")
            write_json(file, dict(settings))
            return
        there, here = flatten(read_settings(self.folder) or {}), flatten(json.loads(json.dumps(settings)))
        differ = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        if differ:
            told = "; ".join(f"{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in differ[:5])
            raise ValueError(
                f"{self.folder} was made with other settings ({told}): choose another pairs.path, or set them as they "
                "were"
            )

    def _recover(self, name: str) -> Iterator[dict[str, Any]]:
        """The file's records, after cutting off a last line that was being written when the process died."""
        file = self.folder / name
        if not file.exists():
            return
        good = 0
        with open(file, "rb+") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    yield {"key": str(record["key"]), "gap": float(record["gap"])}
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}, line {number} is damaged ({error}): remove the line") from error
                good += len(line)
            lines.truncate(good)
            lines.flush()
            os.fsync(lines.fileno())


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What an earlier command wrote there; None if there was none. Raises ValueError if it cannot be read."""
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another pairs.path") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is not a mapping: choose another pairs.path")
    return settings
