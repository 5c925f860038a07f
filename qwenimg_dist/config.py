"""What can be configured: one frozen pydantic tree, validated from the plain YAML that Hydra composes.

`compose.py` turns groups and overrides into this tree; every command receives it whole and reads its own part.
Unknown keys, wrong types and wrong choices are refused here. Deliberately left out: `_target_`, `instantiate` and
resolvers that run code. Filters are validated by their own files (`producers/filters`), since the core may not know
them.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import re
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    """Base of every part of the tree: frozen, and no key that is not named here."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """Which pipeline is trained."""

    name: str
    """What the model is called in run directories and reports."""
    path: str | None = None
    """Local diffusers directory or hub id. `None` with `name=tiny` builds the tiny pipeline in the user's cache."""
    revision: str | None = None
    """Pinned commit of the hub repository; ignored for a local directory."""
    max_text_tokens: PositiveInt = 512
    """Captions are cut to this many tokens (the model was trained on at most 512)."""


_INDEX_COLUMNS = frozenset(
    {
        "row",
        "unit",
        "key",
        "status",
        "reason",
        "detail",
        "width",
        "height",
        "aspect",
        "bytes",
        "format",
        "kind",
        "where",
    }
)


def _label_columns(given: Any) -> Any:
    """A list names labels and columns alike."""
    if not isinstance(given, list | tuple):
        return given or {}
    if len(set(map(str, given))) < len(given):
        raise ValueError("a column stands twice in the list")
    return {str(name): str(name) for name in given}


def _label_names(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) is None or keyword.iskeyword(name):
            raise ValueError(
                f"{name!r} is no name for a label: small letters, digits and _ (give another column name one, "
                "as in {text_level: TextLevel})"
            )
        if name in _INDEX_COLUMNS or name.startswith(("score_", "label_")):
            raise ValueError(f"{name!r} is a name that the index has already, choose another")
    return columns


LabelColumns = Annotated[dict[str, str], BeforeValidator(_label_columns), AfterValidator(_label_names)]


class FolderSource(Section):
    """Pictures in a folder, with `metadata.jsonl` (Hugging Face imagefolder) or same-stem `.txt` captions."""

    kind: Literal["folder"]
    path: str | None = None
    captions: Literal["auto", "metadata", "txt"] = "auto"
    """`auto` takes `metadata.jsonl` where there is one, else `.txt` files."""
    caption_columns: dict[str, str] | None = None
    """Several kinds of captions, drawn by `data.caption_weights`: kind -> its column, for example `{raw: text,
    recaption: llava}` (keys of `metadata.jsonl`; `.txt` captions are `raw`)."""
    label_columns: LabelColumns = {}
    """Labels that the source gives, for `where` and `data.weights`: name -> its key in `metadata.jsonl`, or a list of
    keys that name themselves. Text becomes the index column `label_<name>`, numbers `score_<name>`. Changed labels list
    their rows anew and encode nothing."""


class ManifestSource(Section):
    """A `.jsonl` or `.parquet` file with one row per picture."""

    kind: Literal["manifest"]
    path: str | None = None
    uri_column: str = "uri"
    caption_column: str = "caption"
    """A string, or a list of strings for several captions."""
    root: str | None = None
    """What relative uris are relative to; `None` is the manifest's folder."""
    caption_columns: dict[str, str] | None = None
    """Several kinds of captions, drawn by `data.caption_weights`: kind -> its column, for example `{raw: text,
    recaption: llava}` (columns)."""
    label_columns: LabelColumns = {}
    """Labels that the source gives, for `where` and `data.weights`: name -> its column, or a list of columns that name
    themselves. Text becomes the index column `label_<name>`, numbers `score_<name>`. Changed labels list their rows
    anew and encode nothing."""


