"""The base of every part of the config tree."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of the tree: frozen, and no key that is not named here. What stands under a field explains it
    to `qwenimg-dist config explain`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)
