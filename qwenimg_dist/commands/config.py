"""Shows the config that the given overrides make, and what can be overridden.

qwenimg-dist config [key=value ...]      the resolved config as YAML
qwenimg-dist config groups               the groups and what each offers
qwenimg-dist config keys [part] [...]    every key with its value, as an override would set it (and only those that
                                         contain `part`); overrides change the values shown
qwenimg-dist config explain [part]       what each key does, and what it costs or gains
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final, get_args, get_origin

from omegaconf import OmegaConf

from qwenimg_dist.compose import compose_tree, groups, load_config
from qwenimg_dist.config import Config, Section, flatten

SUMMARY: Final = "the resolved config, the groups and what each offers"
_WIDTH: Final = 120


def run(args: list[str]) -> int:
    """Print what was asked for. Raises ConfigError for overrides that do not compose."""
    verb = args[0] if args and "=" not in args[0] else ""
    if verb == "groups":
        for name, choices in groups().items():
            print(f"{name}: {', '.join(choices)}")
        return 0
    if verb == "keys":
        parts = [word for word in args[1:] if "=" not in word]
        overrides = [word for word in args[1:] if "=" in word]
        for key, value in sorted(flatten(compose_tree(overrides)).items()):
            if all(part in key for part in parts):
                print(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        return 0
    if verb == "explain":
        for key, words in explanations():
            if all(part in key for part in args[1:]):
                print(textwrap.fill(f"{key}: {words}", _WIDTH, subsequent_indent="    ", break_on_hyphens=False))
        return 0
    config = load_config(args)
    print(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))), end="")
    for name, choices in groups().items():
        print(f"# {name}= {' | '.join(choices)}")
    return 0


def explanations() -> Iterator[tuple[str, str]]:
    """(key, what stands under its field); `NAME` in a key is for names that the user gives."""
    yield from _of_section(Config, "")


def _of_section(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        if field.description:
            yield f"{prefix}{name}", " ".join(field.description.split())
        inner_sections = list(_sections_in(field.annotation))
        for inner, named in inner_sections:
            choice = inner.model_fields.get("kind") if len(inner_sections) > 1 else None
            which = f"({name}={get_args(choice.annotation)[0]}) " if choice is not None else ""
            for key, words in _of_section(inner, f"{prefix}{name}." + "NAME." * named):
                yield key, which + words


def _sections_in(annotation: Any, *, named: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """Sections in a field's type, and whether each stands under a name of its own there."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, named
    for part in get_args(annotation):
        yield from _sections_in(part, named=named or get_origin(annotation) in (dict, tuple))