class WebdatasetSource(Section):
    """Tars of samples, as img2dataset and WebDataset write them."""

    kind: Literal["webdataset"]
    path: str | tuple[str, ...] | None = None
    """A folder of tars, a glob, a range such as `{00000..00099}.tar`, or a list of these; uris are relative to the
    folder that all of them start in."""
    captions: Literal["auto", "json", "txt"] = "auto"
    """`auto` takes the `.json` member where it has a caption, else the `.txt`."""
    caption_column: str = "caption"
    """Key of the caption, or list of captions, in `.json` members."""
    caption_columns: dict[str, str] | None = None
    """Several kinds of captions, drawn by `data.caption_weights`: kind -> its column, for example `{raw: text,
    recaption: llava}` (keys of `.json` members; `.txt` captions are `raw`)."""
    label_columns: LabelColumns = {}
    """Labels that the source gives, for `where` and `data.weights`: name -> its key in the `.json` member, or a list of
    keys that name themselves. Text becomes the index column `label_<name>`, numbers `score_<name>`. Changed labels list
    their rows anew and encode nothing."""


class PairsSource(Section):
    """Preference pairs in `.jsonl` or `.parquet` files; pictures by uri, or as bytes in parquet columns."""

    kind: Literal["pairs"]
    path: str | None = None
    """A file, or a folder of files."""
    layout: Literal["auto", "chosen", "labels"] = "auto"
    """`chosen`: a column with the better picture and one with the other; `labels`: two pictures and a label for each,
    of which the higher one wins; `auto`: `labels` where the label columns are there."""
    prompt_column: str | None = None
    """`None` is `prompt` or `caption`, whichever is there."""
    picture_columns: tuple[str, str] | None = None
    """Chosen and rejected, or first and second; `None` is `chosen`, `rejected`, with labels `jpg_0`, `jpg_1`."""
    label_columns: tuple[str, str] = ("label_0", "label_1")
    meta_columns: tuple[str, ...] = ()
    """Columns kept as JSON with each sample."""
    root: str | None = None
    """What relative uris are relative to; `None` is the folder of the files."""


class EditsSource(Section):
    """Source pictures, instruction and target in `.jsonl` or `.parquet` files; pictures as for `pairs`."""

    kind: Literal["edits"]
    path: str | None = None
    """A file, or a folder of files."""
    source_columns: tuple[str, ...] = Field(default=("source",), min_length=1)
    """Each with a picture or a list of pictures; their order is that of the conditions."""
    instruction_column: str = "instruction"
    """A string, or a list of strings for several wordings."""
    target_column: str = "target"
    max_sources: PositiveInt = 4
    """Rows with more source pictures are refused."""
    meta_columns: tuple[str, ...] = ()
    """Columns kept as JSON with each sample."""
    root: str | None = None
    """What relative uris are relative to; `None` is the folder of the files."""


class SyntheticTextSource(Section):
    """Pictures of text, drawn from a seed, with captions that quote what is written."""

    kind: Literal["synthetic_text"]
    path: str | None = None
    """Corpus: a UTF-8 file with a paragraph per line, English and Chinese mixed. `None` takes a few built-in sentences,
    which show the layouts; to learn text rendering, give a corpus."""
    num_rows: PositiveInt = 1000
    """Pictures; a larger number later appends to those there are."""
    seed: NonNegativeInt = 0
    size: int = Field(default=640, ge=256)
    """Side of the square with as many pixels as each picture."""
    english: NonNegativeFloat = 1.0
    """Weight of the language; 0 leaves it out."""
    chinese: NonNegativeFloat = 1.0
    """Weight of the language, which needs a font that has it; 0 leaves it out."""
    pure: NonNegativeFloat = 1.0
    """Weight of paragraphs on clean backgrounds."""
    compositional: NonNegativeFloat = 1.0
    """Weight of text on paper, wood and signs in scenes."""
    complex: NonNegativeFloat = 1.0
    """Weight of slides, app windows and menus."""
    fonts: tuple[str, ...] = ()
    """Font files for English; empty takes those of the system, else Pillow's own."""
    chinese_fonts: tuple[str, ...] = ()
    """Font files for Chinese (`FILE#NUMBER` inside a collection); empty takes those of the system or of the `chinese`
    extra."""
    backgrounds: str | None = None
    """Folder of pictures that compositional text is put into; `None` draws scenes by rule."""


class PromptsSource(Section):
    """Texts without pictures: a `.txt` with one per line, or `.jsonl` or `.parquet` files."""

    kind: Literal["prompts"]
    path: str | None = None
    """A file, or a folder of tables."""
    prompt_column: str = "prompt"
    meta_columns: tuple[str, ...] = ()
    """Columns kept as JSON with each sample: what a reward needs to know."""


