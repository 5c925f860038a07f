"""A certificate says what was compared and with what result; a wrong call on any rank stops all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consumers.certificate import data_facts
from consumers.checkpoint_files import CheckpointError, read_certificate
from consumers.start_from import parent_of_pipeline
from qwenimg_dist.models.template import TEMPLATE
from qwenimg_dist.versions import git_commit, package_versions

Results = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-6), ("bf16", 0.05)])
def test_two_ranks_call_the_transformer_as_stock_does(results: Results, precision: str, rounding: float) -> None:
    found = results("certificate")
    told = found[precision]["parity"]
    assert told["measured"]
    assert (told["at_step"], told["ranks"], told["precision"]) == (2, 2, precision)
    cases = {(one["kind"], one["case"]): one for one in told["comparisons"]}
    assert set(cases) == {(k, c) for k in ("contract", "independent") for c in ("unmasked", "masked", "trimmed")}
    assert all(one["within"] for one in cases.values())
    assert all(one["max_difference"] <= rounding for one in cases.values())
    assert cases["contract", "unmasked"]["max_difference"] == cases["contract", "masked"]["max_difference"] == 0.0
    assert told["max_difference"] == max(one["max_difference"] for one in cases.values()) > 0
    assert found[f"{precision}_untouched"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_call_on_one_rank_stops_all(results: Results, precision: str) -> None:
    message = results("certificate")[f"{precision}_wrong_rank"]
    for words in ("step 3", "not called as stock diffusers calls it", "contract, unmasked", "checkpoint.certify=off"):
        assert words in message


def test_a_run_on_edits_is_compared_with_condition_pictures_too(results: Results) -> None:
    found = results("certificate")
    told = found["edit"]["parity"]["comparisons"]
    assert all(one["within"] for one in told)
    cases = {(one["kind"], one["case"]): one["compared"] for one in told}
    for kind in ("contract", "independent"):
        assert "against QwenImageEditPlusPipeline" in cases[kind, "edit"]
        assert "against QwenImageEditPlusPipeline" in cases[kind, "edit_trimmed"]
        assert "against QwenImagePipeline" in cases[kind, "masked"]
    assert found["without_conditions"] is None
    assert "contract, edit: " in found["edit_without_conditions"]
    assert "contract, masked" not in found["edit_without_conditions"]


def test_a_wrong_engine_is_seen_by_the_independent_module_alone(results: Results) -> None:
    found = results("certificate")
    assert "independent, unmasked" in found["stale"]
    assert "contract" not in found["stale"]
    # What rounding may explain warns in bf16, unless asked to be strict; a wrong call stops the run in any case.
    assert "independent, unmasked" in found["stale_warned"]
    assert "checkpoint.certify_strict=true" in found["stale_warned"]
    assert found["stale_within"] == [True] * 3 + [False] * 3
    assert "contract, unmasked" in found["wrong_call_lenient"]
    assert found["stale_contract_only"] is None  # which is why the certificate says what was left out


def test_what_stands_in_it(results: Results, small_input: Path) -> None:
    told = results("certificate")["fp32"]
    assert (told["step"], told["images"]) == (2, 16)
    assert told["conditioning"]["template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert {"tokenizer", "text_encoder", "vae"} <= told["conditioning"].keys()
    assert told["sigma"]["shift"] == "resolution"
    assert set(told["sigma"]["shift_of_square_bucket"]) == {"64", "128"}
    assert told["data"] == {"fingerprint": "ab" * 8, "generations": 1, "rows": 7, "facets": {"text": "text-0"}}
    assert told["lineage"]["fingerprint"] == "0123456789ab"
    assert told["lineage"]["path"] == str(small_input / "pipeline")
    assert told["lineage"]["parent"] is None
    assert {"torch", "diffusers", "transformers", "deepspeed", "qwenimg-dist"} <= told["versions"].keys()
    assert told["versions"] == package_versions()
    assert told["git_commit"] == git_commit()


def test_shift_of_real_classes() -> None:
    from consumers.certificate import _sigma_facts
    from qwenimg_dist.compose import load_config
    from qwenimg_dist.models.tiny import tiny_pipeline_dir

    shifts = _sigma_facts(load_config(["model=qwen_image_2512"]), tiny_pipeline_dir())["shift_of_square_bucket"]
    assert {px: round(value, 3) for px, value in shifts.items()} == {"256": 1.649, "640": 1.764, "1328": 2.303}


def test_an_export_names_its_own_origin(tmp_path: Path) -> None:
    assert parent_of_pipeline(tmp_path) is None
    (tmp_path / "qwenimg_dist.json").write_text(json.dumps({"run": "old", "step": 500}))
    assert parent_of_pipeline(tmp_path) == {"run": "old", "step": 500}
    theirs = {"data": {"fingerprint": "abc"}, "lineage": {"model": "tiny", "parent": None}}
    (tmp_path / "certificate.json").write_text(json.dumps(theirs))
    assert parent_of_pipeline(tmp_path) == {"run": "old", "step": 500, "data": "abc", "lineage": theirs["lineage"]}
    (tmp_path / "certificate.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        parent_of_pipeline(tmp_path)


def test_data_of_several_generations_has_one_fingerprint_that_grows(tmp_path: Path) -> None:
    line = {"phase": 0, "first_step": 0, "epoch": 0, "first_unit": 0, "units": 1, "last": True, "rows_parts": {}}
    line |= {"facets": {}, "index": "0", "num_rows": 5, "num_texts": 5, "held_out_below": 0}
    seen = set()
    for count in (1, 2, 3):
        lines = [json.dumps({**line, "generation": i, "digest": f"{i:064x}"}) + "\n" for i in range(count)]
        (tmp_path / "generations.jsonl").write_text("".join(lines))
        facts = data_facts(tmp_path)
        seen.add(facts["fingerprint"])
        assert (facts["generations"], facts["rows"]) == (count, 5 * count)
    assert len(seen) == 3


def test_a_checkpoint_without_certificate_is_no_error_a_damaged_one_is(tmp_path: Path) -> None:
    assert read_certificate(tmp_path) is None
    (tmp_path / "certificate.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"certificate\.json"):
        read_certificate(tmp_path)
