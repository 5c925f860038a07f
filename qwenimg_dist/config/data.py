"""How rows become tensors, and the data sets that hold them.

Place in the flow: `encode`, `dedup` and `captions` are read by the producers, `data` by both sides.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
)

from qwenimg_dist.config.section import Section


class EditEncodeConfig(Section):
    """How the condition pictures of edits become tensors."""

    template: Literal["plus", "single"] = "plus"
    """Of the text encoder: `plus` numbers the pictures (Qwen-Image-Edit-2509 and later), `single` takes exactly one."""
    vision_side: PositiveInt = 384
    """The text encoder sees a picture at about this side squared (px)."""
    condition_side: PositiveInt | None = 1024
    """The VAE encodes a picture at about this side squared (px); `None` takes the target's resolution class."""


class DedupConfig(Section):
    """Near duplicates; rows of equal bytes are always told apart."""

    near: bool = False
    """Reject a picture that looks like one before it which the filters admit. Costs one decode more, and the filters'
    models once more, of each first copy whose unit is not ready when a copy of it is settled."""
    distance: int = Field(default=6, ge=0, le=12)
    """Bits of 64 in which the two hashes may differ. Another distance settles anew, without reading a picture."""


class EncodeConfig(Section):
    """How admitted rows become tensors."""

    resolutions: tuple[PositiveInt, ...] | None = None
    """Resolution classes (side of the square bucket, px). `None` takes all of the curriculum's."""
    aspects: tuple[str, ...] = ("1:1", "2:3", "3:2", "3:4", "4:3", "9:16", "16:9")
    """Aspect ratios (width:height) of the buckets of each class."""
    upscale: bool = False
    """Encode a picture at a class larger than itself; off, it is left out of that class."""
    posterior: Literal["mean", "mean_logvar"] = "mean"
    """What is cached of the VAE's posterior. `mean_logvar` doubles the latents' size, and lets
    `objective.posterior=sample` train on it; it is a facet of its own."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage type of latents and text features."""
    compute_dtype: Literal["bfloat16", "float32"] = "float32"
    collapse_vae: bool = True
    """Compute the VAE's 3-D convolutions in 2-D, which is the same for single pictures within rounding and 2 to 3
    times faster; off, the stock class runs."""
    image_batch_pixels: PositiveInt = 4 * 1024 * 1024
    """Pixels per VAE batch."""
    text_batch_tokens: PositiveInt = 8192
    """Padded tokens per text encoder batch."""
    edit: EditEncodeConfig = EditEncodeConfig()


class CaptionsConfig(Section):
    """What producers make of captions before they list them."""

    enhance: Literal["off", "add", "replace"] = "off"
    """The prompt enhancement (`models/prompt_enhance.py`): rendered text in quotation marks, a quality suffix by
    language. `add` lists its captions beside the source's, with the kind `enhanced`; `replace` in their place. A change
    captions the rows anew."""


def _sampling_weight(weight: float) -> float:
    if weight != 0 and not 0.001 <= weight <= 1000:
        raise ValueError("a sampling weight is 0, or from 0.001 to 1000 times per epoch")
    return weight


SamplingWeight = Annotated[float, AfterValidator(_sampling_weight)]


def _listed_weights(weights: Any) -> Any:
    """A command line cannot quote keys, so weights may also come as a list."""
    if not isinstance(weights, list | tuple):
        return {} if weights is None else weights
    if not all(isinstance(one, dict) and set(one) == {"where", "weight"} for one in weights):
        raise ValueError("a list of weights has entries such as {where: row < 5, weight: 2}")
    if len({one["where"] for one in weights}) < len(weights):
        raise ValueError("an expression stands twice in the list")
    return {one["where"]: one["weight"] for one in weights}


RowWeights = Annotated[dict[str, SamplingWeight], BeforeValidator(_listed_weights)]


def _name_of_dataset(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"the name {name!r} of a data set may have letters, digits, - and _ only: it begins its keys")
    return name


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


SampleKind = Literal["image", "edit"]


class MixedDataset(Section):
    """One of several data sets that are trained on together; `weight` or `repeats`, the same for all of them."""

    path: str
    """Its directory, as `data.path` for a single one."""
    weight: Amount | None = None
    """Its share of the samples, in proportion to the other weights and whatever the sizes: with 3 and 1, three of four
    samples are of the first. Small data sets then come several times while a large one comes once; metrics count the
    epochs of each."""
    repeats: Amount | None = None
    """How often each of its rows comes per epoch instead: 1 for all is every sample of every data set once."""
    kind: SampleKind | None = None
    """Of its samples, where it is another than `data.kind`: `image` beside `edit` mixes text-to-image with editing. A
    step is of one bucket, and so of one kind."""
    where: str | None = None
    """Narrows `data.where` for this data set."""
    caption_weights: dict[str, NonNegativeFloat] | None = None
    """In the place of `data.caption_weights`."""

    @property
    def amount(self) -> float:
        """Weight or repeats."""
        return self.weight if self.weight is not None else self.repeats or 0.0