SourceConfig = Annotated[
    FolderSource | ManifestSource | WebdatasetSource | PairsSource | EditsSource | PromptsSource | SyntheticTextSource,
    Field(discriminator="kind"),
]


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
    """Reject a picture that looks like one before it which is kept as far as header and captions go. Settled before
    pixels are looked at: a first copy that a filter on pixels rejects still costs the ones after it."""
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
    """What `produce` writes, and `train` reads unless there is a `mix`."""
    mix: dict[Annotated[str, AfterValidator(_name_of_dataset)], MixedDataset] = {}
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
    weights: RowWeights = {}
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


class Phase(Section):
    """One stretch of the curriculum.

    Beside what stands here nothing can change between phases: precision, gathering and the optimiser's state are built
    once. Its length is a `share`, `steps` or `images`, in the same unit for all phases.
    """

    name: str = ""
    resolutions: dict[PositiveInt, PositiveFloat] = Field(min_length=1)
    """Resolution class -> weight of its draws; exact in proportion, one class per step."""
    share: PositiveFloat | None = None
    """Share of `train.steps`, in proportion to the other phases' shares."""
    steps: PositiveInt | None = None
    """Optimiser steps; all phases' together are `train.steps`, which may be null then."""
    images: PositiveInt | None = None
    """Pictures to draw, repeats counted: `images / global_batch` steps, rounded up. Slots that only fill a bucket's
    last batch count as drawn, so that the length depends on the config alone; the printed plan says how many there are.
    All phases' steps together are `train.steps`, which may be null then."""
    global_batch: PositiveInt
    """Samples per optimiser step, over all ranks. Larger is steadier and needs fewer updates per epoch; small buckets
    then have more fill slots."""
    micro_batch_tokens: PositiveInt
    """Token budget (image and text) of one forward pass on one rank; at least one sample is always taken. More is
    faster until memory is full; it changes rounding only."""
    lr_scale: PositiveFloat = 1.0
    """Multiplies the learning rate in this phase."""
    lr: PositiveFloat | None = None
    """Learning rate of this phase in the place of `optim.lr`; `optim.schedule` works on it as on that. Not with an
    `lr_scale`."""
    warmup_steps: NonNegativeInt = 0
    """First steps of the phase in which its rate rises linearly from near 0. Worth it where the resolution changes:
    AdamW's moments are of the old one then. The start of the run has `optim.warmup_steps`."""
    activation_checkpointing: bool | None = None
    """`engine.activation_checkpointing` of this phase: a step costs 4/3 with it, activations a small part. Low
    resolutions rarely need it. `None` takes the engine's. May be changed on resume."""
    where: str | None = None
    """Narrows `data.where` in this phase, for example `text_level <= 1`."""
    weights: RowWeights = {}
    """Joins `data.weights` in this phase; an expression that stands in both counts as here. 0 keeps its rows out."""
    mix: dict[str, Amount] | None = None
    """Data set of `data.mix` -> its weight (or repeats) in this phase, where it differs; 0 leaves it out."""

    @model_validator(mode="after")
    def _one_rate(self) -> Phase:
        if self.lr is not None and self.lr_scale != 1.0:
            raise ValueError("give a phase `lr` or `lr_scale`, not both")
        return self

    @property
    def own_steps(self) -> int | None:
        """Steps that the phase itself says; None where it has a share."""
        return self.steps if self.images is None else -(-self.images // self.global_batch)


class CurriculumConfig(Section):
    """Phases in order. YAML may name them (`curriculum.phases.low.steps=100` then overrides one), or list them."""

    phases: tuple[Phase, ...] = Field(min_length=1)

    @field_validator("phases", mode="before")
    @classmethod
    def _named_phases(cls, phases: Any) -> Any:
        if isinstance(phases, dict):
            return [{**phase, "name": str(name)} for name, phase in phases.items() if phase is not None]
        return phases

    @model_validator(mode="after")
    def _one_unit_of_length(self) -> CurriculumConfig:
        units = [[unit for unit in LENGTHS if getattr(phase, unit) is not None] for phase in self.phases]
        if any(len(given) != 1 for given in units) or len({given[0] for given in units}) > 1:
            there = "; ".join(
                f"{phase.name or number} has {' and '.join(given) or 'none'}"
                for number, (phase, given) in enumerate(zip(self.phases, units, strict=True))
            )
            raise ValueError(f"give every phase a `share`, or every phase `steps`, or every phase `images` ({there})")
        if self.phases[0].warmup_steps:
            raise ValueError("the first phase is warmed up by `optim.warmup_steps`: set its own `warmup_steps` to 0")
        return self

    @property
    def own_steps(self) -> int | None:
        """Steps that the phases come to by themselves; None where they have shares."""
        steps = [phase.own_steps for phase in self.phases]
        return None if None in steps else sum(number for number in steps if number is not None)


LENGTHS: Final = ("share", "steps", "images")
"""The units that a phase's length may be given in."""


class FlowMatchingConfig(Section):
    """Flow matching on velocity = noise - x0 (sigma = 1 is noise)."""

    kind: Literal["flow_matching"]
    sigma_density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """How often each sigma is trained, before the shift. `logit_normal`: most in the middle, hardly at the ends, as the
    report trained; `uniform`: every sigma alike, which spends steps where little is to be learnt; `mode`: SD3's, in the
    middle more often and yet not rarely at the ends. Costs nothing."""
    sigma_mean: float = 0.0
    """Of the normal under the sigmoid of `logit_normal`; above 0 trains noisier sigmas."""
    sigma_std: PositiveFloat = 1.0
    """Of the normal under the sigmoid of `logit_normal`; smaller trains the ends less."""
    sigma_mode_scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    """s of `sigma_density=mode`: 0 is uniform, above 0 the middle comes more often (1.29: SD3's best), below 0 the ends
    do."""
    sigma_stratified: bool = False
    """The slots of each global batch share the density's quantiles evenly, one in each part, dealt anew every step: the
    loss scatters less from step to step, most with small batches. Each single draw keeps its density; costs nothing."""
    shift: Literal["resolution", "constant", "none"] = "resolution"
    """Moves sigmas towards noise, of which larger pictures need more to lose their structure. `resolution` is the
    scheduler's own exponential shift by image tokens, which sampling uses too; `none` trains large pictures at sigmas
    that sampling hardly visits."""
    shift_constant: PositiveFloat = 2.2
    """e^mu, used with `shift=constant`."""
    weighting: Literal["none", "bell"] = "none"
    """Weight of a sample's loss by its shifted sigma. `bell`: exp(-2 (sigma - 1/2)^2) - exp(-1/2), divided by its mean
    over the sampled density, so that the mean weight is 1 and `optim.lr` keeps its meaning: 0 at both ends, as common
    trainers weigh uniform sigmas. On top of `logit_normal` it hardly trains the ends. `train/loss` is then weighted;
    `train/loss_unweighted` stands beside it."""
    posterior: Literal["mode", "sample"] = "mode"
    """Latents are the VAE posterior's mode, or a new sample of it each time. `sample` is what the VAE was trained to
    decode and a slight augmentation; it needs a data set made with `encode.posterior=mean_logvar`, whose latents are
    twice the size, and reads twice the bytes. Validation uses the mode."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the empty prompt; decided in the ledger."""


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_expression)]


