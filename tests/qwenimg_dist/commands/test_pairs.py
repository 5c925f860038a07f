"""`pairs`: what is chosen, what is remembered, what is refused; drawing and judging by the real tiny pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_scorers
from PIL import Image

from qwenimg_dist.commands.main import main
from qwenimg_dist.commands.painter import Painter
from qwenimg_dist.commands.pairs_actor import PromptTask, choose, make_pair
from qwenimg_dist.commands.pairs_book import PAIRS, TIES, Book, key_of, seeds_of
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.service import RewardService

NAN = math.nan


@pytest.mark.parametrize(
    ("total", "margin", "expected"),
    [
        ([0.1, 0.9, 0.5], 0.1, (1, 0)),
        ([0.9, 0.9, 0.1, 0.1], 0.1, (0, 2)),
        ([0.5, 0.55], 0.1, None),
        ([0.5, 0.625], 0.125, (1, 0)),
        ([0.5, 0.5], 0.0, None),
        ([0.5, 0.5001], 0.0, (1, 0)),
        ([NAN, 0.9, NAN, 0.1], 0.1, (1, 3)),
        ([NAN, 0.9], 0.0, None),
        ([NAN, NAN], 0.0, None),
        ([-3.0, -1.0], 1.0, (1, 0)),
    ],
)
def test_the_best_and_the_worst_that_could_be_judged(
    total: list[float], margin: float, expected: tuple[int, int] | None
) -> None:
    assert choose(np.array(total), margin) == expected


def test_seeds_belong_to_the_prompt() -> None:
    first, second = key_of(Prompt(text="a")), key_of(Prompt(text="a", metadata={"shape": "x"}))
    assert first != second
    assert seeds_of(first, 0, 4) == seeds_of(first, 0, 8)[:4]
    assert len({*seeds_of(first, 0, 8), *seeds_of(first, 1, 8), *seeds_of(second, 0, 8)}) == 24


def record(key: str, gap: float = 0.5) -> dict[str, object]:
    return {"prompt": "日本", "key": key, "gap": gap}


def test_a_book_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    with Book(tmp_path, {"margin": 0.1}) as book:
        book.write("kept", record("a", 0.25))
        book.write("tie", record("b"))
        with pytest.raises(ValueError, match="another `pairs` is working"):
            Book(tmp_path, {"margin": 0.1})
    for name in (PAIRS, TIES):
        with open(tmp_path / name, "ab") as sink:
            sink.write(json.dumps(record("c")).encode()[:-1])
    with Book(tmp_path, {"margin": 0.1}) as book:
        assert ["a" in book, "b" in book, "c" in book] == [True, True, False]
        book.write("kept", record("c", 0.75))
        assert book.gaps == [0.25, 0.75]
        assert [one["key"] for one in book.newest(1)] == ["c"]
    lines = (tmp_path / PAIRS).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "c"]
    with Book(tmp_path, {"margin": 0.1}) as book:
        assert (book.num_kept, book.num_ties) == (2, 1)


def test_a_book_of_other_settings_or_with_damage_is_refused(tmp_path: Path) -> None:
    with Book(tmp_path, {"margin": 0.1, "rewards": {"clip": {"weight": 1.0}}}) as book:
        book.write("kept", record("a"))
    with pytest.raises(ValueError, match=r"rewards\.clip\.weight was 1\.0, is 2\.0.*choose another pairs\.path"):
        Book(tmp_path, {"margin": 0.1, "rewards": {"clip": {"weight": 2.0}}})
    settings = {"margin": 0.1, "rewards": {"clip": {"weight": 1.0}}}
    (tmp_path / PAIRS).write_text('{"key": \n' + (tmp_path / PAIRS).read_text())
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 1 is damaged"):
        Book(tmp_path, settings)
    (tmp_path / PAIRS).write_text("")
    with Book(tmp_path, settings) as book:
        assert book.num_kept == 0


def test_a_pair_is_drawn_judged_and_written(tmp_path: Path) -> None:
    clip = tiny_scorers.save_clip(tmp_path / "clip", seed=3)
    config = load_config(
        [
            f"sample.path={tiny_pipeline_dir()}",
            "sample.height=64",
            "sample.width=80",
            "sample.num_steps=2",
            "pairs.num_seeds=4",
            "pairs.margin=0",
            "reward.weights.clip=2",
            f"reward.settings.clip.path={clip}",
        ]
    )
    painter = Painter.load(config)
    task = PromptTask(key="abcd", text="a red circle on a white background", metadata={"colour": "red"})
    out = tmp_path / "out"
    stray = out / "pictures" / "ab" / f".tmp-abcd-{seeds_of('abcd', 0, 4)[0]}.png-12345678"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    with RewardService(config.reward) as service:
        reply = make_pair(painter, service, config, out, task)
        pictures = painter.draw(task.text, seeds_of("abcd", 0, 4))
        scores = service.score(pictures, [Prompt(text=task.text)] * 4)
        every = config.model_copy(update={"pairs": config.pairs.model_copy(update={"margin": 10.0, "keep_all": True})})
        tie = make_pair(painter, service, every, tmp_path / "ties", task)
    assert reply.outcome == "kept"
    assert scores.total.max() > scores.total.min()
    best, worst = int(scores.total.argmax()), int(scores.total.argmin())
    made = reply.record
    assert made["seeds"] == {"chosen": seeds_of("abcd", 0, 4)[best], "rejected": seeds_of("abcd", 0, 4)[worst]}
    assert made["gap"] == pytest.approx(scores.total[best] - scores.total[worst])
    assert made["rewards"]["chosen"] == {"total": scores.total[best], "clip": scores.components["clip"][best]}
    assert made["metadata"] == {"colour": "red"}
    for name, index in (("chosen", best), ("rejected", worst)):
        with Image.open(out / made[name]) as picture:
            assert picture.size == (80, 64)
            assert np.array_equal(np.asarray(picture), np.asarray(pictures[index]))
    left = {file.name for file in (out / "pictures" / "ab").iterdir()}
    strays = {stray.name} if best and worst else set()  # the half picture of a killed worker is of the first seed
    assert left == {Path(made["chosen"]).name, Path(made["rejected"]).name} | strays
    assert tie.outcome == "tie"
    assert tie.record["gap"] == made["gap"]
    assert len(list((tmp_path / "ties" / "pictures" / "ab").iterdir())) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no reward has a weight"),
        (["reward.weights.ocr=1"], "prompt 2: reward ocr: 'no quote' quotes no text"),
        (["reward.weights.orc=1"], "did you mean 'reward.weights.ocr'"),
        (["reward.weights.clip=1", "reward.settings.clip.path=/nowhere"], "no such directory"),
        (["reward.weights.ocr=1", "reward.settings.ocr.text_key=words"], "prompt 1: reward ocr: its metadata has no"),
        (["reward.weights.ocr=1", "reward.settings.ocr.read_side=2"], "reward.settings.ocr.read_side: Input should be"),
        (["reward.weights.shapes=nan"], "the weight of shapes is nan"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a sign \\"OPEN\\""}\n{"prompt": "no quote"}\n')
    assert main(["pairs", f"pairs.path={tmp_path / 'out'}", f"sample.prompts_file={prompts}", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
