"""Shows the config that the given overrides make, and what can be overridden.

qwenimg-dist config [key=value ...]      the resolved config as YAML
qwenimg-dist config groups               the groups and what each offers
qwenimg-dist config keys [part] [...]    every key with its value, as an override would set it (and only those that
                                         contain `part`); overrides change the values shown
"""

from __future__ import annotations

import json
from typing import Final

from omegaconf import OmegaConf

from qwenimg_dist.compose import compose_tree, groups, load_config
from qwenimg_dist.config import flatten

SUMMARY: Final = "the resolved config, the groups and what each offers"


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
    config = load_config(args)
    print(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))), end="")
    for name, choices in groups().items():
        print(f"# {name}= {' | '.join(choices)}")
    return 0
