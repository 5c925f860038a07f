"""Every shipped choice composes, every key can be overridden plainly, every mistake gets a hint."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenimg_dist import compose
from qwenimg_dist.compose import ConfigError, compose_tree, conf_dir, groups, load_config
from qwenimg_dist.config import Config, Phase, flatten, stable_hash, training_identity

GROUPS = groups()


@pytest.mark.parametrize(("stage", "model"), list(itertools.product(GROUPS["stage"], GROUPS["model"])))
def test_every_stage_composes_with_every_model(stage: str, model: str) -> None:
    config = load_config([f"stage={stage}", f"model={model}"])
    assert config.stage == stage
    assert config.model.name == model
    assert config.resolutions


@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"stage", "model", "filters", "reward"}))
def test_every_choice_of_every_group_composes(group: str) -> None:
    for choice in GROUPS[group]:
        load_config([f"{group}={choice}"])


def test_every_key_of_the_models_stands_in_the_yaml_so_that_no_plus_is_needed() -> None:
    tree = flatten(compose_tree([]))
    dumped = flatten(load_config([]).model_dump(mode="json"))
    missing = {key for key in dumped if key != "curriculum.phases" and key not in tree}
    assert not missing, f"add to conf/: {sorted(missing)}"
    phase_keys = {key.rpartition(".")[2] for key in tree if key.startswith("curriculum.phases.low.")}
    assert set(Phase.model_fields) - {"name", "resolutions"} <= phase_keys


def test_the_config_is_frozen_and_round_trips() -> None:
    config = load_config(["optim.lr=3e-4", "train.log_samples=true"])
    assert config.optim.lr == 3e-4
    assert config.train.log_samples
    assert Config.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="frozen"):
        config.follow = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["+optim.lrr=1"], "did you mean 'optim.lr'"),
        (["lr=1"], "did you mean 'optim.lr'"),
        (["model=tinny"], "did you mean 'tiny'"),
        (["model=tinny"], "qwen_image_2512"),
        (["engine.precision=fp8"], "is not one of bf16, fp32"),
        (["engine.attention=cudnn"], "set engine.attention=native"),
        (["optim.lr=abc"], "optim.lr: Input should be a valid number"),
        (["train.steps=-1"], "greater than 0"),
        (["filters.resolution.min_sid=3"], "did you mean 'filters.resolution.min_side'"),
        (["foo"], "key=value"),
        (["curriculum.phases.low.setps=3"], "did you mean 'curriculum.phases.low.steps'"),
        (["data.weights=[{where: row, weight: 0.0001}]"], "from 0.001 to 1000 times per epoch"),
        (["data.weights=[{where: row}]"], "has entries such as"),
        (["data.caption_weights={raw: 0}"], "at least one kind"),
        (["objective.posterior=sample"], "set encode.posterior=mean_logvar and produce"),
        (["objective.sigma_mode_scale=1.8"], "less than or equal to 1.75"),
        (["curriculum.phases.low.steps=5"], "every phase a `share`, or every phase `steps`.*low has share and steps"),
        (["curriculum.phases.low.share=null", "curriculum.phases.low.images=5"], "low has images; high has share"),
        (["curriculum.phases.low.images=-5"], "greater than 0"),
        (["curriculum.phases.low.share=null"], "low has none; high has share"),
        (["curriculum.phases.high.lr=1e-4"], r"phases\.high: give a phase .* set `lr_scale` to 1 \(it is 0\.75\)"),
        (["curriculum.phases.mid.steps=5"], "did you mean 'curriculum.phases.(low|high).steps'"),
        (["curriculum.phases.low.warmup_steps=5"], "warmed up by `optim.warmup_steps`"),
        (["curriculum.phases.low.weights=[{where: row, weight: 2000}]"], "from 0.001 to 1000 times per epoch"),
        (["+curriculum.phases.low.precision=fp32"], "precision: unknown key"),
        (["train.steps=null"], "the phases have shares of it: set train.steps"),
        (["data.mix={a: {path: x}, b: {path: y}}"], "every data set a `weight` .*, or every one `repeats`"),
        (["data.mix={a: {path: x, weight: 1}, b: {path: y, repeats: 1}}"], "every data set a `weight`"),
        (["data.mix={a: {path: x, weight: 0}, b: {path: y, weight: 0}}"], "a weight above 0"),
        (["data.mix={a: {path: x, weigth: 1}}"], "data.mix.a.weigth: unknown key: did you mean 'data.mix.a.weight'"),
        (["data.weights={'row < 5': 2, 'row > 7': 0.0001}"], "data.weights.row > 7: a sampling weight is 0"),
        (["curriculum.phases.high.resolutions={64: 2}"], r"adds a key with \+ and takes one away with ~"),
        (["train.steps=(7"], r"train.steps: .*got '\(7'"),
        (["data.weights={'row < 5': 2"], "no viable alternative"),
        (["data.mix={a.b: {path: x, weight: 1}}"], "letters, digits, - and _ only"),
        (["curriculum.phases.low.mix={a: 1}"], "phase low has a `mix` with a, data.mix has nothing"),
        (
            ["data.mix={a: {path: x, weight: 1}, b: {path: y, weight: 0}}", "curriculum.phases.low.mix={a: 0}"],
            "every data set has 0",
        ),
    ],
)
def test_mistakes_are_named(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + expected):
        load_config(overrides)


@pytest.mark.parametrize(
    "expression",
    [
        "width > 512",
        "top(0.5, aesthetic, category)",
        "category == 'text' and not aspect < 2",
        'category == "text" or width<3',
        'category == "back\\slash\\\\" and width > 1',
    ],
)
def test_an_expression_needs_no_quotes_of_hydras_own(expression: str) -> None:
    config = load_config(
        [
            f"data.where={expression}",
            f"data.mix={{a: {{path: /d-1, weight: 2, where: '{expression.replace(chr(39), chr(39) * 2)}'}}}}",
        ]
    )
    assert config.data.where == expression
    assert config.data.mix["a"].where == expression
    assert config.data.mix["a"].path == "/d-1"


def test_keys_of_a_command_line_may_be_expressions() -> None:
    weights = {"category == 'text'": 3.0, "width<5": 0.5}
    config = load_config(
        ["data.weights={\"category == 'text'\": 3, width<5: 0.5}", '+curriculum.phases.high.resolutions={"64": 2}']
    )
    assert config.data.weights == weights
    assert config.curriculum.phases[1].resolutions[64] == 2


@pytest.mark.parametrize(
    "value", ["${oc.env:A_SECRET}", "s3://${oc.env:A_SECRET,b}/x", "${oc.decode:${oc.env:A_SECRET}}"]
)
def test_what_is_in_the_environment_gets_into_no_config(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hf_1234")
    with pytest.raises(ConfigError, match=r"logger\.project: \$\{oc\.env:\.\.\.\} is refused") as refused:
        load_config([f"logger.project={value}"])
    assert "hf_1234" not in str(refused.value)


def test_identity_holds_what_moves_the_numbers_and_nothing_else() -> None:
    base = training_identity(load_config([]))
    assert training_identity(load_config(["cluster.ranks=7", "checkpoint.every=3", "logger=offline"])) == base
    for change in [
        "optim.lr=1e-3",
        "train.seed=1",
        "train.steps=7",
        "objective.caption_dropout=0.2",
        "data.where=x",
        "data.weights=[{where: 'row < 5', weight: 2}]",
        "data.caption_weights={raw:1}",
        "curriculum.phases.low.weights=[{where: 'row < 5', weight: 2}]",
        "curriculum.phases.high.warmup_steps=3",
        "data.mix={a: {path: x, weight: 1}, b: {path: y, weight: 2}}",
    ]:
        assert training_identity(load_config([change])) != base, change
    two = "data.mix={a: {path: x, weight: 1}, b: {path: y, weight: 2}}"
    mixed = training_identity(load_config([two]))
    assert training_identity(load_config([two, "data.mix.a.path=elsewhere"])) == mixed
    assert training_identity(load_config([two, "data.mix.a.weight=3"])) != mixed
    assert training_identity(load_config([two, "curriculum.phases.low.mix={b: 0}"])) != mixed
    assert stable_hash(base) == stable_hash(dict(reversed(base.items())))


def test_every_filter_with_a_file_is_in_use_unless_a_list_is_given() -> None:
    assert sorted(compose_tree([])["filters"]) == GROUPS["filters"]
    few = compose_tree(["filters=[broken,aspect]", "filters.aspect.max_ratio=2", "filter_set=qwen_image_2512"])
    assert few["filters"] == {"broken": {"enabled": True, "max_frames": 1}, "aspect": {"enabled": True, "max_ratio": 2}}
    assert sorted(compose_tree(["~filters.broken"])["filters"]) == [f for f in GROUPS["filters"] if f != "broken"]
    assert load_config(["filters.clarity.enabled=true"]).filters["clarity"]["enabled"]  # stronger than the filter set


def test_the_checkout_wins_over_a_packaged_copy() -> None:
    assert (conf_dir() / "config.yaml").is_file()
    assert (conf_dir().parent / "pyproject.toml").is_file()


def test_phases_can_be_overridden_by_name_dropped_and_listed() -> None:
    overrides = ["curriculum.phases.low.resolutions.64=0.5", "+curriculum.phases.low.resolutions.128=0.5"]
    named = load_config([*overrides, "~curriculum.phases.high"]).curriculum.phases
    assert [(phase.name, phase.resolutions) for phase in named] == [("low", {64: 0.5, 128: 0.5})]
    listed = "+curriculum.phases=[{resolutions:{64:1},steps:5,global_batch:1,micro_batch_tokens:1}]"
    assert load_config(["~curriculum.phases", listed]).curriculum.phases[0].steps == 5


def test_data_sets_of_a_mix_are_added_changed_and_dropped_one_by_one() -> None:
    given = ["data.mix={photos: {path: /a, weight: 3}, text: {path: /b, weight: 1}}", "data.mix.photos.weight=2"]
    mix = load_config([*given, "+data.mix.art.path=/c", "+data.mix.art.weight=1", "~data.mix.text"]).data.mix
    assert {name: (one.path, one.weight) for name, one in mix.items()} == {"photos": ("/a", 2), "art": ("/c", 1)}


def test_without_a_checkout_the_packaged_copy_is_used(tmp_path: Path) -> None:
    package = tmp_path / "qwenimg_dist"
    package.mkdir()
    for name in ("__init__.py", "compose.py"):
        shutil.copy(Path(compose.__file__).parent / name, package / name)
    shutil.copytree(Path(compose.__file__).parent / "config", package / "config")
    shutil.copytree(conf_dir(), package / "conf")  # as the wheel lays it out
    program = "from qwenimg_dist.compose import conf_dir, load_config; load_config([]); print(conf_dir())"
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert Path(shown.stdout.strip()).resolve() == (package / "conf").resolve()


def test_a_path_for_short_goes_with_further_keys_of_its_section_in_any_order() -> None:
    for words in (["start_from=/runs/a", "start_from.weights=raw"], ["start_from.weights=raw", "start_from=/runs/a"]):
        config = load_config(words)
        assert (config.start_from.path, config.start_from.weights) == ("/runs/a", "raw")
    assert load_config(["eval.against=/runs/b", "eval.against.step=3"]).eval.against.step == 3
    assert load_config(["start_from={path: /runs/a, step: 4}"]).start_from.step == 4
    assert load_config(["start_from=null"]).start_from.path is None