class DataConfig(Section):
    """The data set directory, the only thing that producers and consumers share."""

    path: str | None = None
    """What `produce` writes, and `train` reads unless there is a `mix`: a directory, or `s3://BUCKET/FOLDER` (needs the
    extra `s3`; credentials come from the environment, never from here)."""
    kind: SampleKind | None = None
    """Of the samples that flow matching trains on: `image` (text to picture), or `edit` (made from `source=edits`:
    instruction and condition pictures to picture; without instructions, reconstruction). `None` is the objective's own
    kind."""
    cache: str | None = None
    """Local directory for what is kept of data sets on `s3://`: their index, whole, and tars. `None`: the user's cache.
    The ranks and producers of a machine share it; give fast local disk."""
    cache_bytes: PositiveInt = 200 * 1024**3
    """Bytes of tars kept there of each data set; the index is not counted. Tars that are needed next are fetched
    ahead, those opened longest ago are removed. Four tars per rank are held while a batch is read: a limit below that
    is passed. A limit below what one epoch's window touches fetches tars again and again."""
    mix: dict[Annotated[str, AfterValidator(_name_of_dataset)], MixedDataset] = Field(default_factory=dict)
    """Several data sets to train on, made by one `produce` each for the same model and encode settings: name -> its
    path and weight, for example `data.mix={photos: {path: /a, weight: 3}, text: {path: /b, weight: 1}}`, or one by one
    `+data.mix.photos.path=/a +data.mix.photos.weight=3`. All else in this section, and a phase's `where`, holds for
    every one of them: expressions may name the column `dataset`, and a score that a data set does not have is missing
    there. Each holds out rows of its own, and `evaluate.num_samples` is
    shared evenly. Keys in logs begin with `NAME/`. Costs what `weights` cost."""
    unit_size: PositiveInt = 512
    """Rows per unit, the grain of work, retry and commit. Fixed when the data set is made."""
    max_shard_bytes: PositiveInt = 1024**3
    """A unit's tar is closed at this size and the next one begun."""
    where: str | None = None
    """Expression over the index columns; selects what is trained on, for example `aspect < 2`."""
    held_out: NonNegativeFloat = 0.02
    """Share of the rows (chosen by key) kept for validation and never trained on."""
    max_held_out: NonNegativeInt = 256
    """At most this many rows are held out."""
    takedown: str | None = None
    """A text file with one uri, sample key or sha256 per line: rows that are left out of every generation recorded from
    then on. May grow while a run lasts; each generation records which list it followed."""
    max_bad_samples: NonNegativeInt = 0
    """Different samples whose bytes may turn out unreadable (a shard missing, cut or failing to read) before the run
    stops; 0 stops at the first. Each is left out of its batch with weight zero on all ranks alike, written to
    `bad_samples.jsonl` and counted across resumes. It costs nothing but those samples."""
    weights: RowWeights = Field(default_factory=dict)
    """Expression over the index columns -> how often its rows come per epoch: 3 three times, 0.5 every other epoch, 0
    never. Weights of all expressions that hold for a row are multiplied; a row with none comes once. On a command line,
    where keys cannot be quoted: `data.weights=[{where: "category == 'text'", weight: 3}]`."""
    caption_weights: dict[str, NonNegativeFloat] | None = None
    """Kind of caption -> its weight in the draw, for example `{raw: 0.2, recaption: 0.8}`; a row's kinds share by
    these. `None` draws evenly among a row's captions."""

    @field_validator("mix", mode="before")
    @classmethod
    def _without_those_taken_away(cls, mix: Any) -> Any:
        return {name: one for name, one in mix.items() if one is not None} if isinstance(mix, dict) else mix or {}

    @field_validator("mix")
    @classmethod
    def _one_unit_of_mixing(cls, mix: dict[str, MixedDataset]) -> dict[str, MixedDataset]:
        weights = [one.weight is not None for one in mix.values()]
        repeats = [one.repeats is not None for one in mix.values()]
        if len(mix) > 1 and not (all(weights) and not any(repeats)) and not (all(repeats) and not any(weights)):
            raise ValueError("give every data set a `weight` (its share of the samples), or every one `repeats`")
        if len(mix) > 1 and not any(one.amount for one in mix.values()):
            raise ValueError("give at least one data set a weight above 0")
        return mix

    @field_validator("caption_weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and not any(weights.values()):
            raise ValueError("give at least one kind of caption a weight above 0, or null to draw evenly")
        return weights
