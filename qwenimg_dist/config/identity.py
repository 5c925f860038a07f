"""What of the config makes a run the same run: held to on resume, hashed into records.

Place in the flow: `run_directory` compares it before a resume, facets and listings are named by `stable_hash`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from qwenimg_dist.config.tree import Config

# What changes a training run's numbers; the rest (where it runs, how often it logs or saves) may differ on resume.
# Model and data are held to by fingerprint and digest, so that a path may change.
_IDENTITY_SECTIONS = ("stage", "curriculum", "objective", "optim")
_FREE_OF_OBJECTIVE = (
    "reference_path",
    "winner_tolerance",
    "reward_timeout_s",
    "max_failed_rounds",
    "group_grid_every",
)
# Where a reward's model lies may change; the model itself is held to by its fingerprint (`consumers/judges.py`).
_FREE_OF_REWARDS = ("batch_size", "path", "revision")
_IDENTITY_KEYS = {
    "data": ("kind", "where", "held_out", "max_held_out", "weights", "caption_weights", "mix"),
    "engine": ("precision",),
    "start_from": ("weights",),
    "train": ("steps", "seed"),
}


def training_identity(config: Config) -> dict[str, Any]:
    """The part of `config` that a resumed run must share with the run it continues, flattened to dotted keys."""
    tree = config.model_dump(mode="json")
    picked: dict[str, Any] = {name: tree[name] for name in _IDENTITY_SECTIONS}
    picked["optim"] = {**tree["optim"], "order_of_groups": list(config.optim.groups)}  # the first that finds, takes
    for section, keys in _IDENTITY_KEYS.items():
        picked[section] = {key: tree[section][key] for key in keys}
    picked["objective"] = {key: value for key, value in tree["objective"].items() if key not in _FREE_OF_OBJECTIVE}
    for mixed in picked["data"]["mix"].values():
        del mixed["path"]
    phases = [
        {**phase, "resolutions": dict(sorted(phase["resolutions"].items()))} for phase in tree["curriculum"]["phases"]
    ]
    for phase in phases:
        # How a batch is cut or recomputed moves rounding only, and must be free to change when a phase does not fit
        # into memory.
        del phase["micro_batch_tokens"], phase["activation_checkpointing"], phase["name"]
    picked["curriculum"] = {str(index): phase for index, phase in enumerate(phases)}
    if tree["objective"]["kind"] == "grpo":
        picked["reward"] = _rewards(config)
    return flatten(picked)


def _rewards(config: Config) -> dict[str, Any]:
    """Weights and settings of the rewards in use; the others may change."""
    active = config.reward.active
    settings = {
        name: {key: value for key, value in config.reward.settings.get(name, {}).items() if key not in _FREE_OF_REWARDS}
        for name in active
    }
    return {"weights": active, "settings": settings}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def stable_hash(value: Any, digits: int = 16) -> str:
    """sha256 of canonical JSON, shortened to `digits` hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
