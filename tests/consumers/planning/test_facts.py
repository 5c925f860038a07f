"""What a plan knows of data: counted by the ledger that trains where data is there, assumed and said where not."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import overrides

from consumers.planning.facts import data_facts, model_facts
from consumers.planning.memory import peak_of
from consumers.run_plan import dry_run
from consumers.stream import cut_batch
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.buckets import buckets


def test_data_that_is_there_is_counted_as_the_dry_run_counts(small_input: Path, tmp_path: Path) -> None:
    config = load_config(overrides(small_input, "unused", f"run.path={tmp_path / 'run'}"))
    facts, told = data_facts(config, world_size=2), dry_run(config, world_size=2)
    assert not facts.assumed
    expected = {
        (plan.phase.index, stream.resolution): {bucket: count.batches for bucket, count in stream.tally.buckets.items()}
        for plan in told.phases
        for stream in plan.streams
    }
    assert {(one.phase.index, one.resolution): dict(one.steps) for one in facts.streams} == expected
    assert sum(one.images for one in facts.streams) == sum(plan.images for plan in told.phases)
    assert facts.num_images == 60
    assert 2 < facts.mean_text <= facts.longest_text
    assert not (tmp_path / "run").exists()


def test_no_micro_batch_of_the_run_has_more_tokens_than_its_phases_peak(small_input: Path, tmp_path: Path) -> None:
    from consumers.curriculum import plan
    from consumers.data_sets import ledger_config
    from consumers.run_directory import facets_of
    from qwenimg_dist.data.facets import Dataset
    from qwenimg_dist.data.generations import Generations

    config = load_config(overrides(small_input))
    model, facts = model_facts(config), data_facts(config, world_size=2)
    peaks = {
        (one.phase.index, one.resolution): peak_of(config, model, facts, one, world_size=2).tokens
        for one in facts.streams
    }
    dataset = Dataset.open(small_input / "data")
    found = facets_of(config, small_input / "pipeline")
    generations = Generations(tmp_path, dataset, found, ledger_config(config, plan(config)), follow=False)
    generations.advance(0)
    ledger, seen = generations.ledger, dict.fromkeys(peaks, 0)
    for step in range(config.train.steps):
        batch = ledger.batch(step)
        tokens = ledger.catalogs.text_tokens(batch.texts)
        budget = ledger.phases[batch.phase].micro_batch_tokens
        cut, _ = cut_batch(batch, tokens, budget, rank=0, world=2)
        most, at = 0, 0
        for size in cut.sizes:
            longest = int(tokens[cut.source[at : at + size]].max())
            most, at = max(most, size * (batch.bucket.image_tokens + longest)), at + size
        key = (batch.phase, batch.resolution)
        seen[key] = max(seen[key], most)
    assert all(0 < seen[key] <= peaks[key] for key in peaks), (seen, peaks)


def test_without_data_it_is_assumed_and_said() -> None:
    config = load_config(["model=qwen_image_2512", "plan.images=1234", "plan.text_tokens=99", "train.steps=100"])
    facts = data_facts(config, world_size=8)
    assert facts.assumed
    assert "1,234 rows" in facts.told
    assert "no data.path" in facts.told
    assert (facts.longest_text, facts.mean_text) == (512, 99)
    assert sum(sum(one.steps.values()) for one in facts.streams) == pytest.approx(100)
    high = [one for one in facts.streams if one.resolution == 1328]
    assert set(high[0].steps) == set(buckets(1328, config.encode.aspects))
    assert sum(high[0].steps.values()) == pytest.approx(14)  # 0.7 of 20


def test_an_edit_has_its_input_picture_in_the_sequence() -> None:
    facts = data_facts(load_config(["model=qwen_image_2512", "stage=edit"]), world_size=8)
    bucket = next(iter(facts.streams[0].steps))
    assert facts.image_tokens(bucket) == bucket.image_tokens + 64 * 64


def test_data_of_a_model_that_is_not_here_is_assumed_too(tmp_path: Path) -> None:
    config = load_config(["model=qwen_image_2512", f"data.path={tmp_path}", "model.revision=0000000000"])
    assert "not on this machine" in data_facts(config, world_size=8).told


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.path=someone/else is not on this machine"):
        model_facts(load_config(["model.name=other", "model.path=someone/else", "model.revision=abc"]))
    with pytest.raises(ValueError, match=r"hpz_partition=3 does not divide the 8 ranks"):
        data_facts(load_config(["engine.hpz_partition=3"]), world_size=8)