class ParameterGroupConfig(Section):
    """Parameters with a learning rate and weight decay of their own."""

    pattern: Pattern
    """Regular expression, searched in the parameters' names."""
    lr_scale: PositiveFloat = 1.0
    """The learning rate of every step, times this. To train a group not at all, freeze it."""
    weight_decay: NonNegativeFloat | None = None
    """Of the group's matrices, in place of `optim.weight_decay`; norms and biases never decay."""


class OptimConfig(Section):
    """AdamW with fp32 masters, by torch's fused kernel.

    Left out: Adafactor and 8-bit states. The states of full finetuning are divided over the ranks already (5.7 GB per
    GPU on 64 with AdamW in fp32) and both change what is learnt; for few GPUs there are `freeze` and
    `engine.offload_optimizer`.
    """

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "cosine"] = "constant"
    cooldown_steps: NonNegativeInt = 0
    """Last steps of a run with `schedule=constant` in which the rate falls linearly to `min_lr_ratio`."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    train: tuple[Pattern, ...] = ()
    """Regular expressions, searched in the parameters' names: what none of them finds is frozen; empty trains all. A
    frozen parameter saves 16 of its 18 bytes over all ranks (bf16; with EMA 20 of 22), and the time of its gradient and
    its reduction; what is trained then has less to move with."""
    freeze: tuple[Pattern, ...] = ()
    """What these find is frozen, even where `train` finds it too."""
    groups: dict[str, ParameterGroupConfig] = {}
    """Name -> pattern, `lr_scale` and `weight_decay`. The first group in the order written that finds a parameter takes
    it; what none finds has `optim.lr` and `optim.weight_decay`. Sizes are printed at the start, and names stand in
    `parameter_groups.json` of the run. Clipping is over all groups together."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """0 turns clipping off."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """0 turns the EMA off."""

    @field_validator("groups", mode="before")
    @classmethod
    def _no_groups(cls, groups: Any) -> Any:
        return {} if groups is None else groups

    @model_validator(mode="after")
    def _one_way_down(self) -> OptimConfig:
        if self.schedule == "cosine" and self.cooldown_steps:
            raise ValueError("`cooldown_steps` belongs to `schedule=constant`: a cosine comes down by itself")
        return self


ZeroSize = Literal[
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
]


class EngineConfig(Section):
    """ZeRO-3 by DeepSpeed, its sizes derived from the model.

    Left out: MiCS, which shards states over few ranks only and so takes the memory that full finetuning lacks (hpZ is
    the part of it that spares traffic); FP8, whose scaling needs other layers than the stock model's; offload of
    parameters and to NVMe, since 20 B parameters fit into the GPUs' or the host's memory.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the gathered weights and the forward pass; masters, reduce-scatter and loss are always fp32."""
    activation_checkpointing: bool = False
    gather: Literal["block", "layer"] = "block"
    """What forward and backward gather at once: `block` is faster, `layer` needs the least memory."""
    compile: bool = False
    """Compile the transformer block, which all blocks share, by `torch.compile`; needs `gather=block` and a C++ or
    Triton compiler on every node. Costs a minute or more before the first step and at shapes of a new kind."""
    attention: Literal["native", "flash", "cudnn", "efficient", "math"] = "native"
    """Which kernel of PyTorch computes the attention: `native` lets PyTorch choose by what the inputs allow; `flash`
    cannot take the text mask of batches with unequal captions, and is refused at the first such batch."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps masters, moments, gradients and EMA in host memory: 16 of 18 bytes per parameter (20 of 22 with EMA)
    leave the GPUs. It costs time: gradients cross PCIe at every micro-batch, weights at every step, and torch's fused
    AdamW updates on the rank's cores (give it some: `cluster.cpus_per_rank`). Nothing is compiled for it, which
    DeepSpeed's own CPU Adam would need. With `cluster.device=cpu` all is in host memory anyway."""
    hpz_partition: PositiveInt = 1
    """ZeRO++'s hpZ: each group of so many ranks (the GPUs of a node) holds a second partition of the weights, so that
    after the first forward pass of a step all gathering stays within the node. Spares the network between nodes a
    quarter of a micro-batch's bytes, of a step's further micro-batches half; costs 2 x parameters / hpz_partition bytes
    per GPU in bf16 (20 B over 8: 5.1 GB). Must divide the ranks; 1 is off."""
    zero: dict[ZeroSize, PositiveInt] = {}
    """DeepSpeed's sizes in elements, in place of those derived from the model: larger buckets are fewer collectives,
    smaller ones less memory."""
    max_skipped_steps: NonNegativeInt = 3
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""

    @field_validator("zero", mode="before")
    @classmethod
    def _no_sizes(cls, sizes: Any) -> Any:
        return {} if sizes is None else sizes

    @model_validator(mode="after")
    def _compiled_whole(self) -> EngineConfig:
        if self.compile and self.gather != "block":
            raise ValueError("`compile=true` needs `gather=block`: a block that is gathered by layers has breaks in it")
        return self


