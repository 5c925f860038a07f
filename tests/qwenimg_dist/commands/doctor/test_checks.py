"""Each check notices its fault, made for real where this process may: full and read-only disks, wrong package metadata,
a hub that is not there, an open dashboard, a low limit of files; and says what to do.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest

from qwenimg_dist.commands.doctor import clocks, cluster, disks, gpus, hub, ports, storage, versions, wandb
from qwenimg_dist.commands.doctor.findings import Finding
from qwenimg_dist.commands.doctor.nodes import Answers
from qwenimg_dist.compose import load_config


def states(findings: list[Finding]) -> list[str]:
    return [one.state for one in findings]


@contextlib.contextmanager
def tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A small file system, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def server(host: str, status: int) -> Iterator[int]:
    """An HTTP server that answers everything with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    made = ThreadingHTTPServer((host, 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made.server_address[1]
    finally:
        made.shutdown()
        made.server_close()


def test_versions_out_of_bounds_and_missing_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = versions.look()
    assert states(versions.judge("here", right)) == ["ok"]
    metadata = tmp_path / "deepspeed-0.19.7.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = versions.look()
    (found,) = versions.judge("node-3", wrong)
    assert (found.state, found.name) == ("failure", "deepspeed on node-3")
    assert "0.19.7 is not" in found.told
    assert "pip install 'deepspeed" in found.fix
    together = versions.judge_together({"a": right, "b": wrong})
    assert [(one.state, one.name) for one in together] == [("failure", "deepspeed on all nodes")]
    wrong["versions"]["torch"] = None
    assert "is not installed" in [one.told for one in versions.judge("a", wrong) if one.name.startswith("torch ")]


def test_full_memory_disks_are_failures(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "shm", 64 * 1024**2) as small:
        there = disks.look(str(small), str(tmp_path))
        shm, _ = disks.judge("a", there, on_gpu=False)
        assert shm.state == "failure"
        assert "--shm-size" in shm.fix
    with tmpfs(tmp_path / "spill", 8 * 1024**2) as full:
        (full / "file").write_bytes(bytes(8 * 1024**2 - 4096))
        _, spill = disks.judge("a", disks.look(disks.SHM, str(full)), on_gpu=False)
        assert spill.state == "failure"
        assert "100% used" in spill.told
    gone = disks.judge("a", disks.look(str(tmp_path / "no"), str(tmp_path / "no")), on_gpu=True)
    assert states(gone) == ["failure", "failure"]


def test_storage_that_others_do_not_see_or_that_does_not_rename_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_VISIBLE_S", 0.3)
    assert not storage.look(str(tmp_path / "later" / "run"), "n" * 32)
    made = storage.write(str(tmp_path / "later" / "run"), "n" * 32, 2)
    assert storage.look(str(tmp_path / "later" / "run"), "n" * 32)
    assert made["folder"] == str(tmp_path)  # the nearest that exists
    seen = storage.read(made["file"], "n" * 32)
    assert storage.judge_read("a", seen) == []
    assert states(storage.judge_read("a", storage.read(made["file"], "m" * 32))) == ["failure"]
    storage.remove(made["file"])
    assert list(tmp_path.iterdir()) == []
    (found,) = storage.judge_read("a", storage.read(made["file"], "n" * 32))
    assert found.state == "failure"
    assert "cannot be read" in found.told
    assert "mount the same file system" in found.fix
    (late,) = storage.judge_read("a", {"problem": "", "delay_s": 9.0})
    assert late.state == "warning"
    assert "lookupcache=positive" in late.fix
    with tmpfs(tmp_path / "ro", 1024**2) as folder:
        written = storage.write(str(folder), "n" * 32, 0)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            storage.write(str(folder), "k" * 32, 0)
        assert "rename failed" in storage.read(written["file"], "n" * 32)["problem"]


def test_every_node_asks_for_the_nonce_before_it_is_written() -> None:
    """Else no client could remember that it was not there, as it does while producers work."""
    asked: list[str] = []

    class Nodes:
        head = SimpleNamespace(name="head")

        def ask(self, function: Callable[..., Any], *given: Any, timeout_s: float) -> Answers:
            asked.append(f"all {function.__name__}")
            return Answers(values={}, faults={})

        def ask_one(self, node: Any, function: Callable[..., Any], *given: Any, timeout_s: float) -> Answers:
            asked.append(f"{node.name} {function.__name__}")
            return Answers(values={}, faults={node.name: "full"})

    context: Any = SimpleNamespace(nodes=Nodes(), timeout_s=1.0, config=load_config([]))
    assert states(storage._check_path(context, "run.path", "/shared")) == ["failure"]
    assert asked == ["all look", "head write"]


def test_room_is_held_against_the_checkpoints() -> None:
    one, kept = storage.needed_bytes(load_config(["model=qwen_image_2512"])) or (0, 0)
    assert one == pytest.approx(16 * 20_430_401_088, rel=0.05)
    made = {"free": one / 2, "mb_s": 1000.0}
    assert states(storage.judge_written("a", made, needed=(one, kept))) == ["failure", "ok"]
    made = {"free": (one + kept) / 2, "mb_s": 10.0}
    assert states(storage.judge_written("a", made, needed=(one, kept))) == ["warning", "warning"]
    assert states(storage.judge_written("a", {"free": 2 * kept, "mb_s": 900.0}, needed=(one, kept))) == ["ok", "ok"]


def test_a_dashboard_that_others_reach_without_a_token_is_a_failure() -> None:
    outside = [address for address in cluster.own_addresses() if not address.startswith(("127.", "::1"))]
    if not outside:
        pytest.skip("this machine has no address but loopback")
    with server("0.0.0.0", 200) as port:
        found = cluster.judge_dashboard("x", cluster.ask_as_a_stranger(f"127.0.0.1:{port}"), mode="")
        assert found.state == "failure"
        assert outside[0] in found.told
        assert "RAY_AUTH_MODE=token" in found.fix
    with server("0.0.0.0", 401) as port:
        assert cluster.judge_dashboard("x", cluster.ask_as_a_stranger(f"127.0.0.1:{port}"), mode="token").state == "ok"
    with server("127.0.0.1", 200) as port:
        assert cluster.judge_dashboard("x", cluster.ask_as_a_stranger(f"127.0.0.1:{port}"), mode="").state == "ok"
    assert cluster.judge_dashboard("x", cluster.ask_as_a_stranger(f"127.0.0.1:{port}"), mode="").state == "warning"


def test_nodes_that_cannot_reach_each_other_and_few_files_are_told() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        with ports.listener("127.0.0.1") as port:
            reached = ports.look("127.0.0.1", port)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [(one.state, one.name) for one in ports.judge("a", reached)] == [("failure", "open files on a")]
    closed = ports.judge("a", {**ports.look("127.0.0.1", port), "files": 1 << 20})
    assert states(closed) == ["failure"]
    assert "cannot reach 127.0.0.1" in closed[0].told


def test_a_model_is_a_whole_directory_a_pinned_snapshot_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "25468b98e3276ca6700de15c6628e51b7de54a26"
    model = load_config(["model=qwen_image_2512"]).model
    assert model.revision == commit

    def found(path: str = "Qwen/Qwen-Image-2512", revision: str | None = commit) -> list[Finding]:
        chosen = model.model_copy(update={"path": path, "revision": revision})
        return hub.judge("a", hub.look(path, revision), chosen)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in found()[0].told
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for status, state, words in (
        (200, "warning", "will be fetched"),
        (404, "failure", "has no Qwen/Qwen-Image-2512 at"),
        (403, "failure", "refuses"),
    ):
        with server("127.0.0.1", status) as port:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            (one,) = found()
            assert (one.state, words in one.told) == (state, True), one
    (one,) = found()  # the server is gone
    assert one.state == "failure"
    assert "does not answer" in one.told
    assert "model.path" in one.fix
    assert found(revision="main")[0].state == "failure"
    assert "is not there" in found(path="/no/such/model")[0].told

    folder = tmp_path / "model"
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    index = {"weight_map": {"x": "part-1.safetensors", "y": "part-2.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "transformer" / "part-1.safetensors").touch()
    (one,) = found(path=str(folder))
    assert one.state == "failure"
    assert "transformer/part-2.safetensors" in one.told
    (folder / "transformer" / "part-2.safetensors").touch()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").touch()
    (one,) = found(path=str(folder))
    assert "text_encoder/*.safetensors" in one.told  # its settings alone do not encode a text
    assert "vae" not in one.told
    (folder / "text_encoder" / "model.safetensors").touch()
    assert states(found(path=str(folder))) == ["ok"]


def test_wandb_needs_a_key_and_a_way_and_shows_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online, offline = load_config(["logger=online"]), load_config(["logger=offline"])
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with server("127.0.0.1", 200) as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert "there is no key" in wandb.judge("a", wandb.look(), online).told
        assert wandb.judge("a", wandb.look(), offline).state == "ok"
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:{port} login user password hidden-in-netrc\n")
        assert wandb.judge("a", wandb.look(), online).state == "ok"
        monkeypatch.setenv("WANDB_API_KEY", "hidden-in-environment")
        there = wandb.look()
        assert wandb.judge("a", there, online).state == "ok"
        assert "hidden" not in json.dumps([there, wandb.judge("a", there, online).json()])
    found = wandb.judge("a", wandb.look(), online)
    assert found.state == "failure"
    assert "cannot be reached" in found.told
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb.judge("a", wandb.look(), online).state == "warning"


def test_clocks_and_names() -> None:
    begin = time.time()
    there = clocks.look()
    end = time.time()
    assert states(clocks.judge({"a": there}, begin, end, 0.1)) == ["ok"]
    late, far = {**there, "now": begin - 5, "host": "b"}, {**there, "now": end + 100, "host": "c"}
    found = clocks.judge({"a": there, "b": late, "c": far}, begin, end, 1.0)
    of_clocks = {one.name: one.state for one in found if one.name.startswith("clock")}
    assert of_clocks == {"clock on b": "warning", "clock on c": "failure"}
    named = clocks.judge({"a": {**there, "address": "127.0.1.1"}, "b": {**there, "address": "10.0.0.2"}}, begin, end, 9)
    assert {one.name for one in named} == {"host name on a", "host names"}


def test_gpus_are_counted_and_compared() -> None:
    gib = 1024**3

    def node(
        count: int, name: str = "NVIDIA H100 80GB HBM3", *, apart: int = 0, used: float = 0.0
    ) -> dict[str, object]:
        total = int(79.1 * gib)
        cards = [{"name": name, "total": total, "free": int(total * (1 - used))} for _ in range(count)]
        return {"gpus": cards, "cuda": "12.8", "apart": [[0, n] for n in range(1, 1 + apart)]}

    wanted = load_config(["cluster=nodes_8x8", "cluster.ranks=16"]).cluster
    assert states(gpus.judge({"a": node(8), "b": node(8)}, wanted)) == ["ok", "ok"]
    assert states(gpus.judge({"a": node(8), "b": node(7)}, wanted)) == ["ok", "ok", "failure"]
    mixed = gpus.judge({"a": node(8), "b": node(8, "NVIDIA A100-SXM4-80GB", apart=2, used=0.5)}, wanted)
    assert [one.name for one in mixed if one.state == "warning"] == ["GPU memory on b", "peer access on b", "GPUs"]
    h200 = wanted.model_copy(update={"device_memory_gib": 139.8})
    assert "cluster.device_memory_gib=79.1" in gpus.judge({"a": node(16)}, h200)[1].fix
    assert states(gpus.judge({"a": {"gpus": [], "cuda": None, "apart": []}}, wanted)) == ["warning", "failure"]
