"""What producers are said to need: counted on the classes themselves, and refused where a GPU cannot hold it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from producers.planning import QWEN_IMAGE_2512, ProducersPlan, encoder_facts, producers_plan, table
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.pipeline import pipeline_dir
from qwenimg_dist.schema import Kind

FULL = ("model=qwen_image_2512",)
# Peak of one batch over what was there before it, in a process of its own: `VmHWM` is reset after the load.
PEAK = """
import json, sys
import torch
from pathlib import Path
torch.set_num_threads(1)
def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
job = json.loads(sys.argv[1])
if job["what"] == "vae":
    from diffusers import AutoencoderKLQwenImage
    from qwenimg_dist.models.vae import LatentCodec
    codec, images = LatentCodec(AutoencoderKLQwenImage()), torch.zeros(1, 3, job["side"], job["side"])
    work = lambda: codec.encode(images)
else:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
    config = Qwen2_5_VLConfig().text_config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 5412, 1
    config.num_attention_heads, config.num_key_value_heads, config.vocab_size = 8, 2, 1000
    config.layer_types = ["full_attention"]
    model = Qwen2_5_VLTextModel(config).eval().requires_grad_(False)
    ids = torch.zeros(job["side"], 64, dtype=torch.long)
    work = lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with torch.no_grad():
    work()
