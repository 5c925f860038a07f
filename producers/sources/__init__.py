"""Sources of rows, one file each. To add one: a file, an entry here, a config section, a YAML, a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from producers.sources.base import Source
from producers.sources.folder import Folder
from producers.sources.manifest import Manifest
from producers.sources.webdataset import Webdataset
from qwenimg_dist.config import SourceConfig

SOURCES: Final[dict[str, Callable[[Any], Source]]] = {
    "folder": Folder,
    "manifest": Manifest,
    "webdataset": Webdataset,
}


def open_source(config: SourceConfig) -> Source:
    """The configured source. Raises ValueError if its path is not set or of the wrong kind."""
    return SOURCES[config.kind](config)
