"""Which parameters train, in which groups, with which learning rate and weight decay: by regular expressions.

Place in the flow: `run_directory.preflight` checks the expressions before anything starts, `engine.py` builds AdamW's
groups with them, the run directory keeps the list. Expressions are searched (`re.search`) in parameter names such as
`transformer_blocks.17.img_mod.1.weight`. Rules, in this order:

1. Frozen is what an expression of `optim.freeze` finds, and, where `optim.train` is given, what none of its
   expressions finds. `freeze` is stronger than `train`.
2. Of `optim.groups`, the first in the order written whose pattern finds the name takes the parameter; what none takes
   is in the default group (learning rate x 1, `optim.weight_decay`).
3. Within each group only matrices decay (see `decays`).

A frozen parameter has no gradient, no fp32 master, no moments and no EMA: it stays in `engine.precision`, and stands in
checkpoints and exports as the start's weights (of fp32 weights under bf16: rounded, as the forward pass sees them).
Refuses an expression that finds nothing (naming what is near), a group all of whose parameters are frozen or taken, and
to freeze everything. Imports no DeepSpeed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from qwenimg_dist.config import OptimConfig

FROZEN: Final = "frozen"
_DECAY: Final = "decay"
_NO_DECAY: Final = "no_decay"


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that AdamW treats alike, or those that it does not see."""

    name: str
    """`decay`, `no_decay`, `NAME/decay`, `NAME/no_decay` for a group of the config, or `frozen`."""
    lr_scale: float
    weight_decay: float
    names: tuple[str, ...]
    """In the model's order."""
    num_elements: int

    @property
    def frozen(self) -> bool:
        return self.name == FROZEN


def decays(name: str, shape: tuple[int, ...], num_layers: int) -> bool:
    """Matrices decay; norms and biases do not, nor does what gets no gradient.

    The last block's text output is unused, so its text MLP, output projection and queries have zero gradient; decay
    would let those weights fade without anything holding them.
    """
    last = f"transformer_blocks.{num_layers - 1}."
    unused = ("txt_mlp.", "attn.to_add_out.", "attn.add_q_proj.", "attn.norm_added_q.")
    if name.startswith(last) and name.removeprefix(last).startswith(unused):
        return False
    return len(shape) >= 2


def parameter_groups(
    shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig, num_layers: int
) -> tuple[ParameterGroup, ...]:
    """All parameters, each in one group: the default first, then the config's in order, then the frozen.

    Raises ValueError for an expression that does nothing.
    """
    frozen = _frozen(list(shapes), optim)
    taken = _taken([name for name in shapes if name not in frozen], list(shapes), optim)
    members: dict[str, list[str]] = {}
    for prefix in ("", *(f"{name}/" for name in optim.groups)):
        members |= {f"{prefix}{_DECAY}": [], f"{prefix}{_NO_DECAY}": []}
    for name, shape in shapes.items():
        if name not in frozen:
            prefix = f"{taken[name]}/" if name in taken else ""
            members[prefix + (_DECAY if decays(name, shape, num_layers) else _NO_DECAY)].append(name)
    members[FROZEN] = [name for name in shapes if name in frozen]

    made = []
    for label, names in members.items():
        given = optim.groups.get(label.rpartition("/")[0])
        decay = optim.weight_decay if given is None or given.weight_decay is None else given.weight_decay
        made.append(
            ParameterGroup(
                name=label,
                lr_scale=0.0 if label == FROZEN else given.lr_scale if given else 1.0,
                weight_decay=decay if label.rpartition("/")[2] == _DECAY else 0.0,
                names=tuple(names),
                num_elements=sum(torch.Size(shapes[name]).numel() for name in names),
            )
        )
    return tuple(group for group in made if group.names)


def describe(groups: Iterable[ParameterGroup]) -> list[str]:
    """One line per group, for a person."""
    groups = list(groups)
    trained = sum(group.num_elements for group in groups if not group.frozen)
    total = sum(group.num_elements for group in groups)
    lines = [f"trains {trained:,} of {total:,} parameters"]
    for group in groups:
        how = "" if group.frozen else f", lr x {group.lr_scale:g}, weight decay {group.weight_decay:g}"
        lines.append(f"  {group.name}: {group.num_elements:,} in {len(group.names)} tensors{how}")
    return lines


def to_json(groups: Iterable[ParameterGroup]) -> list[dict[str, Any]]:
    """What `parameter_groups.json` of a run directory holds."""
    return [
        {
            "name": group.name,
            "lr_scale": group.lr_scale,
            "weight_decay": group.weight_decay,
            "elements": group.num_elements,
            "tensors": list(group.names),
        }
        for group in groups
    ]


def _frozen(names: list[str], optim: OptimConfig) -> frozenset[str]:
    train = _found("optim.train", optim.train, names)
    frozen = _found("optim.freeze", optim.freeze, names)
    if optim.train:
        frozen |= set(names) - train
    if len(frozen) == len(names):
        raise ValueError("optim.train and optim.freeze leave no parameter to train: narrow optim.freeze")
    return frozenset(frozen)


def _found(key: str, patterns: Iterable[str], names: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if re.search(pattern, name)}
        if not mine:
            raise ValueError(_nothing(key, pattern, names))
        found |= mine
    return found


def _taken(trained: list[str], names: list[str], optim: OptimConfig) -> dict[str, str]:
    """Parameter -> the group of the config that takes it."""
    taken: dict[str, str] = {}
    for label, group in optim.groups.items():
        if not any(re.search(group.pattern, name) for name in names):
            raise ValueError(_nothing(f"optim.groups.{label}.pattern", group.pattern, names))
        mine = [name for name in trained if re.search(group.pattern, name)]
        left = [name for name in mine if name not in taken]
        if not left:
            others = sorted({taken[name] for name in mine})
            why = f"is taken by the groups before it ({', '.join(others)})" if mine else "is frozen"
            raise ValueError(f"optim.groups.{label}: all that {group.pattern!r} finds {why}: leave the group out")
        taken |= dict.fromkeys(left, label)
    return taken


def _nothing(key: str, pattern: str, names: list[str]) -> str:
    """That a pattern finds nothing, and pieces of names that look like it."""
    plain = re.sub(r"\\(.)|[\^$()\[\]{}|?*+]", r"\1", pattern)
    pieces: dict[str, None] = {}
    for name in dict.fromkeys(re.sub(r"\.\d+\.", ".0.", name, count=1) for name in names):
        words = name.split(".")
        for start in range(len(words)):
            for stop in range(start + 1, len(words) + 1):
                pieces[".".join(words[start:stop])] = None
    near = difflib.get_close_matches(plain, pieces, n=5, cutoff=0.5)
    hint = f"near are {', '.join(near)}" if near else f"the model has names such as {names[0]} and {names[-1]}"
    return f"{key}: {pattern!r} finds no parameter (a regular expression, searched in the names): {hint}"