print(status("VmHWM") - before)
"""


def planned(
    *overrides: str, kind: Kind = "image", rows: int = 1_000_000, base: tuple[str, ...] = FULL
) -> ProducersPlan:
    config = load_config([*base, *overrides])
    return producers_plan(config, kind=kind, num_rows=rows, captions=1.0, text_tokens=150, pipeline=None)


def test_the_20b_models_encoders_on_a_gpu() -> None:
    plan = planned("cluster=nodes_8x8_both")
    assert plan.weights == 2 * (7_070_619_136 + 126_892_531)
    assert 18e9 < plan.gpu_bytes < 26e9
    assert plan.host < 3e9
    assert not plan.faults
    assert plan.hours is not None
    twice = planned("cluster=nodes_8x8_both", "cluster.producers=16")
    assert twice.hours == pytest.approx(plan.hours / 2)
    assert planned("cluster=nodes_8x8_both", rows=2_000_000).hours == pytest.approx(2 * plan.hours)
    faster = planned("cluster=nodes_8x8_both", "plan.encode_mfu=0.5", "plan.decoded_per_cpu_s=24")
    assert faster.hours == pytest.approx(plan.hours / 2)


def test_cpus_hold_the_encoders_themselves_and_are_far_slower() -> None:
    gpus, cpus = planned("cluster=nodes_8x8_both"), planned("cluster=nodes_8x8_cpu_producers")
    assert cpus.gpu_bytes == 0
    assert cpus.host > cpus.weights > 14e9
    assert cpus.images_per_s is not None
    assert gpus.images_per_s is not None
    assert cpus.images_per_s < gpus.images_per_s / 20
    assert "plan.cpu_gflops" in cpus.rate
    assert not cpus.faults


@pytest.mark.parametrize("less", ["cluster.device_memory_gib=20", "cluster.gpus_per_producer=0.25"])
def test_what_a_gpu_cannot_hold_is_named_with_the_way_out(less: str) -> None:
    (fault,) = planned("cluster=nodes_8x8_both", less).faults
    for words in ("a producer's encoders need 20.4 GiB", "encode.image_batch_pixels", "cluster.gpus_per_producer"):
        assert words in fault
    smaller = planned("cluster=nodes_8x8_both", less, "encode.image_batch_pixels=1", "encode.text_batch_tokens=1")
    assert smaller.gpu_bytes < planned("cluster=nodes_8x8_both").gpu_bytes
    # A single picture of the largest bucket stays.
    assert smaller.activations >= 2 * 900 * 1328 * 1328


def test_kinds_differ_in_what_is_encoded() -> None:
    image, pair, edit, prompt = (
        planned("cluster=nodes_8x8_both", kind=kind) for kind in ("image", "preference", "edit", "prompt")
    )
    assert pair.work.vae_flops == 2 * image.work.vae_flops
    assert pair.work.text_flops == image.work.text_flops
    assert edit.work.vae_flops > image.work.vae_flops
    assert edit.weights - image.weights == 2 * QWEN_IMAGE_2512.vision_parameters
    assert prompt.work.vae_flops == 0
    assert prompt.weights == 2 * QWEN_IMAGE_2512.text_parameters
    assert prompt.activations < image.activations


def test_loaders_decode_while_their_producer_encodes() -> None:
    alone = planned("cluster=nodes_8x8_both")
    few, many, more = (planned("cluster=nodes_8x8_both", f"cluster.loaders_per_producer={n}") for n in (1, 4, 8))
    assert few.images_per_s == pytest.approx(12)  # its one CPU decodes so many
    assert many.images_per_s is not None
    assert alone.images_per_s is not None
    assert many.images_per_s == more.images_per_s > 1.4 * alone.images_per_s  # the GPU's own rate
    assert more.host > many.host > alone.host
    assert "5.5 GB" in table(many, None).text()  # 8 x 4 x 160 MiB for pixels, and messages
    assert "8 with 8 CPUs and 1 GPUs" in table(many, None).text()


def test_the_table_tells_all_of_it() -> None:
    text = table(planned("cluster=nodes_8x8_both"), 601.0).text()
    for words in ("8 with 4 CPUs and 1 GPUs", "hours for 1,000,000 rows", "training draws at most", "object store"):
        assert words in text
    assert "134.2 MB" in text  # nothing but messages


def test_the_pipeline_that_is_here_is_counted(tmp_path: Path) -> None:
    tiny = pipeline_dir(load_config([]).model)
    facts = encoder_facts(tiny)
    assert facts.told == str(tiny)
    assert facts.vae_width == json.loads((tiny / "vae" / "config.json").read_text())["base_dim"]
    config = json.loads((tiny / "text_encoder" / "config.json").read_text())["text_config"]
    assert (facts.text_width, facts.text_mlp) == (config["hidden_size"], config["intermediate_size"])
    assert facts.text_embedding == config["hidden_size"] * config["vocab_size"]
    assert facts.text_embedding < facts.text_parameters < 3e6
    assert encoder_facts(tmp_path) == QWEN_IMAGE_2512  # without weights there
    assert encoder_facts(None) == QWEN_IMAGE_2512


@pytest.mark.slow
def test_the_known_encoders_are_what_the_classes_make_and_compute() -> None:
    import torch
    from diffusers import AutoencoderKLQwenImage
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLTextModel,
    )

    from qwenimg_dist.models.frame_vae import collapse_frames

    known = QWEN_IMAGE_2512
    config: Any = Qwen2_5_VLConfig()
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.vocab_size = known.text_width, known.text_mlp, 152064
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 28, 28, 4
    text.layer_types = ["full_attention"] * 28
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.out_hidden_size = 1280, 3420, 32, 3584
    with torch.device("meta"):
        tower: Any = Qwen2_5_VLTextModel(text)
        assert _num(tower) == known.text_parameters
        assert tower.embed_tokens.weight.numel() == known.text_embedding
        assert _num(Qwen2_5_VisionTransformerPretrainedModel(vision)) == known.vision_parameters
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae: Any = AutoencoderKLQwenImage()
        assert _num(vae) == known.vae_parameters
        collapse_frames(vae)
        for side in (256, 1024):
            before = counter.get_total_flops()
            vae.quant_conv(vae.encoder(torch.empty(1, 3, 1, side, side)))
            # Its attention is not counted on a CPU.
            assert (counter.get_total_flops() - before) / side**2 == 2_326_496


@pytest.mark.slow
@pytest.mark.parametrize(("what", "side"), [("vae", 192), ("text", 64)])
def test_the_activations_are_what_a_batch_takes(what: str, side: int) -> None:
    command = [sys.executable, "-c", PEAK, json.dumps({"what": what, "side": side})]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    facts = replace(QWEN_IMAGE_2512, text_width=1024, text_mlp=5412)
    mlp, own = 3, 12
    expected = 4 * (900 * side**2 if what == "vae" else side * 64 * (mlp * facts.text_mlp + own * facts.text_width))
    assert int(ended.stdout) == pytest.approx(expected, rel=0.25)


def _num(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
