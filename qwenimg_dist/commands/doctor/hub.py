"""Does every node get the model: a directory that is whole, or a hub id at a pinned revision, cached or reachable?

Nothing is downloaded. Of a cached snapshot every component must be there with its weights' files; of the hub it is
asked whether the revision exists and may be read, with the node's own token.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning
from qwenimg_dist.config import ModelConfig

_REQUEST_S: Final = 10.0
_COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")
_COMPONENTS: Final = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_WITH_WEIGHTS: Final = ("transformer", "vae", "text_encoder")


def check(context: Context) -> Sequence[Finding]:
    model = context.config.model
    if model.path is None:
        return [ok("model", f"model={model.name}: built on each node, nothing is fetched")]
    answers = context.nodes.ask(look, model.path, model.revision, timeout_s=context.timeout_s)
    found = answers.findings("model")
    for node, there in answers.values.items():
        found += judge(node, there, model)
    return found


def look(path: str, revision: str | None) -> dict[str, Any]:
    """On a node: what there is of the model."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return {"directory": str(folder), "missing": missing_files(folder)}
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        return {"directory": None, "nowhere": True}
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    cached = try_to_load_from_cache(path, "model_index.json", revision=revision)
    if isinstance(cached, str):
        snapshot = Path(cached).parent
        missing = missing_files(snapshot)
        if not missing:
            return {"directory": str(snapshot), "missing": []}
    offline = bool(constants.HF_HUB_OFFLINE)
    status = 0 if offline else _status(str(constants.ENDPOINT), path, revision or "main", get_token())
    return {
        "directory": None,
        "status": status,
        "offline": offline,
        "endpoint": str(constants.ENDPOINT),
        "token": bool(get_token()),
        "partly": isinstance(cached, str),
    }


def missing_files(folder: Path) -> list[str]:
    """Components, and weight files that an index names, which are not there."""
    missing = [name for name in ("model_index.json",) if not (folder / name).is_file()]
    for name in _COMPONENTS:
        if not (folder / name).is_dir():
            missing.append(f"{name}/")
            continue
        if name in _WITH_WEIGHTS and not any((folder / name).glob("*.safetensors*")):
            missing.append(f"{name}/*.safetensors")
        for index in (folder / name).glob("*.safetensors.index.json"):
            try:
                named = set(json.loads(index.read_text())["weight_map"].values())
            except (OSError, ValueError, KeyError):
                missing.append(f"{name}/{index.name} (damaged)")
                continue
            missing += sorted(f"{name}/{file}" for file in named if not (folder / name / file).is_file())
    return missing


def _status(endpoint: str, repo: str, revision: str, token: str | None) -> int:
    """HTTP status of the revision; 0 where the hub does not answer."""
    if not endpoint.startswith(("https://", "http://")):
        return 0
    request = urllib.request.Request(f"{endpoint}/api/models/{repo}/revision/{revision}")  # noqa: S310 - checked above
    if token:
        request.add_unredirected_header("authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_S) as answer:  # noqa: S310 - checked above
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def judge(node: str, there: Mapping[str, Any], model: ModelConfig) -> list[Finding]:
    """One node."""
    name, found = f"model on {node}", []
    if there.get("nowhere"):
        return [failure(name, f"{model.path} is not there", "mount or copy it there, or give a hub id")]
    if there["directory"] is not None:
        if there["missing"]:
            told = f"{there['directory']} lacks {', '.join(there['missing'][:6])}"
            return [failure(name, told, "copy it again, or download the snapshot anew")]
        return [ok(name, there["directory"])]
    if model.revision is None or not _COMMIT.match(model.revision):
        fix = "set model.revision to a commit of 40 digits: a branch changes what a run means"
        found.append(failure(name, f"model.revision={model.revision} is no pinned commit", fix))
    status, endpoint = there["status"], there.get("endpoint")
    local = "or download it where the network is and give the directory as model.path"
    partly = " (some files are cached)" if there.get("partly") else ""
    if there["offline"]:
        fix = f"unset HF_HUB_OFFLINE, {local}"
        found.append(failure(name, f"{model.path} is not cached{partly}, and HF_HUB_OFFLINE is set", fix))
    elif status == 0:
        fix = f"allow the connection (HTTPS_PROXY, HF_ENDPOINT), {local}"
        found.append(failure(name, f"{model.path} is not cached{partly}, and {endpoint} does not answer", fix))
    elif status in (401, 403):
        told = f"{endpoint} refuses {model.path} ({status}); {'a' if there['token'] else 'no'} token is there"
        found.append(failure(name, told, "accept the model's terms, and set HF_TOKEN for the nodes"))
    elif status == 404:
        told = f"{endpoint} has no {model.path} at {model.revision}"
        found.append(failure(name, told, "check model.path and model.revision"))
    elif status >= 400:
        found.append(warning(name, f"{endpoint} answered {status}", "try again later"))
    elif not found:
        told = f"{model.path} will be fetched from {endpoint} (58 GB for Qwen-Image-2512)"
        fix = "fetch it once into storage that all nodes share, by HF_HOME or as model.path"
        found.append(warning(name, told, fix))
    return found
