"""The command on a real Ray: every check on every node, exit codes, what it leaves behind, and a rank that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwenimg_dist.commands import doctor
from qwenimg_dist.debug import FAULT_DIR_VARIABLE


def test_all_checks_run_and_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "file"
    broken.write_text("not a directory")
    given = [f"run.path={tmp_path / 'run'}", "data.path=/proc/nowhere", "doctor.speed_mb=4", "logger=offline"]
    given += ["start_from=/proc/parent", f"source.path={tmp_path}"]
    assert doctor.run([*given, f"model.path={tmp_path / 'model'}", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert list(dict.fromkeys(one["check"] for one in told["findings"])) == list(doctor.NAMES)
    failed = [one for one in told["findings"] if one["state"] == "failure"]
    assert {one["check"] for one in failed} == {"storage", "hub"}, failed
    assert all(one["fix"] for one in told["findings"] if one["state"] != "ok")
    assert "data.path=/proc/nowhere" in failed[0]["name"]
    assert "start_from=/proc/parent" in failed[1]["name"]  # what is only read is looked for as well
    assert "No such file" in failed[1]["told"]
    assert f"source.path={tmp_path}" in [one["name"] for one in told["findings"] if one["state"] == "ok"]
    (all_reduce,) = [one for one in told["findings"] if one["check"] == "gang"]
    assert all_reduce["state"] == "ok"
    assert "gloo" in all_reduce["told"]
    assert sorted(tmp_path.iterdir()) == [broken]


def test_only_known_checks_are_taken() -> None:
    with pytest.raises(ValueError, match=r"no check 'storge': did you mean 'storage'"):
        doctor.run(["storge"])


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "faults"
    tokens.mkdir()
    (tokens / "doctor_rank@next").write_text("stop")
    monkeypatch.setenv(FAULT_DIR_VARIABLE, str(tokens))
    from qwenimg_dist.compose import load_config

    (found,) = doctor.examine(load_config(["cluster.ranks=2", "doctor.timeout_s=30"]), ["gang"])
    stopped = Path(f"{tokens}.log").read_text().split()[-1]
    assert found.state == "failure"
    assert f"no answer within 30 s from rank {stopped} on" in found.told
    assert found.told.count("no answer") == 1
    other = 1 - int(stopped)
    assert f"; rank {other} on" in found.told


@pytest.mark.slow
def test_ranks_without_a_place_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["gang", "cluster", "cluster.ranks=2", "cluster.device=cuda", "doctor.timeout_s=5", "--json"]
    assert doctor.run(given) == 1
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert "the ranks did not start" in told["all-reduce on 2 ranks"]["told"]
    assert told["room for ranks"]["state"] == "failure"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_node_is_asked_and_a_silent_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    # All listen on loopback alone. Unset, a driver would use the token that a user may have, and the others not.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A driver would look for 127.0.0.1 under the machine's other address.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    local = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000}
    cluster = Cluster(
        initialize_head=True, shutdown_at_exit=False, head_node_args={**local, "include_dashboard": False}
    )
    second = cluster.add_node(**local)
    raylet = second.all_processes["raylet"][0].process.pid

    def told(*words: str) -> list[dict[str, str]]:
        given = [*words, f"cluster.address={cluster.address}", f"run.path={tmp_path / 'run'}", "cluster.ranks=2"]
        command = [sys.executable, "-m", "qwenimg_dist", "doctor", *given, "doctor.speed_mb=1", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        found: list[dict[str, str]] = json.loads(done.stdout)["findings"]
        return found

    try:
        found = told("storage", "clocks", "cluster", "doctor.timeout_s=90")
        text = "\n".join(one["told"] for one in found)
        assert [one for one in found if one["state"] == "failure"] == []
        assert "read and renamed on all 2 nodes" in text
        assert "2 alive: 127.0.0.1#" in text
        assert any(one["name"] == "host names" for one in found)  # both are this machine
        os.kill(raylet, signal.SIGSTOP)
        (silent,) = [one for one in told("disks", "doctor.timeout_s=15") if one["state"] == "failure"]
        assert "no answer within 15 s" in silent["told"]
        assert str(second.node_id)[:6] in silent["name"]
    finally:
        os.kill(raylet, signal.SIGCONT)
        cluster.remove_node(second, allow_graceful=False)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
