"""The chain of stages is told from one certificate, whole and in order, also where older ones left something out."""

from __future__ import annotations

from typing import Any

from qwenimg_dist.report.lineage import Ancestor, ancestors, lineage_table, lineage_tables

HUB = {"stage": "pretrain", "model": "qwen", "path": "HUB", "revision": "25468b98e3276ca6700d", "fingerprint": "f0"}
SFT = {"stage": "sft", "model": "qwen", "path": "HUB", "revision": None, "fingerprint": "f1"}
SFT["parent"] = {"run": "A/step-5", "step": 5, "weights": "ema", "data": "d0", "lineage": {**HUB, "parent": None}}
DPO = {"stage": "dpo", "model": "qwen", "path": "HUB", "revision": None, "fingerprint": "f2"}
DPO["parent"] = {"run": "B/step-7", "step": 7, "weights": "raw", "data": "d1", "lineage": SFT}


def certificate(lineage: dict[str, Any], data: str = "d2") -> dict[str, Any]:
    return {"lineage": lineage, "run": {"path": "C"}, "data": {"fingerprint": data}}


def test_every_stage_back_to_the_first_model() -> None:
    assert ancestors(DPO) == [
        Ancestor(path="B/step-7", fingerprint="f2", stage="sft", step=7, weights="raw", data="d1"),
        Ancestor(path="A/step-5", fingerprint="f1", stage="pretrain", step=5, weights="ema", data="d0"),
        Ancestor(path="HUB", fingerprint="f0", model="qwen at 25468b98e327"),
    ]
    assert ancestors(None) == []


def test_what_an_older_export_did_not_note_down_is_left_open() -> None:
    old = {"model": "tiny", "fingerprint": "f9", "parent": {"run": "X", "step": 3}}
    assert ancestors(old) == [Ancestor(path="X", fingerprint="f9", step=3)]
    assert lineage_table(certificate(old)).rows[1] == ("from", "-", "X", "step 3, ?", "f9", "-", "-")


def test_one_table_for_all_checkpoints_that_share_a_past() -> None:
    same = {step: certificate(DPO, data=f"d{step}") for step in (1, 2, 3)}
    (table,) = lineage_tables(same)
    assert [row[:2] for row in table.rows] == [
        ("this run", "dpo"),
        ("from", "sft"),
        ("from", "pretrain"),
        ("from", "-"),
    ]
    assert table.rows[0][-1] == "d3"
    moved = {**same, 1: certificate(SFT), 4: {}}
    assert [one.title for one in lineage_tables(moved)] == ["Lineage", "Lineage of step 1 and before"]
