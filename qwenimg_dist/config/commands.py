"""Where a command runs and where it writes: cluster, logger, directories, and the commands' own settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from qwenimg_dist.config.post_training import StartFrom, StartFromConfig
from qwenimg_dist.config.section import Section


class LoggerConfig(Section):
    """`metrics.jsonl` is always written; W&B besides."""

    wandb: Literal["online", "offline", "off"] = "off"
    project: str = "qwenimg-dist"
    group: str | None = None
    name: str | None = None
    every_rank: bool = False
    """Every rank writes `RUN/logs/rank-NNNNN.jsonl`: per step the seconds of each stage, its messages, how it ended.
    Shows the one rank that is slow; costs a small write per rank and step on the run's storage."""


class ClusterConfig(Section):
    ranks: PositiveInt = 1
    """ZeRO-3 ranks of `train`."""
    producers: PositiveInt = 1
    """Producer actors of `produce`."""
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_rank: PositiveFloat = 1
    cpus_per_producer: PositiveFloat = 1
    gpus_per_producer: NonNegativeFloat = 0
    """0 encodes on the CPUs, also with `device=cuda`: training keeps all GPUs, and each producer is far slower."""
    loaders_per_producer: NonNegativeInt = 0
    """CPU processes that read, decode, filter and resize for each producer, on its machine; the producer itself then
    only encodes, and `produce` works on as many units at a time as there are loaders. 0: a producer does all of it.
    Gains where a GPU waits for its producer's CPUs: Pillow's threads share one interpreter, processes do not, and a
    picture that crashes its decoder no longer takes the loaded models along. Costs `cpus_per_loader` and some 0.5 GB of
    memory each, and up to 160 MB each in Ray's object store (pixels wait there, two batches per loader at most).
    Filters with a model then run on the loaders' CPUs: with heavy ones (`aesthetic`, `similarity`) 0 may be faster."""
    cpus_per_loader: PositiveFloat = 1
    """Also its decoding threads."""
    elastic: bool = False
    """`run`: once the source is exhausted, the gang saves, ends, and goes on with the producers' places as further
    ranks. Costs one save, one start, and rounding that differs from then on. Off, these places lie idle."""
    max_ahead_bytes: PositiveInt | None = None
    """Producers begin no further unit while so many bytes of committed units wait to be trained on: in `run`, and in a
    `produce` that has `run.path` set to the run that follows it. Bounds the disk that a stalled training fills; nothing
    is deleted. Less than a few units per producer makes training wait; it never stands still for it, since a waiting
    run is always produced for. `None` never holds them back."""
    address: str | None = None
    """Ray address (`auto` inside a submitted job); `None` starts a Ray here, which ends with the command."""
    unit_retries: NonNegativeInt = 3
    """Tries of one unit after its actor died."""
    unit_timeout_s: PositiveFloat = 3600
    """An actor that has not answered for so long is replaced."""
    max_poison_rows: NonNegativeInt = 8
    """Pictures of one unit that may kill the process which opens them; more, and `produce` stops and says so."""
    max_restarts: NonNegativeInt = 3
    """Restarts of the training gang from one and the same checkpoint: each new one allows as many again. Machines that
    were taken away (preemption) do not count. `torchrun` has its own count, over the whole life of a command."""
    rank_wait_s: PositiveFloat | None = 3600
    """How long a gang without room for all its ranks is waited for, such as a lost machine's replacement; then the run
    ends (exit code 1) and gives the others' GPUs back. They stand still meanwhile: less costs less where nobody mends
    machines at night. `None` waits for ever."""
    reward_actors: NonNegativeInt = 0
    """Ray actors that judge the ranks' pictures; 0 judges in a process beside each rank, on the rank's CPUs (and its
    GPU, with `reward.device=cuda`). Each loads all rewards."""
    cpus_per_reward_actor: PositiveFloat = 1
    gpus_per_reward_actor: NonNegativeFloat = 0
    """A share, such as 0.25, puts several on one GPU; training needs a whole one per rank."""
    reward_env: dict[str, Any] | None = None
    """Ray runtime environment of these actors, such as `{pip: [PACKAGE]}`, for rewards that need other packages than
    training has. It must have this package too."""
    peak_tflops: PositiveFloat | None = None
    """Dense bf16 TFLOP/s of one rank's device, what `train/mfu` is measured by; `None` takes the data sheet's of GPUs
    that are known by name (`plan` an H100's). Costs nothing; a measured matrix rate instead gives the share of what can
    be reached."""
    gpus_per_node: PositiveInt = 8
    """Ranks that share a node, for `plan`: what travels within it, and what a node's memory must hold."""
    device_memory_gib: PositiveFloat | None = None
    """Memory of one GPU (on CPUs: what a rank may take), which `plan` holds its sum against; `None` compares nothing.
    Ranks on GPUs ask the GPU itself before they load the weights."""
    host_memory_gib: PositiveFloat | None = None
    """Memory of one node, for `plan` likewise."""
    intra_node_gbps: PositiveFloat = 3600
    """Gbit/s that one GPU takes in from others of its node (NVLink, one direction), for `plan`."""
    inter_node_gbps: PositiveFloat = 400
    """Gbit/s of the network per GPU, between nodes (a node's adapters divided by its GPUs, one direction), for
    `plan`."""

    @property
    def producer_cpus(self) -> float:
        """What one producer reserves, with its loaders."""
        return self.cpus_per_producer + self.loaders_per_producer * self.cpus_per_loader

    @property
    def object_store_bytes(self) -> int:
        """What all actors may have in Ray's object store: messages, and of each loader and its encoder two batches
        of pictures and one of text features (at the defaults of `encode` and the 20 B model's width)."""
        return (128 + 160 * self.producers * self.loaders_per_producer) * 1024**2

    @property
    def reward_cpus(self) -> float:
        """What all reward actors reserve."""
        return self.reward_actors * self.cpus_per_reward_actor


