"""DPO learns: pairs that a rule chose raise the rule's reward on other pictures, and cost the model little else.

The whole way as a user goes it: early checkpoint -> `pairs` -> `produce source=pairs` -> `train stage=dpo` on two ranks
-> `eval` of 144 prompts with 3 seeds against what it started from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from early_demo import PX, EarlyDemo, prompts_for_pairs, prompts_for_tests
from produce_command import produce
from small_run import lines, run_gang

from qwenimg_dist.commands.main import main

STEPS = 36
"""At 60 the reward has risen twice as far, and the held-out loss of the demo's pictures by 5.7 %."""
DRAWN = (f"sample.height={PX}", f"sample.width={PX}", "sample.num_steps=12", "reward.weights.shapes=1")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learns-dpo")


@pytest.fixture(scope="module")
def run_dir(early_demo: EarlyDemo, root: Path) -> Path:
    """DPO from the early checkpoint."""
    prompts = root / "prompts-pairs.txt"
    prompts.write_text("\n".join(prompts_for_pairs()) + "\n")
    made = [f"run.path={early_demo.run}", f"sample.prompts_file={prompts}", f"pairs.path={root / 'made'}"]
    assert main(["pairs", "model=tiny", *made, "pairs.num_seeds=6", "pairs.seed=1000", *DRAWN]) == 0
    words = early_demo.words("stage=dpo", f"data.path={root / 'pairs'}")
    done = produce(*words, f"source.path={root / 'made'}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    settings = [
        f"start_from={early_demo.run}",
        f"run.path={root / 'run'}",
        "curriculum.phases.low.global_batch=32",
        "optim.lr=1e-4",
        "optim.warmup_steps=5",
        "optim.ema_decay=0.9",
        "objective.beta=500",
        f"train.steps={STEPS}",
        f"checkpoint.every={STEPS}",
        "evaluate.every=18",
        "evaluate.guard=warn",
        "evaluate.weights=ema",
    ]
    ended = run_gang(["-m", "consumers", *words, *settings], 2, root / "logs-dpo", timeout_s=1800)
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return root / "run"


@pytest.fixture(scope="module")
def result(early_demo: EarlyDemo, root: Path, run_dir: Path) -> dict[str, Any]:
    """What `eval` found, by lineage, on the demo's own held-out pictures."""
    prompts = root / "prompts-tests.txt"
    prompts.write_text("\n".join(prompts_for_tests()) + "\n")
    images = [f"evaluate.data_path={early_demo.data}"]
    asked = [f"sample.prompts_file={prompts}", "sample.seeds=[0,1,2]", f"eval.out={root / 'eval'}", *DRAWN]
    command = ["-m", "consumers", "eval", f"run.path={run_dir}", *images, *asked]
    ended = run_gang(command, 2, root / "logs-eval", timeout_s=1800)
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    found: dict[str, Any] = json.loads((root / "eval" / "eval.json").read_text())
    return found


def test_the_reward_rises_and_the_held_out_loss_stays(early_demo: EarlyDemo, result: dict[str, Any]) -> None:
    total, losses = result["rewards"]["total"], result["losses"]
    print(result["verdict"]["line"])
    assert result["start"]["path"] == str(early_demo.run / "checkpoints" / "step-00000440")
    assert (total["num"], total["pictures"]) == (144, 432)
    assert total["start"] <= 0.6
    assert total["low"] > 0
    assert losses["change"] <= 0.05
    assert losses["num"] >= 40
    assert result["verdict"]["answer"] == "better"


def test_held_out_pairs_are_told_apart_too(run_dir: Path) -> None:
    last = [line for line in lines(run_dir / "metrics.jsonl") if "eval/pair_accuracy" in line][-1]
    print({name: value for name, value in last.items() if name.startswith("eval/pair")})
    assert float(last["eval/pair_accuracy"]) > 0.5  # type: ignore[arg-type]