class CheckpointConfig(Section):
    every: PositiveInt = 500
    keep: PositiveInt = 3
    """Newest checkpoints kept; older ones are removed after a new one is committed. Each takes 16 bytes per parameter
    on disk (12 without EMA), and while one is written there is one more than this."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are multiples of this stay for good, whatever `keep` says; 0 keeps none so. The disk
    they fill is never given back by the run."""
    certify: Literal["start", "save", "off"] = "start"
    """When the run's call of the transformer is compared with stock diffusers' on the same weights: at each start, also
    before each `save`, or never. The result stands in every checkpoint's certificate; a difference beyond rounding
    stops the run. Costs seven forwards of 60 image tokens: at 20 B mostly seven gathers of the weights."""
    certify_independent: NonNegativeInt = 200_000_000
    """Models of at most so many parameters are also compared with a stock module loaded for it, which rank 0 holds for
    a moment (4 bytes per parameter in fp32); larger ones only with the stock pipeline's call of the run's engine."""


class TrainConfig(Section):
    steps: PositiveInt
    """Optimiser steps of the run, fixed for its whole life. `null` takes what the curriculum's phases come to, if they
    have `steps` or `images`; a number must agree with them, and is needed where they have shares."""
    seed: NonNegativeInt = 0
    stop_after: PositiveInt | None = None
    """End (saved, exit 0) after this step without changing the schedule."""
    log_samples: bool = False
    """Write `samples.jsonl`: step, bucket and the keys of the global batch in order."""
    log_every: PositiveInt = 10
    report: Literal["checkpoints", "end", "off"] = "checkpoints"
    """When `report.html` is written into the run directory: after checkpoints and at the end, at the end, or only by
    `qwenimg-dist report`. A process of its own on rank 0's node does it in seconds; no step waits."""
    norms_every: NonNegativeInt = 0
    """Steps between norms of gradients and parameters per block (`norms/...`); 0 turns them off. Costs one pass over a
    rank's gradients and masters and one small all-reduce."""
    heartbeat_timeout_s: PositiveFloat = 120
    """A rank whose process gives no sign of life for so long (stopped, frozen, its machine starved) is ended by the
    watchdog beside it, and the gang starts anew. Signs come from a thread every second, whatever the rank works on:
    long loading, compiling, saving or evaluating does not matter here."""
    stall_timeout_s: PositiveFloat = 3600
    """A rank that lives but has not come from one stage or micro-batch to the next for so long is ended likewise. Must
    exceed the longest single stage: loading the weights, compiling, one save, one evaluation."""
    fresh: bool = False
    """Start from step 0 even if the run directory holds checkpoints; they are moved aside."""
    dry_run: bool = False
    """Check the input, print the plan (steps, images, epochs, buckets, fill slots of every phase) and end: no ranks are
    started, nothing is written. Costs one pass over the index."""


