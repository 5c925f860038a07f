"""What stages after pretraining are configured by: the weights that they start from, and their objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from qwenimg_dist.config.curriculum import FlowConfig, FlowMatchingConfig
from qwenimg_dist.config.section import Section


class StartFromConfig(Section):
    """The weights that a stage starts from, in the place of `model.path`'s own transformer."""

    path: str | None = None
    """A run directory, one of its checkpoints, or an exported pipeline; `start_from=PATH` is the same for short. Each
    rank reads its own ranges, whatever number of ranks wrote them: no export is needed between stages, and 4 bytes per
    parameter are read in all. `None` is `model.path`'s transformer."""
    step: PositiveInt | None = None
    """Checkpoint of the run; `None` takes its newest valid one when this run starts, and keeps to it."""
    weights: Literal["ema", "raw"] = "ema"
    """Which of a checkpoint's weights. The average is what was evaluated; raw ones go on where AdamW was. Of an export
    it says nothing: that has only one."""


def _path_alone(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) or given is None else given


StartFrom = Annotated[StartFromConfig, BeforeValidator(_path_alone)]


class DpoConfig(FlowConfig):
    """Diffusion-DPO for flow matching. The reference is what the run starts from."""

    kind: Literal["dpo"]
    """Which objective this is."""
    beta: PositiveFloat = 2000.0
    """How sharply differences of errors count. It belongs to errors that are *means* over a latent's elements and to
    the factor 1/2 in front: published values of this form are 100 to 5000. With sums and without the factor, as papers
    also write it, the same strength is `beta_mean = 2 elements beta_sum`. Too small a beta lets the model drift until
    it collapses, too large a one learns only until a pair is told apart."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the winner's own flow-matching error beside the preference loss: holds the winner's error down where it
    rises, and pulls towards the winners' data. Costs nothing."""
    reference: Literal["precomputed", "online"] = "precomputed"
    """`precomputed`: before the first step a pass of the ranks computes the reference's errors at `draws` of every
    pair, 2 x draws forwards of each; no second model is held, so memory is that of finetuning. It is resumable and
    kept (`reference_path`). `online`: a second, frozen, sharded model beside the trained one (2 bytes per parameter
    over all ranks in bf16), and two forwards more per pair and step, a third of the step."""
    draws: PositiveInt | None = 4
    """Draws of noise and sigma per pair, of which every visit takes one; their sigmas share the density's quantiles
    evenly. More see more of the pair, and cost the pass in proportion. `null` draws anew at every visit, which only
    `reference=online` can."""
    reference_path: str | None = None
    """Folder for the precomputed errors; `None` keeps them in the run directory. Runs from the same weights on the same
    data and draws, whatever their beta and rate, may share one: the second finds them done."""
    winner_tolerance: NonNegativeFloat = 0.02
    """Relative: a warning is printed when the winner's error stays so far above the reference's, averaged over logged
    steps. The model then unlearns good and bad pictures alike: stop earlier, lower the rate, or raise `sft_weight`."""

    @model_validator(mode="after")
    def _what_pairs_allow(self) -> DpoConfig:
        if self.posterior != "mode" or self.weighting != "none":
            raise ValueError("pairs are trained on the posterior's mode, unweighted: posterior=mode weighting=none")
        if self.draws is not None and self.sigma_stratified:
            raise ValueError(
                "`sigma_stratified` is of new draws; `draws` of a pair are spread evenly already: set it false"
            )
        if self.reference == "precomputed" and self.draws is None:
            raise ValueError("`draws=null` draws anew at each visit: give a number, or reference=online")
        if self.reference == "precomputed" and self.caption_dropout:
            raise ValueError(
                "precomputed errors are of each pair's own prompt: set caption_dropout=0, or reference=online"
            )
        return self


