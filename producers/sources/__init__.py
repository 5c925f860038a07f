"""Sources of rows, one file each. To add one: a file, an entry here, a config section, a YAML, a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from producers.sources.base import Source
from producers.sources.edits import Edits
from producers.sources.folder import Folder
from producers.sources.manifest import Manifest
from producers.sources.pairs import Pairs
from producers.sources.prompts import Prompts
from producers.sources.synthetic_text import SyntheticText
from producers.sources.webdataset import Webdataset
from qwenimg_dist.config import SourceConfig
from qwenimg_dist.schema import EDIT, IMAGE, PREFERENCE, PROMPT, Kind

SOURCES: Final[dict[str, Callable[[Any], Source]]] = {
    "folder": Folder,
    "manifest": Manifest,
    "webdataset": Webdataset,
    "pairs": Pairs,
    "edits": Edits,
    "synthetic_text": SyntheticText,
    "prompts": Prompts,
}
SAMPLE_KINDS: Final[dict[str, Kind]] = {"pairs": PREFERENCE, "edits": EDIT, "prompts": PROMPT}
"""What a source gives, where it is not images with captions."""


def sample_kind(config: SourceConfig) -> Kind:
    """The kind of the source's rows; a data set holds rows of one kind."""
    return SAMPLE_KINDS.get(config.kind, IMAGE)


def open_source(config: SourceConfig) -> Source:
    """The configured source. Raises ValueError if its path is not set or of the wrong kind."""
    return SOURCES[config.kind](config)
