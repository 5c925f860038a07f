"""What an objective computes per micro-batch and step: passes with a graph, without, and of a second model.

Place in the flow: memory, traffic and time are all multiples of these. One forward of the model each; with a graph
there is a backward besides. The figures are the objectives' own settings; `tests/consumers/planning` holds them to what
the objectives declare.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenimg_dist.config import Config, DpoConfig, GrpoConfig


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Of one micro-batch in one optimiser step."""

    trained: int = 1
    """Forwards with a backward."""
    drawn: int = 0
    """Forwards without a graph: of rollouts."""
    reference: int = 0
    """Forwards of a frozen second model."""
    updates: int = 1
    """Times that the weights change per step, each of which ends what hpZ holds of them."""

    @property
    def second_model(self) -> bool:
        return self.reference > 0


def passes_of(config: Config) -> Passes:
    """By the configured objective."""
    objective = config.objective
    if isinstance(objective, DpoConfig):
        return Passes(reference=int(objective.reference == "online"))
    if isinstance(objective, GrpoConfig):
        return Passes(
            trained=objective.window * objective.inner_updates,
            drawn=objective.num_steps,
            reference=objective.window if objective.kl_weight else 0,
            updates=objective.inner_updates,
        )
    return Passes()
