"""Whether a machine of the gang is about to be taken away, as Ray tells its training workers.

Place in the flow: rank 0 asks before every step (`train.py`); the gang then saves and ends, and the command starts it
anew on the machines that stay. A machine is announced by draining its Ray node: Ray's autoscaler does so before it
takes one away, the pods of `launch/kuberay` when they are told to end. Ray Train's own answer would be to train on up
to the deadline and to go back to the last checkpoint. Refuses nothing: where Ray tells nothing, its own answer holds.
"""

from __future__ import annotations

import importlib
from typing import Final

_CONTEXT: Final = "ray.train.v2._internal.execution.context"


def machine_leaves() -> bool:
    """In a worker of Ray Train: a machine of this gang is being drained. Heard some seconds after it began.

    The public `ray.train.get_preemption_info` is a barrier of all workers, which no step should wait for.
    """
    try:
        context = importlib.import_module(_CONTEXT).get_train_context()
        return context.preemption_context.preemption_info is not None
    except (ImportError, AttributeError, RuntimeError):
        return False
