"""Hydra's compose API -> plain YAML -> the frozen `Config`; every error says what was meant and what there is.

Place in the flow: the first thing each command does. Refuses `_target_` keys, anything the models do not name, and
values taken from the environment: the resolved config is written into run directories and shown, a secret with it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from qwenimg_dist.config import Config, flatten

_FROM_ENVIRONMENT: Final = re.compile(r"\$\{[^}]*\boc\.env\b")
_PATHS_FOR_SHORT: Final = ("start_from", "eval.against")
"""Sections whose path alone may be given."""


class ConfigError(ValueError):
    """The overrides or files do not make a valid config; the message is meant for the user (exit code 2)."""


def conf_dir() -> Path:
    """The `conf` folder: the checkout's if there is one beside the package, else the packaged copy.

    An editable install leaves `conf` out of the package, and a stale copy may lie in site-packages; so the checkout
    wins.
    """
    package = Path(__file__).resolve().parent
    beside = package.parent / "conf"
    if (beside / "config.yaml").is_file() and (package.parent / "pyproject.toml").is_file():
        return beside
    packaged = package / "conf"
    if (packaged / "config.yaml").is_file():
        return packaged
    raise ConfigError(f"no config.yaml in {beside} or {packaged}: reinstall the package")


def groups() -> dict[str, list[str]]:
    """Config groups and what each offers."""
    root = conf_dir()
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Compose and validate. Raises `ConfigError` with a hint."""
    return validate(compose_tree(overrides))


def compose_tree(overrides: Sequence[str]) -> dict[str, Any]:
    """Hydra overrides -> resolved plain dict."""
    GlobalHydra.instance().clear()
    given = [_readable(_with_path(override)) for override in overrides]
    for group in ("filters", "reward"):
        if not any(override.partition("=")[0].lstrip("+~") == group for override in given):
            # A filter's or reward's file is all that it takes to have it: no list of them to forget.
            given.append(f"{group}=[{','.join(groups()[group])}]")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = compose(config_name="config", overrides=given)
        _refuse_environment(OmegaConf.to_container(composed))
        tree = OmegaConf.to_container(composed, resolve=True)
    except MissingConfigException as error:
        raise ConfigError(_missing_group(error)) from error
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_composition_hint(error, overrides)) from error
    if not isinstance(tree, dict):
        raise ConfigError("the composed config is not a mapping")
    return {str(key): value for key, value in tree.items()}


