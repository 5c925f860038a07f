"""The weights that a stage starts from (`start_from`): an earlier run's, raw or averaged, or those of an export.

Place in the flow: `preflight` finds them, before anything is started; the session agrees on rank 0's choice, since a
run that still trains may have a newer checkpoint for the next rank that looks, and writes it into `start_from.json`;
the engine reads its partitions from them, range by range, whatever number of ranks wrote them. A run that goes on
keeps to what is recorded there: the fingerprint stands for the starting model, so that the path may change, and once
the run has a checkpoint of its own the source may go, for one rank as for all: what a rank's machine can see decides
nothing for it alone. Storage that is away is waited for, and is not a source that has gone. Architecture, text encoder
and VAE stay those of `model.path`. Refuses a source of another architecture, and one that is not what the run
started from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from consumers.checkpoint_files import MANIFEST, CheckpointError, Which, list_checkpoints, read_certificate
from consumers.checkpoint_files import checkpoints_dir as checkpoints_of
from consumers.checkpoint_reader import CheckpointReader, open_checkpoint
from qwenimg_dist.config import Config, StartFromConfig
from qwenimg_dist.files import write_json
from qwenimg_dist.models.pipeline import CERTIFICATE, ID_LENGTH, PROVENANCE, fingerprint_component
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
from qwenimg_dist.patience import patiently

if TYPE_CHECKING:
    from consumers.ranks import Ranks
    from consumers.zero_engine import WeightSource

START_FROM: Final = "start_from.json"
"""In a run directory: what it started from, if that was not `model.path`'s own transformer."""
_ANEW: Final = "choose another run.path, or start anew here with train.fresh=true"


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """What a stage starts from."""

    record: dict[str, Any]
    """JSON, as in `start_from.json`: path, kind, step, weights, fingerprint, parent (for the certificate)."""
    source: WeightSource | None
    """None where it is gone and the run goes on from a checkpoint of its own."""
    checkpoint: Path | None
    """Where the source is one: its directory, whose bytes the manifest vouches for."""
    fault: str = ""
    """Where the source is gone: what was found instead of it, and by which rank."""

    @property
    def fingerprint(self) -> str:
        return str(self.record["fingerprint"])

    @property
    def told(self) -> str:
        """For messages."""
        if self.record["kind"] == "export":
            return str(self.record["path"])
        return f"step {self.record['step']} of {self.record['path']} ({self.record['weights']} weights)"


class CheckpointWeights:
    """A checkpoint's masters or averages as a source of initial weights (`engine.WeightSource`), fp32."""

    def __init__(self, reader: CheckpointReader, which: Which) -> None:
        self._reader = reader
        self._which = which

    @property
    def names(self) -> list[str]:
        return self._reader.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read_flat_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""
        values = torch.empty(stop - start)
        self._reader.read_range_into(name, self._which, start, values)
        return values


def find_start(
    config: Config, run_dir: Path, pipeline: Path, *, recorded: dict[str, Any] | None
) -> StartWeights | None:
    """What `start_from` names, or what the run `recorded`; None for `model.path`'s own. Raises ValueError, and
    `StorageAwayError` where that cannot be told now."""
    given = config.start_from.path
    if given is None:
        if recorded is not None:
            raise ValueError(
                f"{run_dir} started from {recorded['path']} (step {recorded['step']}): give "
                f"start_from={recorded['path']} to go on, {_ANEW}"
            )
        return None
    step = config.start_from.step
    if recorded is not None and step not in (None, recorded["step"]):
        raise ValueError(
            f"{run_dir} started from step {recorded['step']} of {recorded['path']}, not from start_from.step={step}: "
            f"leave that out to go on, {_ANEW}"
        )
    has_own = any(info.fault is None for info in list_checkpoints(run_dir))
    if recorded is None and has_own and not config.train.fresh:
        raise ValueError(
            f"{run_dir} started from model.path, start_from={given} is new to it: leave it out to go on, {_ANEW}"
        )
    try:
        pinned = config.start_from
        if recorded is not None and recorded["kind"] == "checkpoint":
            pinned = pinned.model_copy(update={"step": recorded["step"]})
        found = open_weights(Path(given), pinned)
    except (ValueError, OSError) as error:
        if recorded is None or not has_own:
            raise ValueError(f"start_from={given}: {error}") from error
        return StartWeights(record=recorded, source=None, checkpoint=None, fault=str(error))
    assert found.source is not None
    check_architecture(found.source, pipeline, f"start_from={given}")
    if recorded is not None and found.fingerprint != recorded["fingerprint"]:
        raise ValueError(
            f"start_from={given} holds weights {found.fingerprint}, {run_dir} started from {recorded['fingerprint']} "
            f"({recorded['path']}, step {recorded['step']}): give that again, {_ANEW}"
        )
    return replace(found, record=recorded) if recorded is not None else found


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """What the run started from; None if from `model.path`, or if there is no run yet."""
    file = run_dir / START_FROM
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not {"path", "kind", "step", "weights", "fingerprint", "parent"} <= record.keys():
            raise ValueError("keys are missing")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it, or choose another run.path") from error
    return record