class PlanConfig(Section):
    """What `plan` assumes where there is nothing to look at, and what it and the check before a run let pass."""

    headroom: float = Field(default=0.08, ge=0, lt=1)
    """Share of a GPU's memory that must stay free: CUDA's context and NCCL's buffers (1 to 3 GB), fragmentation, and
    the 2 % by which the sum is off. Lower fits more, and may end a run at its first large batch."""
    force: bool = False
    """Go on although the sum says that it cannot fit: `plan` then ends with exit code 0, `train` begins."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Share of the peak that a step's useful FLOPs reach; `None` takes what an H200 gave on 16 blocks
    (`tests/bench/gpu.py`): 0.25 eager, 0.4 compiled. Recomputation is counted besides."""
    network_efficiency: float = Field(default=0.8, gt=0, le=1)
    """Share of the links' rate that large collectives reach; an assumption."""
    encode_mfu: float = Field(default=0.25, gt=0, le=1)
    """Share of the peak that producers' encoders reach on GPUs; an assumption."""
    cpu_gflops: PositiveFloat = 40
    """GFLOP/s of one CPU in the encoders, for producers without GPUs; an assumption (the VAE in fp32 reached 86 on one
    core of a server; bf16 is slower on CPUs without instructions for it)."""
    decoded_per_cpu_s: PositiveFloat = 12
    """Pictures that one CPU decodes, judges and resizes per second, all classes together; an assumption (photographs of
    two million pixels or so; larger ones take longer)."""
    images: PositiveInt = 1_000_000
    """Rows of the data set, where `data.path` names none."""
    text_tokens: PositiveInt = 150
    """Tokens of the mean caption, likewise."""
    captions: PositiveFloat = 1.0
    """Captions per picture, likewise."""
    probe: bool = False
    """Start `cluster.ranks` ranks here and time a few real steps of every phase (random weights, random batches) in the
    place of the assumed `mfu`. Costs a start of the ranks and some steps of each."""
    probe_steps: PositiveInt = 3
    """Micro-batches that are timed per phase and resolution, after one that is not; the median counts."""


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
    """One prompt per line, or a `.jsonl` with the key `prompt` and what rewards need besides; after `prompts`. `text`
    is a set that comes with the package: prompts that quote what is to be written, English and Chinese."""
    out: str | None = None
    """The grid, a PNG file. `None` is `grid.png` in the run directory that is drawn from, `NAME-grid.png` beside an
    export NAME, and `grid.png` in the current folder where the model is none of both. What is there is replaced."""
    images: tuple[str, ...] = ()
    """Condition pictures: every prompt is an instruction about all of them, in this order, for a model that was trained
    on edits. An empty prompt reconstructs. `encode.edit` says at which sizes text encoder and VAE see them."""
    cells: str | None = None
    """Folder for the single pictures; `None` writes the grid only."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Every prompt is drawn once per seed."""
    height: PositiveInt | None = None
    """px; `None` is the highest resolution class of the curriculum, with `images` in the last one's shape."""
    width: PositiveInt | None = None
    num_steps: PositiveInt
    guidance: PositiveFloat
    negative_prompt: str
    enhance: bool = False
    """Rewrite the prompts by `models/prompt_enhance.py`, and take its recommended negative prompt where none is given.
    The grid keeps the prompts as they were written."""
    columns: PositiveInt


