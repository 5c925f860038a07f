"""`eval` on two ranks: killed in the middle, it goes on with the pictures that are missing and ends with the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from small_run import Ended, run_gang
from written_checkpoint import write_checkpoint

from qwenimg_dist.commands.main import main
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.pipeline import fingerprint_component
from qwenimg_dist.models.tiny import tiny_pipeline_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WORDS = (
    "sample.prompts=[a red circle on white,a blue cross on black,a green square on grey]",
    "sample.seeds=[3,4]",
    "sample.num_steps=2",
    "sample.height=64",
    "sample.width=64",
    "reward.weights.shapes=1",
    "eval.losses=false",
    "eval.shown=2",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run of the tiny model, one step from the pipeline's own weights."""
    (tmp_path / "pipeline").symlink_to(tiny_pipeline_dir())
    fingerprint = fingerprint_component(tmp_path / "pipeline" / "transformer")
    lineage = {"stage": "sft", "model": "tiny", "path": str(tmp_path / "pipeline"), "fingerprint": fingerprint}
    write_checkpoint(tmp_path, "run", 1, lineage={**lineage, "parent": None}, scale=0.001)
    words = [f"run.path={tmp_path / 'run'}", "engine.precision=fp32"]
    words += [f"curriculum.phases.{name}.micro_batch_tokens=40" for name in ("low", "high")]  # one picture at once
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(load_config(words).model_dump(mode="json")))
    return tmp_path


def compare(root: Path, out: str, *extra: str, faults: Path | None = None) -> list[Ended]:
    env = {"QWENIMG_DIST_FAULT_DIR": str(faults)} if faults else {}
    words = [f"run.path={root / 'run'}", f"eval.out={root / out}", *WORDS, *extra]
    return run_gang(["-m", "consumers", "eval", *words], 2, root / f"logs-{out}", env=env, timeout_s=500)


def test_killed_and_run_again_it_draws_only_what_is_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = root / "faults"
    faults.mkdir()
    (faults / "eval_pictures@2").touch()  # of the first model, two pictures a round
    ended = compare(root, "out", faults=faults)
    assert -signal.SIGKILL in [end.code for end in ended]
    before = {file.name: file.stat().st_mtime_ns for file in (root / "out" / "pictures" / "start").glob("*.png")}
    assert 2 <= len(before) <= 4
    assert not (root / "out" / "eval.json").exists()
    ended = compare(root, "out")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    after = {file.name: file.stat().st_mtime_ns for file in (root / "out" / "pictures" / "start").glob("*.png")}
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert not list((root / "out" / "pictures").rglob(".tmp*"))

    result = json.loads((root / "out" / "eval.json").read_text())
    assert result["model"]["step"] == 1
    assert result["start"]["kind"] == "export"
    assert result["rewards"]["total"]["num"] == 3
    assert result["verdict"]["answer"] == "no difference"  # noise against noise
    assert "what it came from" in result["verdict"]["line"]
    assert (root / "out" / "eval.html").read_text().count("data:image/png") >= 2

    # All is there: the command needs no ranks to say it again.
    words = [f"run.path={root / 'run'}", f"eval.out={root / 'out'}", *WORDS]
    assert main(["eval", *words]) == 0
    assert result["verdict"]["line"] in capsys.readouterr().out
    assert main(["eval", *words, "sample.num_steps=3"]) == 2
    assert "holds another comparison (it differs in pictures)" in capsys.readouterr().err


def test_one_rank_draws_the_same_pictures_as_two(root: Path) -> None:
    assert [end.code for end in compare(root, "two")] == [0, 0]
    words = [f"run.path={root / 'run'}", f"eval.out={root / 'one'}", *WORDS]
    alone = run_gang(["-m", "consumers", "eval", *words], 1, root / "logs-one", timeout_s=500)
    assert alone[0].code == 0, alone[0].output[-3000:]
    found = [json.loads((root / out / "eval.json").read_text())["rewards"]["total"] for out in ("one", "two")]
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], abs=1e-3)