class EvaluateConfig(Section):
    every: NonNegativeInt = 500
    """Steps between held-out losses; 0 turns them off."""
    sigma_quantiles: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    num_samples: PositiveInt = 64
    """Held-out samples per resolution class, at most `data.max_held_out`. Each costs a forward per quantile and class
    at every evaluation, and stays in the memory of one rank."""
    resolutions: tuple[PositiveInt, ...] | None = None
    """Classes that are evaluated, trained or not. `None` takes all that the data set has latents of, so that forgetting
    at a class that is not trained shows; fewer cost less. Fixed when a run starts, but for leaving some out."""
    weights: Literal["ema", "raw", "both"] = "ema"
    """Which weights losses and grids are of; without an EMA, the raw ones. `both` shows whether the EMA lags or helps
    (raw ones as `eval/raw/...` and `step-...-raw.png`) and costs twice the time."""
    guard: Literal["warn", "stop", "off"] = "warn"
    """What happens when the model has become worse than the one it started from, at any class: a line in the log, or
    the end of the run (saved, exit code 1). Costs nothing beyond the evaluation."""
    guard_tolerance: NonNegativeFloat = 0.02
    """Relative: 0.02 lets a loss be 2 % above the starting model's. A smaller one speaks sooner, and sooner in vain."""
    guard_patience: PositiveInt = 2
    """Evaluations in a row that must be worse before the guard acts."""
    grid_every: NonNegativeInt = 0
    """Steps between sample grids; 0 turns them off."""
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    """The empty prompt, as dropped captions in training."""
    num_steps: PositiveInt = 20
    guidance: PositiveFloat = 4.0
    height: PositiveInt | None = None
    """px; `None` is the square bucket of the phase."""
    width: PositiveInt | None = None
    seed: NonNegativeInt = 0