class GrpoConfig(FlowConfig):
    """Flow-GRPO: pictures that the model draws, judged by rewards (`reward`). The keys of sigma are for validation."""

    kind: Literal["grpo"]
    """Which objective this is."""
    group_size: int = Field(default=16, ge=2)
    """Pictures per prompt, whose rewards are compared with each other. `global_batch` counts prompts: a step draws
    global_batch x group_size pictures. Larger groups judge more surely and cost in proportion."""
    aspects: tuple[str, ...] = ("1:1",)
    """Aspect ratios (width:height) of the pictures drawn, at the curriculum's resolutions: steps have their shapes in
    turn, each for all ranks and groups, so that over epochs a prompt is drawn in all of them. What is trained in one
    shape alone need not carry over to others; compiled blocks see each shape once."""
    num_steps: int = Field(default=10, ge=2)
    """Steps of a rollout's sampler, a forward each (of twice the rows with guidance). Far fewer than for good pictures
    do, since rewards only compare; most of a step's time goes here."""
    guidance: PositiveFloat = 4.0
    """Guidance of rollouts, against the empty prompt, and trained through; 1 is off. With it every forward, the
    trained ones too, has twice the rows. The better the pictures of rollouts, the less there is to be learnt from
    them, and without guidance a large model's are poor."""
    noise_level: PositiveFloat = 1.2
    """a of the SDE's noise, a sqrt(sigma / (1 - sigma)). More explores more; too much spoils the pictures."""
    window: PositiveInt = 2
    """Steps of the sampler that are stochastic and trained on, in a row, drawn anew at every step and the same for all
    pictures of it; the others are the ODE's. Each costs a forward and a backward per update."""
    window_within: PositiveInt = 5
    """The window lies within so many first steps, where the picture's composition is decided. The last step is never
    stochastic."""
    inner_updates: PositiveInt = 1
    """Optimiser updates per step, each over all of its pictures and window. The first is on the policy that drew them
    (ratio 1); further ones learn more from the same rollouts, as far as `clip` lets them. The rate is that of the
    step, and so is everything else that counts steps."""
    clip: PositiveFloat = 1e-4
    """How far a ratio may leave 1 before its gradient is cut. Tiny, because log-probabilities are means over a
    picture's elements."""
    advantage_clip: PositiveFloat = 5.0
    """Bound of a picture's advantage, in standard deviations of its group."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the divergence from the model that the run starts from. Above 0 a second, frozen, sharded model is
    held (2 bytes per parameter over all ranks in bf16) and asked once per window step in every rollout. Holds back
    reward hacking, and learning."""
    share_noise: bool = False
    """The pictures of a group begin at one noise, so that only the window tells them apart: steadier gradients, less
    spread of rewards."""
    reward_timeout_s: PositiveFloat = 300.0
    """A rank waits so long for the rewards of its pictures after it has drawn the last of them. What is missing then is
    counted and left out of its groups; a reward that hangs is not asked again until it has come back."""
    max_failed_rounds: PositiveInt = 3
    """So many steps in a row without a single reward end the run."""
    group_grid_every: NonNegativeInt = 20
    """Steps between grids of the best and the worst picture of some groups (`samples/step-NNNNNNNN-groups.png`); 0
    turns them off."""

    @model_validator(mode="after")
    def _what_rollouts_allow(self) -> GrpoConfig:
        if self.posterior != "mode" or self.weighting != "none" or self.caption_dropout:
            raise ValueError(
                "rollouts have no latents and keep their prompts: posterior=mode weighting=none caption_dropout=0"
            )
        if self.window > self.window_within:
            raise ValueError(
                f"a `window` of {self.window} steps does not lie within `window_within`={self.window_within}"
            )
        if self.window_within >= self.num_steps:
            raise ValueError(
                f"`window_within`={self.window_within} reaches the last of `num_steps`={self.num_steps}, which cannot "
                "be stochastic: lower it, or take more steps"
            )
        return self


ObjectiveConfig = Annotated[FlowMatchingConfig | DpoConfig | GrpoConfig, Field(discriminator="kind")]