def _refuse_environment(node: Any, key: str = "") -> None:
    """Raise `ConfigError` where a value of the unresolved tree, from a file or an override, is the environment's."""
    if isinstance(node, dict):
        for name, value in node.items():
            _refuse_environment(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            _refuse_environment(value, key)
    elif isinstance(node, str) and _FROM_ENVIRONMENT.search(node):
        raise ConfigError(
            f"{key}: ${{oc.env:...}} is refused, since its value would be written into the run's config.yaml and be "
            "shown. No key holds a secret: clients of W&B, Hugging Face and S3 find theirs in the environment by "
            f"themselves. For a path, let the shell fill it in: {key}=$VARIABLE"
        )


def _with_path(override: str) -> str:
    """`start_from=RUN` beside `start_from.weights=raw`: Hydra would put the word in the place of the whole section."""
    key, equals, value = override.partition("=")
    named = equals and value.strip() and value.strip() != "null" and not value.lstrip().startswith("{")
    return f"{key}.path={value}" if named and key in _PATHS_FOR_SHORT else override


def _readable(override: str) -> str:
    """An override as Hydra's grammar reads it: without quotes around them it has no `<`, `>`, calls or odd keys.

    So `data.where=width > 512` and `data.weights={"text_level == 1": 2}` mean what they seem to; whatever Hydra reads
    by itself stays as it is.
    """
    try:
        OverridesParser.create().parse_override(override)
        return override
    except HydraException:
        key, _, value = override.partition("=")
    if not value.strip():
        return override
    try:
        return f"{key}={_in_hydras_words(yaml.safe_load(value) if value.lstrip()[0] in '[{' else value)}"
    except yaml.YAMLError:
        return override


def _in_hydras_words(value: Any) -> str:
    if isinstance(value, dict):
        if all(re.fullmatch(r"\w[\w.-]*", str(key)) for key in value):
            return "{" + ", ".join(f"{key}: {_in_hydras_words(one)}" for key, one in value.items()) + "}"
        # Keys that Hydra cannot quote are expressions, and weights by expression may be a list.
        return _in_hydras_words([{"where": key, "weight": one} for key, one in value.items()])
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_hydras_words, value)) + "]"
    if isinstance(value, str):
        # Within quotes a backslash is one by itself, but for those before a quotation mark or the end.
        return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value) + '"'
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def validate(tree: dict[str, Any]) -> Config:
    """Plain dict -> `Config`, with "did you mean" for unknown keys and choices."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(item, tree) for item in error.errors()]
        raise ConfigError("invalid config:\n  " + "\n  ".join(lines)) from error


def known_keys() -> list[str]:
    """Every dotted key of the tree, for completion and hints."""
    return sorted({*_model_keys(Config), *flatten(compose_tree([]))})


def _describe(item: Any, tree: dict[str, Any]) -> str:
    where = ".".join(_named(item["loc"], tree))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown key" + did_you_mean(where, [*_siblings(where), *known_keys()])
    elif item["type"] == "literal_error":
        choices = [c.strip(" '") for c in str(item["ctx"]["expected"]).replace(" or ", ",").split(",")]
        message = f"{item['input']!r} is not one of {', '.join(choices)}" + did_you_mean(str(item["input"]), choices)
    elif not isinstance(item["input"], dict):  # of a whole section the message itself says what is wrong
        message += f" (got {item['input']!r})"
    return f"{where}: {message}" if where else message


def _named(loc: Sequence[Any], tree: dict[str, Any]) -> list[str]:
    """Parts of a place in the tree; phases that have names by these, since the command line knows them so."""
    parts = [str(part) for part in loc]
    if parts[:2] == ["curriculum", "phases"] and len(parts) > 2 and isinstance(loc[2], int):
        phases = tree["curriculum"]["phases"]
        if isinstance(phases, dict):
            parts[2] = str([name for name, phase in phases.items() if phase is not None][loc[2]])
    return parts


def _siblings(where: str) -> list[str]:
    """Keys that may stand beside an unknown one below a name of the user's, as in `data.mix.NAME.weight`."""
    parts = where.split(".")
    within = ".".join(parts[:-2])
    leaves = [key.removeprefix(f"{within}.") for key in _model_keys(Config) if within and key.startswith(f"{within}.")]
    return [f"{'.'.join(parts[:-1])}.{leaf}" for leaf in leaves if "." not in leaf]


def _missing_group(error: MissingConfigException) -> str:
    offered = list(error.options or [])
    missing = str(error.missing_cfg_file or "")
    group, _, choice = missing.rpartition("/")
    hint = did_you_mean(choice, offered)
    return f"{group or 'config'}={choice} does not exist{hint}; there is: {', '.join(offered) or 'nothing'}"


def _composition_hint(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's own first line, and a hint for the first override whose key is unknown."""
    message = str(error).splitlines()[0]
    if not overrides:
        return message  # the shipped files themselves do not compose
    known = [*_model_keys(Config), *known_keys_of_groups(), *groups(), *flatten(compose_tree([]))]
    # Of a phase, `curriculum.phases.steps` is no key: its name belongs into it.
    meant = [key for key in known if not key.startswith("curriculum.phases.") or key.count(".") > 2]
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~").partition("@")[0]
        if "=" not in override and not override.startswith("~"):
            return f"override {override!r} is not of the form key=value"
        if not override.startswith("+") and not any(name == key or name.startswith(f"{key}.") for name in known):
            return f"unknown override {key!r}{did_you_mean(key, meant)}"
    cause = f": {error.__cause__}".splitlines()[0] if error.__cause__ else ""
    if "is not in struct" in cause:
        cause += (
            ". Hydra adds a key with + and takes one away with ~, as in `+curriculum.phases.high.resolutions.256=1 "
            "~curriculum.phases.high.resolutions.128`"
        )
    return message.removesuffix(".") + cause


def known_keys_of_groups() -> list[str]:
    """Keys of the filters' YAML files (the tree names filters only as a dict)."""
    keys: list[str] = []
    for file in (conf_dir() / "filters").glob("*.yaml"):
        tree = OmegaConf.to_container(OmegaConf.load(file))
        if isinstance(tree, dict):
            keys.extend(f"filters.{key}" for key in flatten({str(k): v for k, v in tree.items()}))
    return keys


def did_you_mean(wrong: str, known: Sequence[str]) -> str:
    """`: did you mean 'x'?` for the closest known word, or of the closest last part of a dotted key; else empty."""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if not close:
        leaf = wrong.rpartition(".")[2]
        leaves = {key.rpartition(".")[2]: key for key in known}
        close = [leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.7)]
    return f": did you mean {close[0]!r}?" if close else ""


def _model_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _model_keys(candidate, f"{prefix}{name}.")
