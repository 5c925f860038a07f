"""Expressions choose what trains and how; one that does nothing is an error that helps."""

from __future__ import annotations

import pytest

from consumers.parameter_groups import FROZEN, ParameterGroup, decays, describe, parameter_groups, to_json
from qwenimg_dist.compose import ConfigError, load_config
from qwenimg_dist.config import training_identity

LAYERS = 3
SHAPES: dict[str, tuple[int, ...]] = {
    "img_in.weight": (8, 4),
    "img_in.bias": (8,),
    **{
        f"transformer_blocks.{block}.{name}": shape
        for block in range(LAYERS)
        for name, shape in {
            "img_mod.1.weight": (16, 8),
            "img_mod.1.bias": (16,),
            "attn.to_q.weight": (8, 8),
            "attn.norm_q.weight": (8,),
            "txt_mlp.net.2.weight": (8, 8),
        }.items()
    },
    "proj_out.weight": (4, 8),
}


def made(*settings: str) -> dict[str, ParameterGroup]:
    groups = parameter_groups(SHAPES, load_config(["optim.weight_decay=0.1", *settings]).optim, LAYERS)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(SHAPES), "every parameter is in exactly one group"
    return {group.name: group for group in groups}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("img_in.weight", (3072, 64), True),
        ("img_in.bias", (3072,), False),
        ("transformer_blocks.3.attn.norm_q.weight", (128,), False),
        ("transformer_blocks.3.txt_mlp.net.2.weight", (8, 8), True),
        ("transformer_blocks.59.txt_mlp.net.2.weight", (8, 8), False),
        ("transformer_blocks.59.attn.to_add_out.weight", (8, 8), False),
        ("transformer_blocks.59.attn.add_q_proj.weight", (8, 8), False),
        ("transformer_blocks.59.attn.add_k_proj.weight", (8, 8), True),
        ("transformer_blocks.59.txt_mod.1.weight", (8, 8), True),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, shape, 60) == expected


def test_without_expressions_there_are_two_groups() -> None:
    groups = made()
    assert list(groups) == ["decay", "no_decay"]
    assert (groups["decay"].weight_decay, groups["no_decay"].weight_decay) == (0.1, 0.0)
    assert groups["decay"].lr_scale == groups["no_decay"].lr_scale == 1.0
    assert "transformer_blocks.2.txt_mlp.net.2.weight" in groups["no_decay"].names


def test_the_first_group_that_finds_a_parameter_takes_it() -> None:
    first = "modulation:{pattern:'mod\\.1',lr_scale:0.5,weight_decay:0}"
    second = "block0:{pattern:'blocks\\.0\\.',lr_scale:2}"
    groups = made(f"optim.groups={{{first},{second}}}")
    assert list(groups) == [
        "decay", "no_decay", "modulation/decay", "modulation/no_decay", "block0/decay", "block0/no_decay",
    ]  # fmt: skip
    assert groups["modulation/decay"].names == tuple(f"transformer_blocks.{i}.img_mod.1.weight" for i in range(3))
    assert (groups["modulation/decay"].lr_scale, groups["modulation/decay"].weight_decay) == (0.5, 0.0)
    assert (groups["block0/decay"].lr_scale, groups["block0/decay"].weight_decay) == (2.0, 0.1)
    assert groups["block0/no_decay"].names == ("transformer_blocks.0.attn.norm_q.weight",)
    turned = made(f"optim.groups={{{second},{first}}}")
    assert "transformer_blocks.0.img_mod.1.weight" in turned["block0/decay"].names


def test_the_order_of_groups_is_part_of_a_run_and_where_states_lie_is_not() -> None:
    one, other = "a:{pattern:mod}", "b:{pattern:img}"
    identity = training_identity(load_config([f"optim.groups={{{one},{other}}}"]))
    assert training_identity(load_config([f"optim.groups={{{other},{one}}}"])) != identity
    elsewhere = ["engine.offload_optimizer=cpu", "engine.hpz_partition=2", "engine.zero={sub_group_size:9}"]
    assert training_identity(load_config([f"optim.groups={{{one},{other}}}", *elsewhere])) == identity


def test_freeze_is_stronger_than_train() -> None:
    groups = made("optim.train=['img_mod','attn']", "optim.freeze=['norm_q','blocks\\.0\\.']")
    trained = {name for group in groups.values() if not group.frozen for name in group.names}
    expected = {f"transformer_blocks.{i}.{n}" for i in (1, 2) for n in ("img_mod.1.weight", "img_mod.1.bias")}
    assert trained == expected | {f"transformer_blocks.{i}.attn.to_q.weight" for i in (1, 2)}
    assert groups[FROZEN].num_elements == sum(g.num_elements for g in made().values()) - 2 * (16 * 8 + 16 + 64)


def test_sizes_are_told() -> None:
    groups = made("optim.freeze=[img_in]", "optim.groups={out:{pattern:proj_out,lr_scale:3}}")
    lines = describe(groups.values())
    assert lines[0] == "trains 872 of 912 parameters"
    assert "  out/decay: 32 in 1 tensors, lr x 3, weight decay 0.1" in lines
    assert lines[-1] == "  frozen: 40 in 2 tensors"
    assert {entry["name"]: entry["elements"] for entry in to_json(groups.values())}["frozen"] == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.train=['img_mdo']"], r"optim.train: 'img_mdo' finds no parameter .* near are img_mod"),
        (["optim.freeze=['attn\\.toq\\.weight']"], r"optim.freeze: .* near are attn.to_q.weight"),
        (
            ["optim.groups={m:{pattern:zzzzzzzz}}"],
            r"optim.groups.m.pattern: .* has names such as img_in.weight and proj",
        ),
        (["optim.groups={m:{pattern:img_in}}", "optim.freeze=[img_in]"], "optim.groups.m: all .* is frozen"),
        (
            ["optim.groups={a:{pattern:img_},b:{pattern:img_mod}}"],
            r"optim.groups.b: all that 'img_mod' finds is taken by the groups before it \(a\)",
        ),
        (["optim.freeze=['.']"], "leave no parameter to train"),
    ],
)
def test_an_expression_that_does_nothing_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(*settings)


@pytest.mark.parametrize("key", ["optim.train=['(']", "optim.freeze=['[']", "optim.groups={m:{pattern:'*'}}"])
def test_no_regular_expression(key: str) -> None:
    with pytest.raises(ConfigError, match="is no regular expression"):
        load_config([key])
