"""What producers will need and how long encoding will take, before anything is started.

Place in the flow: the command `plan` shows it beside the ranks' plan. Arithmetic on the config and on how large the two
encoders are: their headers where the pipeline is on this machine, else Qwen-Image-2512's. Per picture, all classes:

    VAE            2.327 MFLOP x px x (width / 96)^2, and 4 n^2 c of its one attention over n = px / 64 places
    text encoder   2 x parameters without the embedding x (34 + tokens), per caption

Both were counted on the classes themselves. Rates are assumptions (`plan.encode_mfu`, `plan.cpu_gflops`,
`plan.decoded_per_cpu_s`) and said. Counts every row as kept. Deliberately left out: models of filters, reading the
source, and the disk's speed. Refuses nothing: `faults` says what cannot fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.config import Config
from qwenimg_dist.data.buckets import buckets
from qwenimg_dist.metrics import PEAK_FLOPS
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory, WeightsError
from qwenimg_dist.report.table import Table, show_bytes
from qwenimg_dist.schema import EDIT, PREFERENCE, PROMPT, Kind

GIB: Final = 1024.0**3
_DTYPE_BYTES: Final = {"bfloat16": 2, "float32": 4}
_ASSUMED_GPU: Final = "H100"

_VAE_FLOPS: Final = 2_326_496
"""Per px at width 96."""
_VAE_ATTENTION_WIDTH: Final = 4
"""Times the width."""
_VAE_VALUES: Final = 900
"""Values per px at width 96 that a batch holds at its peak: 581 are alive at once, measured were 850 to 950 with the
copies that oneDNN's convolutions make (fp32, 128 and 256 px)."""
_TEXT_VALUES: Final = (3, 12)
"""Values per token at the text encoder's peak, times its MLP's width and its own: measured were 25 to 29 per width
where the MLP is 5.3 times as wide (fp32 and bf16)."""
_TEMPLATE_TOKENS: Final = 34
_PROCESS_BYTES: Final = 1.5e9
"""A producer's Python with torch and transformers imported."""
_WAITING_BYTES: Final = 64 * 1024**2 * 3
"""Decoded pictures that wait for a filter's model (`unit.py`)."""
_OPEN_PICTURE_BYTES: Final = 30e6
"""Of each decoding thread: a picture of 10 Mpx."""
_LOADER_BYTES: Final = 0.5e9
"""A loader's process, which has no models."""


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """The two frozen models, without a weight of them."""

    text_parameters: int
    text_embedding: int
    text_width: int
    text_mlp: int
    vision_parameters: int
    """Of the tower that edits need besides."""
    vae_parameters: int
    vae_width: int
    told: str


