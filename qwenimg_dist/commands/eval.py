"""Is a model better than the one it came from? Both beside each other, on the ranks that are here.

    qwenimg-dist eval run.path=RUN sample.prompts_file=prompts.txt 'sample.seeds=[0,1,2]' reward.weights.ocr=1
    qwenimg-dist eval eval.path=EXPORT eval.against=RUN/checkpoints/step-00000500 data.path=DATA

The other model is what the run started from, by its lineage, or `eval.against`. Measured are held-out losses on the
same samples, noise and sigmas (by sigma quantile, class and bucket), and rewards over pictures of the same prompts and
seeds, with the mean difference and its 95 % interval. Settings are the run's; overrides say how to look (`sample`,
`reward`, `evaluate`, `data`, `cluster`). Result: `eval.html` (one file, with pictures side by side), `eval.json`, the
pictures. Each model is sharded over the ranks in turn, so what was trained can be judged. Ended, the same command goes
on. Without Ray: `torchrun ... -m consumers eval OVERRIDES`.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.commands.stopping import stop_signals
from qwenimg_dist.commands.train import Training, check_room
from qwenimg_dist.config import Config
from qwenimg_dist.config_of_run import config_for_eval

SUMMARY: Final = "a checkpoint or export against what it came from: losses, rewards, pictures side by side"


def run(args: list[str]) -> int:
    """Compare. Returns 0 when done, whatever the verdict is, or stopped; 1 when the ranks failed."""
    config = config_for_eval(args)
    from consumers.compare import conclude, finished
    from consumers.comparison import RESULT, pin, plan_comparison

    pinned = pin(config)  # bad input is named in seconds, before Ray
    comparison = plan_comparison(pinned)
    if finished(comparison):
        conclude(comparison)
    elif (code := _on_ranks(pinned)) is not None:
        return code
    _tell(json.loads((comparison.out / RESULT).read_text(encoding="utf-8")), comparison.out)
    return 0


def _on_ranks(config: Config) -> int | None:
    """None when complete, else the exit code."""
    from producers.ray_cluster import machines, ray_session

    stop = threading.Event()
    cluster = config.cluster
    with ray_session(cluster, cpus=cluster.ranks * cluster.cpus_per_rank + cluster.reward_cpus), stop_signals(stop):
        check_room(cluster, machines())
        with Training(config, Path(str(config.run.path)), work="comparison") as gang:
            gang.start(cluster.ranks)
            while gang.poll():
                if stop.is_set():
                    gang.stop("stopping: what is measured is kept")
    ended = gang.ended()
    return None if ended.outcome == "complete" else ended.tell()


def _tell(result: dict[str, Any], out: Path) -> None:
    for name, words in (("model", "judged"), ("start", "against")):
        print(f"{words}: {result[name]['told']}")
    if "left_out" in result["losses"]:
        print(f"no held-out losses: {result['losses']['left_out']}")
    for name, one in (result["rewards"] or {"components": {}})["components"].items():
        if one["num"]:
            print(f"{name}: {one['start']:.3f} -> {one['model']:.3f} over {one['pictures']} pairs of pictures")
    print(result["verdict"]["line"])
    print(f"page: {out / 'eval.html'}")