class LoggerConfig(Section):
    """`metrics.jsonl` is always written; W&B besides."""

    wandb: Literal["online", "offline", "off"] = "off"
    project: str = "qwenimg-dist"
    group: str | None = None
    name: str | None = None


class ClusterConfig(Section):
    ranks: PositiveInt = 1
    """ZeRO-3 ranks of `train`."""
    producers: PositiveInt = 1
    """Producer actors of `produce`."""
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_rank: PositiveFloat = 1
    cpus_per_producer: PositiveFloat = 1
    gpus_per_producer: NonNegativeFloat = 0
    address: str | None = None
    """Ray address (`auto` inside a submitted job); `None` starts a local Ray on 127.0.0.1."""
    unit_retries: NonNegativeInt = 3
    """Tries of one unit after its actor died."""
    unit_timeout_s: PositiveFloat = 3600
    """An actor that has not answered for so long is replaced."""
    max_poison_rows: NonNegativeInt = 8
    """Pictures of one unit that may kill the process which opens them; more, and `produce` stops and says so."""
    max_restarts: NonNegativeInt = 3
    """Restarts of the training gang after a rank died."""
    peak_tflops: PositiveFloat | None = None
    """Dense bf16 TFLOP/s of one rank's device, what `train/mfu` is measured by; `None` takes the data sheet's of GPUs
    that are known by name. Costs nothing; a measured matrix rate instead gives the share of what can be reached."""


class RunConfig(Section):
    path: str | None = None


class ExportConfig(Section):
    path: str | None = None
    weights: Literal["ema", "raw"] = "ema"
    step: PositiveInt | None = None
    """Checkpoint to export; `None` is the newest valid one."""
    max_shard_bytes: PositiveInt = 5 * 1000**3
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class SampleConfig(Section):
    """Pictures from a pipeline directory or a checkpoint."""

    path: str | None = None
    """A pipeline directory; `None` takes `export.path`, else the newest valid checkpoint of `run.path`."""
    prompts: tuple[str, ...]
    prompts_file: str | None = None
    """One prompt per line; besides `prompts`."""
    out: str
    """The grid, a PNG file."""
    cells: str | None = None
    """Folder for the single pictures; `None` writes the grid only."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Every prompt is drawn once per seed."""
    height: PositiveInt | None = None
    """px; `None` is the highest resolution class of the curriculum."""
    width: PositiveInt | None = None
    num_steps: PositiveInt
    guidance: PositiveFloat
    negative_prompt: str
    enhance: bool = False
    """Rewrite the prompts by `models/prompt_enhance.py`, and take its recommended negative prompt where none is given.
    The grid keeps the prompts as they were written."""
    columns: PositiveInt


class DemoConfig(Section):
    """The demo's own sizes; all else stands in `stage=demo`."""

    path: str
    """Folder for everything the demo makes."""
    num_images: PositiveInt
    """Good pictures in the generated folder; the junk comes besides."""
    seed: NonNegativeInt


class InspectConfig(Section):
    """The contact sheet of `data inspect`. Its counts and histograms are of all rows; these say which get pictures."""

    out: str | None = None
    """HTML file; `None` is `inspect.html` in the data set."""
    max_rows: PositiveInt = 2000
    """More rows than this are sampled: half kept ones, half of the others, spread over their reasons."""
    where: str | None = None
    """Only rows that this expression selects, written as `data.where`; `status` and `reason` may be named too."""
    reason: str | None = None
    """Only rows that were rejected for this reason."""
    page: PositiveInt | None = None
    """Instead of a sample: this page of `max_rows` rows, in order of rows."""
    thumbnail: PositiveInt = 192
    """Longer side of a thumbnail (px)."""
    decode: bool = False
    """Show cached latents beside the originals, decoded by the VAE of `model`."""
    clusters: NonNegativeInt = 24
    """Clusters of duplicates that are shown side by side, the largest of each kind."""


class CaptionsConfig(Section):
    """What producers make of captions before they list them."""

    enhance: Literal["off", "add", "replace"] = "off"
    """The prompt enhancement (`models/prompt_enhance.py`): rendered text in quotation marks, a quality suffix by
    language. `add` lists its captions beside the source's, with the kind `enhanced`; `replace` in their place. A change
    captions the rows anew."""


