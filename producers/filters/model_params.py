"""What filters with a transformers model have in common: where it lies, and the check that it does."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from producers.filters.base import FilterParams
from qwenimg_dist.models.hub import find_model


class ModelParams(FilterParams):
    """A directory or a hub id at a pinned revision."""

    example: ClassVar[str] = ""
    """Said where `path` is not set."""
    path: str | None = Field(default=None, validate_default=True)
    revision: str | None = None

    @field_validator("path")
    @classmethod
    def _is_set(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None and info.data.get("enabled", True):
            raise ValueError(f"is not set: give a directory or a hub id with its revision, such as {cls.example}")
        return path

    @property
    def where(self) -> str:
        """The path; it is set wherever the filter is enabled."""
        assert self.path is not None
        return self.path


def check(params: ModelParams) -> None:
    """Raises ValueError saying what is missing."""
    find_model(params.where, params.revision)
