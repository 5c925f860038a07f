"""What `produce` says before it begins."""

from __future__ import annotations

from qwenimg_dist.commands import produce
from qwenimg_dist.compose import load_config


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
