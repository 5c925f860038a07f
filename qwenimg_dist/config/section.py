"""The base of every part of the config tree."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of the tree: frozen, and no key that is not named here."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