class Config(Section):
    """Everything. See `conf/` for the groups."""

    stage: str
    model: ModelConfig
    source: SourceConfig
    captions: CaptionsConfig = CaptionsConfig()
    filters: dict[str, dict[str, Any]]
    dedup: DedupConfig
    encode: EncodeConfig
    data: DataConfig
    curriculum: CurriculumConfig
    objective: FlowMatchingConfig
    optim: OptimConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    logger: LoggerConfig
    cluster: ClusterConfig
    run: RunConfig = RunConfig()
    export: ExportConfig = ExportConfig()
    sample: SampleConfig
    demo: DemoConfig
    inspect: InspectConfig = InspectConfig()
    follow: bool = False
    """`produce` watches the source, `train` waits for new units, until the other side is done."""

    @model_validator(mode="after")
    def _cached_logvar(self) -> Config:
        if self.objective.posterior == "sample" and self.encode.posterior != "mean_logvar":
            raise ValueError(
                "objective.posterior=sample needs cached log-variances: set encode.posterior=mean_logvar and produce "
                "with it first (a facet of latents beside the one of means), or train on objective.posterior=mode"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _steps_of_the_phases(cls, tree: Any) -> Any:
        """`train.steps: null` becomes a number here, so that all else, and the run's `config.yaml`, has one."""
        if not isinstance(tree, dict) or not isinstance(tree.get("train"), dict):
            return tree
        if tree["train"].get("steps", 0) is not None:
            return tree
        try:
            steps = CurriculumConfig.model_validate(tree.get("curriculum")).own_steps
        except ValueError:
            return tree  # told when the tree itself is validated
        if steps is None:
            raise ValueError("train.steps is null, but the phases have shares of it: set train.steps=...")
        return {**tree, "train": {**tree["train"], "steps": steps}}

    @model_validator(mode="after")
    def _phases_mix_what_there_is(self) -> Config:
        for number, phase in enumerate(self.curriculum.phases):
            changes = phase.mix or {}
            if unknown := sorted(changes.keys() - self.data.mix.keys()):
                raise ValueError(
                    f"phase {phase.name or number} has a `mix` with {', '.join(unknown)}, data.mix has "
                    f"{', '.join(self.data.mix) or 'nothing'}"
                )
            amounts = {name: one.amount for name, one in self.data.mix.items()} | changes
            if amounts and not any(amounts.values()):
                raise ValueError(f"phase {phase.name or number} has a `mix` in which every data set has 0")
        return self

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolution classes that are encoded, ascending."""
        if self.encode.resolutions is not None:
            return tuple(sorted(set(self.encode.resolutions)))
        return tuple(sorted({r for phase in self.curriculum.phases for r in phase.resolutions}))


# What changes a training run's numbers; the rest (where it runs, how often it logs or saves) may differ on resume.
# Model and data are held to by fingerprint and digest, so that a path may change.
_IDENTITY_SECTIONS = ("stage", "curriculum", "objective", "optim")
_IDENTITY_KEYS = {
    "data": ("where", "held_out", "max_held_out", "weights", "caption_weights", "mix"),
    "engine": ("precision",),
    "train": ("steps", "seed"),
}


def training_identity(config: Config) -> dict[str, Any]:
    """The part of `config` that a resumed run must share with the run it continues, flattened to dotted keys."""
    tree = config.model_dump(mode="json")
    picked: dict[str, Any] = {name: tree[name] for name in _IDENTITY_SECTIONS}
    picked["optim"] = {**tree["optim"], "order_of_groups": list(config.optim.groups)}  # the first that finds, takes
    for section, keys in _IDENTITY_KEYS.items():
        picked[section] = {key: tree[section][key] for key in keys}
    for mixed in picked["data"]["mix"].values():
        del mixed["path"]
    phases = [
        {**phase, "resolutions": dict(sorted(phase["resolutions"].items()))} for phase in tree["curriculum"]["phases"]
    ]
    for phase in phases:
        # How a batch is cut or recomputed moves rounding only, and must be free to change when a phase does not fit
        # into memory.
        del phase["micro_batch_tokens"], phase["activation_checkpointing"], phase["name"]
    picked["curriculum"] = {str(index): phase for index, phase in enumerate(phases)}
    return flatten(picked)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def stable_hash(value: Any, digits: int = 16) -> str:
    """sha256 of canonical JSON, shortened to `digits` hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