def agree(
    config: Config, run_dir: Path, pipeline: Path, start: StartWeights | None, ranks: Ranks
) -> StartWeights | None:
    """What rank 0 found, or what the run recorded, on every rank; recorded if new. Without a source on all of them if
    one finds it gone. Collective, under the run's lock."""
    if config.start_from.path is None:
        return start
    record = ranks.on_first(lambda: read_record(run_dir) or (start.record if start else None))
    agreed = ranks.together(lambda: find_start(config, run_dir, pipeline, recorded=record))
    assert agreed is not None
    # Filling the engine from a source has collectives of its own, and a reference without one is refused.
    if fault := ranks.first_problem(f"rank {ranks.rank}: {agreed.fault}" if agreed.fault else ""):
        agreed = replace(agreed, source=None, checkpoint=None, fault=fault)
    ranks.on_first(lambda: write_json(run_dir / START_FROM, record))
    return agreed


def parent_of_pipeline(pipeline: Path) -> dict[str, Any] | None:
    """Where an exported pipeline comes from, and where that came from; None for a model that is no export of ours."""
    file = pipeline / PROVENANCE
    if not file.is_file():
        return None
    try:
        parent: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        certificate = pipeline / CERTIFICATE
        if certificate.is_file():
            theirs = json.loads(certificate.read_text(encoding="utf-8"))
            parent |= {"data": theirs["data"]["fingerprint"], "lineage": theirs["lineage"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{pipeline} is an export whose {PROVENANCE} or certificate.json is damaged: {error}"
        ) from error
    return parent


def open_weights(path: Path, wanted: StartFromConfig, *, key: str = "start_from") -> StartWeights:
    """The weights of a run, of one of its checkpoints, or of a pipeline directory. Raises ValueError, and
    `StorageAwayError` where they cannot be seen now; `key` is what messages call the setting."""
    return patiently(lambda: _open_weights(path, wanted, key), str(path))


def _open_weights(path: Path, wanted: StartFromConfig, key: str) -> StartWeights:
    if (path / "model_index.json").is_file():
        if wanted.step is not None:
            raise ValueError(f"an exported pipeline has no steps: leave {key}.step out")
        fingerprint = fingerprint_component(path / "transformer")
        parent = parent_of_pipeline(path) or {"run": str(path), "step": None, "weights": None}
        record = {
            "path": str(path),
            "kind": "export",
            "step": parent.get("step"),
            "weights": parent.get("weights"),
            "fingerprint": fingerprint,
            "parent": parent,
        }
        return StartWeights(record=record, source=SafetensorsDirectory(path / "transformer"), checkpoint=None)
    if (path / MANIFEST).is_file():
        reader = CheckpointReader(path)
        if wanted.step not in (None, reader.step):
            raise ValueError(f"it is the checkpoint of step {reader.step}, not {wanted.step}")
    elif checkpoints_of(path).is_dir():
        reader = open_checkpoint(path, wanted.step)
    else:
        raise ValueError(
            "it is neither a run directory (with `checkpoints`), a checkpoint (`step-...`), nor an exported pipeline "
            "(with model_index.json)"
        )
    return _of_checkpoint(path, reader, wanted.weights, key)


def _of_checkpoint(path: Path, reader: CheckpointReader, weights: Literal["ema", "raw"], key: str) -> StartWeights:
    theirs = read_certificate(reader.path) or {}
    # The manifest holds the sha256 of every file, so its own stands for every byte.
    manifest = (reader.path / MANIFEST).read_bytes()
    fingerprint = hashlib.sha256(manifest + weights.encode()).hexdigest()[:ID_LENGTH]
    parent = {"run": str(reader.path), "step": reader.step, "weights": weights}
    if theirs:
        parent |= {"data": theirs["data"]["fingerprint"], "lineage": theirs["lineage"]}
    record = {
        "path": str(path),
        "kind": "checkpoint",
        "step": reader.step,
        "weights": weights,
        "fingerprint": fingerprint,
        "parent": parent,
    }
    if weights == "ema" and not reader.has_ema:
        raise CheckpointError(f"{reader.path} has no EMA: set {key}.weights=raw")
    source = CheckpointWeights(reader, "ema" if weights == "ema" else "master")
    return StartWeights(record=record, source=source, checkpoint=reader.path)


def check_architecture(source: WeightSource, pipeline: Path, given: str) -> None:
    """Raise ValueError naming the tensors unless the source has those of the pipeline's transformer."""
    stock = SafetensorsDirectory(pipeline / "transformer")
    problem = ""
    if set(source.names) != set(stock.names):
        problem = (
            f"it lacks {_some(set(stock.names) - set(source.names))}, has {_some(set(source.names) - set(stock.names))}"
        )
    else:
        others = [name for name in stock.names if tuple(source.shape(name)) != stock.shape(name)]
        if others:
            problem = f"{others[0]} is {tuple(source.shape(others[0]))}, there {stock.shape(others[0])}"
    if problem:
        raise ValueError(
            f"{given} is of another architecture than model.path={pipeline}: {problem}. Set model to the one that the "
            "earlier run trained"
        )


def _some(names: set[str]) -> str:
    first: Sequence[str] = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