QWEN_IMAGE_2512: Final = EncoderFacts(
    text_parameters=7_070_619_136,
    text_embedding=544_997_376,
    text_width=3584,
    text_mlp=18944,
    vision_parameters=676_550_144,
    vae_parameters=126_892_531,
    vae_width=96,
    told="Qwen-Image-2512's known encoders",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is encoded of one row."""

    pixels: float
    """Of all classes and pictures, on average."""
    vae_flops: float
    text_flops: float

    @property
    def flops(self) -> float:
        return self.vae_flops + self.text_flops


@dataclass(frozen=True, kw_only=True)
class ProducersPlan:
    """Everything that `plan` tells of producers."""

    config: Config
    encoders: EncoderFacts
    num_rows: int
    work: Work
    weights: float
    """Bytes of both encoders."""
    activations: float
    """Bytes of the larger batch: the VAE's or the text encoder's."""
    host: float
    """Bytes of one producer in host memory."""
    images_per_s: float | None
    """Of one producer; None where nothing tells a rate."""
    rate: str
    """How that was found."""

    @property
    def on_gpu(self) -> bool:
        return self.config.cluster.device == "cuda" and self.config.cluster.gpus_per_producer > 0

    @property
    def gpu_bytes(self) -> float:
        """Of one producer on its GPU."""
        return self.weights + self.activations if self.on_gpu else 0.0

    @property
    def all_images_per_s(self) -> float | None:
        return None if self.images_per_s is None else self.images_per_s * self.config.cluster.producers

    @property
    def hours(self) -> float | None:
        rate = self.all_images_per_s
        return None if rate is None else self.num_rows / rate / 3600

    @property
    def faults(self) -> list[str]:
        """Why the encoders cannot fit; empty if they can, or nothing is known to hold them against."""
        cluster, given = self.config.cluster, self.config.cluster.device_memory_gib
        if given is None or not self.on_gpu:
            return []
        share = min(1.0, cluster.gpus_per_producer)
        room = given * GIB * share * (1 - self.config.plan.headroom)
        if self.gpu_bytes <= room:
            return []
        of = f"{share:g} of a GPU" if share < 1 else "a GPU"
        lower = "encode.image_batch_pixels and encode.text_batch_tokens"
        more = " or raise cluster.gpus_per_producer (fewer producers share one)" if share < 1 else ""
        return [
            f"a producer's encoders need {self.gpu_bytes / GIB:.1f} GiB, {of} has {room / GIB:.1f} GiB "
            f"(plan.headroom={self.config.plan.headroom:g} left free): lower {lower}{more}, or let CPUs encode "
            "(cluster.gpus_per_producer=0)"
        ]


def producers_plan(
    config: Config, *, kind: Kind, num_rows: int, captions: float, text_tokens: float, pipeline: Path | None
) -> ProducersPlan:
    """Of a data set of so many rows with so many captions each; `pipeline` where it is on this machine."""
    encoders, cluster = encoder_facts(pipeline), config.cluster
    work = _work(config, encoders, kind, captions, text_tokens)
    on_gpu = cluster.device == "cuda" and cluster.gpus_per_producer > 0
    size = _DTYPE_BYTES[config.encode.compute_dtype]
    text = encoders.text_parameters + (encoders.vision_parameters if kind == EDIT else 0)
    weights = float(size * (text + (0 if kind == PROMPT else encoders.vae_parameters)))
    activations = size * max(_vae_values(config, encoders, kind), _text_values(config, encoders))
    loaders = cluster.loaders_per_producer
    threads = max(1, int(cluster.cpus_per_loader if loaders else cluster.cpus_per_producer))
    opened = 0 if kind == PROMPT else _WAITING_BYTES + (threads + 1) * _OPEN_PICTURE_BYTES
    host = _PROCESS_BYTES + (loaders * (_LOADER_BYTES + opened) if loaders else opened)
    rate, told = _rate(config, work, kind, on_gpu=on_gpu)
    return ProducersPlan(
        config=config,
        encoders=encoders,
        num_rows=num_rows,
        work=work,
        weights=weights,
        activations=activations,
        host=host if on_gpu else host + weights + activations,
        images_per_s=rate,
        rate=told,
    )


def encoder_facts(pipeline: Path | None) -> EncoderFacts:
    """By the headers of the pipeline's weights; Qwen-Image-2512's where there are none."""
    if pipeline is None:
        return QWEN_IMAGE_2512
    with contextlib.suppress(WeightsError):
        text = SafetensorsDirectory(pipeline / "text_encoder").entries
        vae = SafetensorsDirectory(pipeline / "vae").entries
        embedding = next((name for name in text if name.endswith("embed_tokens.weight")), None)
        width = vae.get("encoder.conv_in.weight")
        if embedding is not None and width is not None:
            prefix = embedding.removesuffix("embed_tokens.weight")
            tower = {name: entry for name, entry in text.items() if name.startswith(prefix) and "visual." not in name}
            return EncoderFacts(
                text_parameters=sum(entry.numel for name, entry in tower.items() if "lm_head" not in name),
                text_embedding=text[embedding].numel,
                text_width=text[embedding].shape[1],
                text_mlp=text[f"{prefix}layers.0.mlp.gate_proj.weight"].shape[0],
                vision_parameters=sum(entry.numel for name, entry in text.items() if "visual." in name),
                vae_parameters=sum(entry.numel for entry in vae.values()),
                vae_width=width.shape[0],
                told=str(pipeline),
            )
    return QWEN_IMAGE_2512


def table(plan: ProducersPlan, drawn_per_s: float | None) -> Table:
    """For a person. `drawn_per_s` pictures are what training takes where it is fastest."""
    cluster = plan.config.cluster
    places = f"{cluster.producer_cpus:g} CPUs and {cluster.gpus_per_producer:g} GPUs"
    rows: list[tuple[str, str]] = [("encoders' weights", show_bytes(plan.weights))]
    rows.append(("activations of the largest batch", show_bytes(plan.activations)))
    if plan.on_gpu:
        rows.append(("a producer on its GPU", show_bytes(plan.gpu_bytes)))
    rows.append(("a producer in host memory", show_bytes(plan.host)))
    rows.append(("Ray's object store, of all", show_bytes(cluster.object_store_bytes)))
    rows.append(("TFLOP per row, VAE and text encoder", f"{plan.work.vae_flops / 1e12:.2f} and "
                 f"{plan.work.text_flops / 1e12:.2f}"))  # fmt: skip
    rows.append(("images/s of a producer", _or_dash(plan.images_per_s)))
    rows.append(("images/s of all", _or_dash(plan.all_images_per_s)))
    rows.append(("images/s that training draws at most", _or_dash(drawn_per_s)))
    rows.append((f"hours for {plan.num_rows:,} rows", _or_dash(plan.hours)))
    title = f"Producers: {cluster.producers} with {places} each (a model)"
    return Table(title=title, columns=("", ""), rows=tuple(rows))


def lines(plan: ProducersPlan, drawn_per_s: float | None) -> list[str]:
    """What the figures rest on, and whether training would have to wait for producers beside it."""
    told = [
        f"producers: {plan.rate}; {plan.encoders.told}; every row kept; filters with models and reading not counted"
    ]
    made = plan.all_images_per_s
    if made is not None and drawn_per_s is not None and made < drawn_per_s:
        told.append(
            f"in `run`, training waits for producers in the first epoch of what they still make ({made:,.0f} of "
            f"{drawn_per_s:,.0f} images/s where it is fastest): take more of them, or `produce` first"
        )
    return told


def to_json(plan: ProducersPlan) -> dict[str, Any]:
    """Bytes, FLOPs, seconds, hours; None where it is not known."""
    return {
        "producers": plan.config.cluster.producers,
        "weights_bytes": plan.weights,
        "activations_bytes": plan.activations,
        "gpu_bytes": plan.gpu_bytes if plan.on_gpu else None,
        "host_bytes": plan.host,
        "object_store_bytes": plan.config.cluster.object_store_bytes,
        "vae_flops_per_row": plan.work.vae_flops,
        "text_flops_per_row": plan.work.text_flops,
        "images_per_s": plan.all_images_per_s,
        "assumed": plan.rate,
        "rows": plan.num_rows,
        "hours": plan.hours,
        "faults": plan.faults,
    }


def _work(config: Config, encoders: EncoderFacts, kind: Kind, captions: float, text_tokens: float) -> Work:
    pixels = vae = 0.0
    for mean, flops in _pictures(config, encoders, kind):
        pixels += mean
        vae += flops
    tokens = _TEMPLATE_TOKENS + text_tokens
    if kind == EDIT:  # a patch of 28 x 28 px is a token
        tokens += (config.encode.edit.vision_side / 28) ** 2
    text = 2.0 * (encoders.text_parameters - encoders.text_embedding) * tokens * captions
    return Work(pixels=pixels, vae_flops=vae, text_flops=text)


def _pictures(config: Config, encoders: EncoderFacts, kind: Kind) -> Iterator[tuple[float, float]]:
    """(px, FLOPs) of each picture that a row gives, the mean over the buckets of its class."""
    if kind == PROMPT:
        return
    for resolution in config.resolutions:
        areas = [float(one.height * one.width) for one in buckets(resolution, config.encode.aspects)]
        copies = 2 if kind == PREFERENCE else 1
        yield copies * sum(areas) / len(areas), copies * sum(_vae_flops(area, encoders) for area in areas) / len(areas)
        if kind == EDIT:
            area = float((config.encode.edit.condition_side or resolution) ** 2)
            yield area, _vae_flops(area, encoders)


def _vae_flops(pixels: float, encoders: EncoderFacts) -> float:
    attention = 4 * (pixels / 64) ** 2 * _VAE_ATTENTION_WIDTH * encoders.vae_width
    return _VAE_FLOPS * pixels * (encoders.vae_width / 96) ** 2 + attention


def _vae_values(config: Config, encoders: EncoderFacts, kind: Kind) -> float:
    if kind == PROMPT:
        return 0.0
    largest = max(one.height * one.width for r in config.resolutions for one in buckets(r, config.encode.aspects))
    return max(largest, config.encode.image_batch_pixels) * _VAE_VALUES * encoders.vae_width / 96


def _text_values(config: Config, encoders: EncoderFacts) -> float:
    mlp, own = _TEXT_VALUES
    tokens = max(config.encode.text_batch_tokens, config.model.max_text_tokens + _TEMPLATE_TOKENS)
    return float(tokens * (mlp * encoders.text_mlp + own * encoders.text_width))


def _rate(config: Config, work: Work, kind: Kind, *, on_gpu: bool) -> tuple[float | None, str]:
    """Rows per second of one producer, and how that was found. It decodes, then encodes; with loaders both at once."""
    cluster, given = config.cluster, config.plan
    loading_cpus = cluster.loaders_per_producer * cluster.cpus_per_loader
    decode_s = 0.0 if kind == PROMPT else 1 / (given.decoded_per_cpu_s * (loading_cpus or cluster.cpus_per_producer))
    if on_gpu:
        peak = cluster.peak_tflops * 1e12 if cluster.peak_tflops else PEAK_FLOPS[_ASSUMED_GPU]
        name = "cluster.peak_tflops" if cluster.peak_tflops else f"an {_ASSUMED_GPU}'s"
        reached = given.encode_mfu * peak * cluster.gpus_per_producer
        told = f"{given.encode_mfu:g} (plan.encode_mfu) of {name} {peak / 1e12:g} TFLOP/s"
    else:
        reached = given.cpu_gflops * 1e9 * cluster.cpus_per_producer
        told = f"{given.cpu_gflops:g} GFLOP/s per CPU (plan.cpu_gflops)"
    told += f", {given.decoded_per_cpu_s:g} pictures decoded, judged and resized per CPU and second"
    encode_s = work.flops / reached
    row_s = max(decode_s, encode_s) if loading_cpus else decode_s + encode_s
    return 1 / row_s, f"{told} (plan.decoded_per_cpu_s), all assumed"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
