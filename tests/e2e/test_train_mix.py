"""Training on two data sets as a user starts it: begun on one rank, gone on on two, equal to the unbroken run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fake_dataset import FakeProducer, make_rows
from small_run import lines, numbers, overrides, run_gang, write_input

from consumers.run_directory import facets_of
from qwenimg_dist.compose import load_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipeline`, `data` with 60 rows and `text` with 20, whose uris are those of the first 20."""
    folder = tmp_path_factory.mktemp("mix")
    write_input(folder)
    producer = FakeProducer(folder / "text", unit_size=16, resolutions=(64, 128))
    producer.facets = facets_of(load_config(overrides(folder)), folder / "pipeline")
    producer.add(make_rows(20, captions=2, sizes=((256, 256), (128, 256)), words=9))
    producer.produce(complete=True)
    return folder


def arguments(root: Path, run: str, *extra: str) -> list[str]:
    mix = f"data.mix={{photos: {{path: {root / 'data'}, weight: 1}}, text: {{path: {root / 'text'}, weight: 1}}}}"
    high = "curriculum.phases.high.mix={text: 3}"
    return ["-m", "consumers", *overrides(root, run, "engine.precision=fp32", "data.held_out=0.3", mix, high, *extra)]


@pytest.mark.slow
def test_a_mix_trains_the_same_in_pieces_and_counts_each_data_set(root: Path) -> None:
    whole = run_gang(arguments(root, "whole"), 1, root / "logs-whole")
    assert [end.code for end in whole] == [0], whole[0].output[-3000:]
    begun = run_gang(arguments(root, "pieces", "train.stop_after=5"), 1, root / "logs-begun")
    gone_on = run_gang(arguments(root, "pieces"), 2, root / "logs-gone-on")
    assert [end.code for end in [*begun, *gone_on]] == [0, 0, 0], gone_on[0].output[-3000:]

    assert lines(root / "whole" / "samples.jsonl") == lines(root / "pieces" / "samples.jsonl")
    for a, b in zip(numbers(root / "whole"), numbers(root / "pieces"), strict=True):
        both = a.keys() & b.keys()  # the piece evaluated at its end besides
        assert "train/loss" in both
        assert {key: a[key] for key in both} == pytest.approx({key: b[key] for key in both}, rel=1e-4, abs=1e-6)
    assert [line["dataset"] for line in lines(root / "whole" / "generations.jsonl")] == ["photos", "text"]
    last = lines(root / "whole" / "metrics.jsonl")[-1]
    assert last["eval/num_samples"] == 4
    assert {"eval/dataset/photos", "eval/dataset/text"} <= last.keys()

    steps = lines(root / "whole" / "samples.jsonl")
    low = Counter(key.partition("/")[0] for line in steps[:8] for key in line["keys"])  # type: ignore[attr-defined]
    assert low.keys() == {"photos", "text"}
    last = [line for line in lines(root / "whole" / "metrics.jsonl") if line["train/phase"] == 0][-1]
    assert 0 < last["train/dataset_epoch/photos"] < last["train/dataset_epoch/text"]  # type: ignore[operator]
    for line in lines(root / "whole" / "metrics.jsonl"):
        assert line["train/share/photos"] + line["train/share/text"] == pytest.approx(1)  # type: ignore[operator]


@pytest.mark.slow
def test_what_a_mix_cannot_be_is_said_before_anything_starts(root: Path) -> None:
    def refused(*extra: str) -> str:
        command = [sys.executable, *arguments(root, "refused", *extra)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert ended.returncode == 2, ended.stderr[-2000:]
        return ended.stderr

    assert "data.mix.text: " + str(root / "nowhere") in refused(f"data.mix.text.path={root / 'nowhere'}")
    assert not (root / "refused").exists()
