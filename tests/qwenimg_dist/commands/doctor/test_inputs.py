"""What a run reads is looked for on every node: the keys, the look, and what it means that nodes differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_checkpoint import write_bare_checkpoint

from qwenimg_dist.commands.doctor.inputs import judge, local_inputs, look
from qwenimg_dist.compose import load_config


def of(*overrides: str) -> dict[str, str]:
    return local_inputs(load_config(list(overrides)))


def test_every_local_path_that_is_read_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert of() == {}
    assert of(
        "source.path=pictures",
        "start_from=/runs/a",
        "evaluate.data_path=/data",
        "data.takedown=/list.txt",
        "train.replay_generations=/runs/b/generations.jsonl",
    ) == {
        "source.path": str(tmp_path / "pictures"),
        "start_from": "/runs/a",
        "evaluate.data_path": "/data",
        "data.takedown": "/list.txt",
        "train.replay_generations": "/runs/b/generations.jsonl",
    }
    assert of("source=manifest", "source.path=/list.parquet", "source.root=/pictures") == {
        "source.path": "/list.parquet",
        "source.root": "/pictures",
    }
    # Buckets are asked otherwise.
    assert of("source=manifest", "source.path=s3://b/list.parquet", "evaluate.data_path=s3://b/data") == {}
    assert of("source=synthetic_text", "source.chinese_fonts=[/fonts/a.ttc#2]", "source.backgrounds=/walls") == {
        "source.backgrounds": "/walls",
        "source.chinese_fonts": "/fonts/a.ttc",
    }


def test_a_run_with_a_checkpoint_of_its_own_needs_its_start_no_more(tmp_path: Path) -> None:
    given = ["start_from=/runs/a", f"run.path={tmp_path}"]
    assert of(*given) == {"start_from": "/runs/a"}
    write_bare_checkpoint(tmp_path, 4, {})
    assert of(*given) == {}
    assert of(*given, "train.fresh=true") == {"start_from": "/runs/a"}


def test_of_a_pattern_the_folder_is_looked_for_and_of_several_each(tmp_path: Path) -> None:
    assert of("source=webdataset", "source.path='/tars/{000..099}.tar'") == {"source.path": "/tars"}
    several = of("source=webdataset", "source.path=['/a/*/x.tar',/b,s3://c]")
    assert several == {"source.path[0]": "/a", "source.path[1]": "/b"}
    (tmp_path / "odd[1]").mkdir()
    assert of(f"source.path={tmp_path}/odd[1]") == {"source.path": f"{tmp_path}/odd[1]"}


def test_a_look_reads_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert [look(str(tmp_path / name)) for name in (".", "file", "empty")] == ["folder", "file", "empty folder"]
    with pytest.raises(FileNotFoundError):
        look(str(tmp_path / "none"))


def test_a_mount_point_without_its_mount_is_told() -> None:
    (fine,) = judge("source.path=/p", {"a": "folder", "b": "folder"})
    assert (fine.state, fine.told) == ("ok", "can be read on 2 nodes")
    (one,) = judge("source.path=/p", {"a": "folder", "b": "empty folder"})
    assert (one.state, one.name) == ("failure", "source.path=/p on b")
    (all_of_them,) = judge("source.path=/p", {"a": "empty folder", "b": "empty folder"})
    assert all_of_them.state == "warning"
    assert judge("source.path=/p", {}) == []
