"""What `produce` says before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from producer_world import make_plan_for

from producers import scan
from producers.load import ImageFault
from qwenimg_dist.commands import produce
from qwenimg_dist.compose import conf_dir, load_config


def told(*words: str) -> str:
    return "\n".join(produce._intent(load_config(words), words))


def test_it_says_which_model_and_asks_whether_the_toy_is_meant() -> None:
    lines = told("source.path=/pictures").splitlines()
    assert lines[0] == "model tiny (a toy, for demos), 64 and 128 px, 1 producer on cpu"
    assert lines[1].startswith("warning: no model=... was given")
    assert "model=qwen_image_2512" in lines[1]
    for meant in ("model=tiny", "model.path=/mine", "stage=demo"):
        assert "warning" not in told("source.path=/pictures", meant), meant
    real = told("model=qwen_image_2512", "cluster=node_8gpu")
    assert real == "model qwen_image_2512, 256 and 640 and 1328 px, 8 producers on cuda"


def test_every_source_that_may_have_remote_pictures_has_the_key_that_a_missing_one_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(root: str, uri: str) -> bytes:
        raise FileNotFoundError(uri)

    monkeypatch.setattr(scan, "read_bytes", gone)
    with pytest.raises(ImageFault, match=r"source\.retry_missing=true asks again"):
        scan.read_or_fault("s3://bucket/tars", "a.jpg")
    kinds = {file.stem for file in (conf_dir() / "source").glob("*.yaml")}
    local = {"folder", "prompts", "synthetic_text"}
    assert kinds > local
    for kind in kinds - local:
        for retry in (True, False):
            source = load_config([f"source={kind}", f"source.retry_missing={str(retry).lower()}"]).source
            assert produce._retries_missing(source) is retry, kind
    for kind in local:
        assert not produce._retries_missing(load_config([f"source={kind}"]).source)


def test_the_first_look_of_a_followed_source_leaves_a_line_half_written_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any beginning of a prompt is a prompt, and would stay listed."""
    monkeypatch.setattr(produce, "_plan", lambda config: (tmp_path, make_plan_for()))
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue squ")
    for follow, seen in (("true", ["a red circle"]), ("false", ["a red circle", "a blue squ"])):
        words = ["source=prompts", f"source.path={file}", f"data.path={tmp_path / 'data'}", f"follow={follow}"]
        found = produce.prepare(load_config(words), words).found
        assert [row.captions[0] for row in found.rows] == seen
