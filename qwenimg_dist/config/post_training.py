"""What stages after pretraining are configured by: the weights that they start from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveInt

from qwenimg_dist.config.section import Section


class StartFromConfig(Section):
    """The weights that a stage starts from, in the place of `model.path`'s own transformer."""

    path: str | None = None
    """A run directory, one of its checkpoints, or an exported pipeline; `start_from=PATH` is the same for short. Each
    rank reads its own ranges, whatever number of ranks wrote them: no export is needed between stages, and 4 bytes per
    parameter are read in all. `None` is `model.path`'s transformer."""
    step: PositiveInt | None = None
    """Checkpoint of the run; `None` takes its newest valid one when this run starts, and keeps to it."""
    weights: Literal["ema", "raw"] = "ema"
    """Which of a checkpoint's weights. The average is what was evaluated; raw ones go on where AdamW was. Of an export
    it says nothing: that has only one."""


def _path_alone(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) or given is None else given


StartFrom = Annotated[StartFromConfig, BeforeValidator(_path_alone)]