class EvalConfig(Section):
    """What `eval` puts beside what. Pictures are drawn as `sample` says, judged as `reward` says, held-out losses
    measured as `evaluate` says; where it runs is `cluster`."""

    path: str | None = None
    """The model that is judged: a run directory, one of its checkpoints, or an export. `None` is `run.path`."""
    step: PositiveInt | None = None
    """Checkpoint of the run; `None` is the newest valid one."""
    weights: Literal["ema", "raw"] = "ema"
    """Which of a checkpoint's weights."""
    against: StartFrom = StartFromConfig()
    """What it is compared with, as `start_from` names weights (`eval.against=PATH` for short). Without a path, what it
    started from by its lineage; that must still be there."""
    losses: bool = True
    """Held-out losses of both on the same frozen samples, noise and sigmas. They need the data set that the run was
    trained on (or another one: `data.path`), and cost as much as one evaluation of a training run for each model."""
    shown: PositiveInt = 24
    """Pictures of each model in the grids of the page; all are drawn, judged and kept."""
    out: str | None = None
    """Folder of the result; `None` is a folder in the run directory, named by all that decides the numbers. What is
    there of the same comparison is not done again, what is of another one is refused."""


class DemoConfig(Section):
    """The demo's own sizes; all else stands in `stage=demo`."""

    path: str
    """Folder for everything the demo makes."""
    num_images: PositiveInt
    """Good pictures in the generated folder; the junk comes besides."""
    seed: NonNegativeInt
    early_step: PositiveInt = 500
    """`demo-post` goes on from this step of the demo: few enough that about half of its pictures are wrong."""
    sft_steps: PositiveInt = 40
    dpo_steps: PositiveInt = 20
    grpo_steps: PositiveInt = 20
    """Length of the stages of `demo-post`."""
    pair_seeds: PositiveInt = 8
    """Pictures per prompt, of which the best and the worst make a pair."""


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


class DoctorConfig(Section):
    """How `doctor` looks."""

    timeout_s: PositiveFloat = 60
    """A node or rank that has not answered a check for so long is told as a failure; ranks have twice as long to
    start."""
    speed_mb: NonNegativeInt = 256
    """Written and synced into shared storage to see how fast it is; removed again. 0 writes a nonce only."""
    clock_skew_s: PositiveFloat = 1.0
    """By how much a node's clock may be off before it is told."""
