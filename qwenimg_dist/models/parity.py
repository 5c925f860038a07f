"""How far our call of the transformer is from stock diffusers': the same inputs through both, and the difference.

Place in the flow: `consumers/certificate.py` asks for it at a run's start and writes the answer into every checkpoint.
The stock side is not a rendering of the pipeline but the pipeline: its `_pack_latents` packs, its own loop makes
`img_shapes`, `timestep / 1000` and the mask for one step, and what its transformer answered is unpacked by its
`_unpack_latents`. Only the transformer is put in its place, which may be a ZeRO-3 engine: then a call is collective and
all ranks make the same calls.

Three cases, all of them not square, so that swapped height and width show:

    unmasked   two samples, texts of one length                            -> one call of each side, the same inputs
    masked     two samples, texts of two lengths, padded, mask             -> one call of each side, the same inputs
    trimmed    two samples with two sigmas, padded, mask, on our side      -> the pipeline gets each alone, unpadded

Of a run on edits two more, each with two condition pictures of two sizes, against `QwenImageEditPlusPipeline`, which
takes one sample at a time (its VAE is left out too: it is handed the conditions' latents):

    edit          one sample                                               -> one call of each side, the same inputs
    edit_trimmed  two samples with two sigmas, padded, mask, on our side   -> the pipeline gets each alone, unpadded

Padding holds values far louder than the text, so that a mask that is not honoured shows. Sigmas are powers of two,
which bf16 holds exactly also as thousandths; others would be rounded twice on one side. Refuses to judge: tolerances
are given with the differences.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch

HEIGHT: Final = 96
WIDTH: Final = 160
CONDITIONS: Final = ((64, 96), (96, 64))
"""(height, width) of an edit's condition pictures, px: multiples of 32 and of one area, as the pipeline makes them."""
_LONG, _SHORT = 11, 5
_SIGMAS: Final = {"unmasked": (0.25, 0.25), "masked": (0.125, 0.125), "trimmed": (0.5, 1.0)}
_EDIT_SIGMAS: Final = {"edit": (0.25,), "edit_trimmed": (0.5, 1.0)}
_TRIMMED: Final = ("trimmed", "edit_trimmed")
_LOUD: Final = 30.0
_SEED: Final = 20_251_231

# Of the largest |velocity|. The same inputs give the same numbers but for the order of sums; padding changes shapes, so
# it rounds otherwise, and over 60 blocks bf16's 2^-8 adds up. A wrong call is off by far more, see the tests.
_SAME: Final = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
_ROUNDED: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

Predict = Callable[..., torch.Tensor]
"""Ours: noisy (B,16,h,w), sigma (B,), text (B,T,D), mask, and an edit's conditions -> velocity (B,16,h,w) fp32."""
Answers = dict[str, torch.Tensor]
"""Case -> velocity (B,16,h,w) fp32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The inputs of one case; texts are padded where their lengths differ."""

    noisy: torch.Tensor
    sigma: tuple[float, ...]
    text: torch.Tensor
    lengths: tuple[int, ...]
    conditions: tuple[torch.Tensor, ...] = ()
    """(B,16,h_i,w_i) each."""

    @property
    def mask(self) -> torch.Tensor | None:
        if len(set(self.lengths)) == 1:
            return None
        return torch.arange(self.text.shape[1])[None, :] < torch.tensor(self.lengths)[:, None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One case: the largest absolute difference of two velocities, and what it may be at most."""

    case: str
    max_difference: float
    max_velocity: float
    """Of the stock answer; differences are judged by their share of it."""
    tolerance: float
    """Of `max_velocity`."""
    exact: bool
    """Whether both sides computed the same from the same inputs, so that no rounding explains a difference."""

    @property
    def within(self) -> bool:
        """Whether it is small enough; not a number is not."""
        return self.max_difference <= self.tolerance * self.max_velocity

    @property
    def may_be_rounding(self) -> bool:
        """Whether rounding is thinkable; of what is not a number it is not."""
        return not self.exact and math.isfinite(self.max_difference)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes a string, since JSON has no word for it."""
        plain = {k: v if not isinstance(v, float) or abs(v) < float("inf") else str(v) for k, v in asdict(self).items()}
        return {**plain, "within": self.within}


def probes(text_width: int, *, edits: bool = False) -> dict[str, Probe]:
    """The cases, the same ones at every call; `text_width` is D of the text features, with `edits` theirs besides."""
    generator = torch.Generator().manual_seed(_SEED)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made = {}
    for case, sigma in _SIGMAS.items():
        lengths = (_LONG, _LONG) if case == "unmasked" else (_LONG, _SHORT)
        text = draw(2, _LONG, text_width)
        text[1, lengths[1] :] *= _LOUD
        made[case] = Probe(noisy=draw(2, 16, HEIGHT // 8, WIDTH // 8), sigma=sigma, text=text, lengths=lengths)
    for case, of_edit in _EDIT_SIGMAS.items() if edits else ():
        num = len(of_edit)
        text = draw(num, _LONG, text_width)
        text[1:, _SHORT:] *= _LOUD
        made[case] = Probe(
            noisy=draw(num, 16, HEIGHT // 8, WIDTH // 8),
            sigma=of_edit,
            text=text,
            lengths=(_LONG, _SHORT)[:num],
            conditions=tuple(draw(num, 16, height // 8, width // 8) for height, width in CONDITIONS),
        )
    return made


def pipeline_of(case: str) -> str:
    """Name of the stock pipeline that a case is compared with."""
    return "QwenImageEditPlusPipeline" if case in _EDIT_SIGMAS else "QwenImagePipeline"


def our_answers(predict: Predict, cases: Mapping[str, Probe], *, dtype: torch.dtype, device: torch.device) -> Answers:
    """What our call path makes of the cases. Collective where `predict` is."""
    return {
        case: predict(
            probe.noisy.to(device),
            torch.tensor(probe.sigma, device=device),
            probe.text.to(device, dtype),
            None if probe.mask is None else probe.mask.to(device),
            *([[one.to(device) for one in probe.conditions]] if probe.conditions else []),
        )
        .float()
        .cpu()
        for case, probe in cases.items()
    }


def stock_answers(
    transformer: Callable[..., Any], cases: Mapping[str, Probe], *, dtype: torch.dtype, device: torch.device
) -> Answers:
    """What the stock pipeline makes of them with `transformer` (a module, or an engine around it; then collective)."""
    answers = {}
    for case, probe in cases.items():
        if case in _TRIMMED:
            alone = [_alone(probe, index) for index in range(len(probe.lengths))]
            answers[case] = torch.cat([_stock_velocity(transformer, one, dtype, device) for one in alone])
        else:
            answers[case] = _stock_velocity(transformer, probe, dtype, device)
    return answers


def differences(ours: Answers, stock: Answers, *, dtype: torch.dtype, same_module: bool) -> list[Difference]:
    """Case by case. `same_module`: both sides called one module, so that equal inputs must give equal numbers."""
    found = []
    for case, answer in stock.items():
        exact = same_module and case not in _TRIMMED
        found.append(
            Difference(
                case=case,
                max_difference=float((ours[case] - answer).abs().max()),
                max_velocity=float(answer.abs().max()),
                tolerance=(_SAME if exact else _ROUNDED)[dtype],
                exact=exact,
            )
        )
    return found


def _alone(probe: Probe, index: int) -> Probe:
    length = probe.lengths[index]
    return Probe(
        noisy=probe.noisy[index : index + 1],
        sigma=(probe.sigma[index],),
        text=probe.text[index : index + 1, :length],
        lengths=(length,),
        conditions=tuple(one[index : index + 1] for one in probe.conditions),
    )


class _Seat:
    """Sits where the pipeline has its transformer, passes its call on and keeps the answer."""

    def __init__(self, transformer: Callable[..., Any], device: torch.device) -> None:
        self._transformer = transformer
        self._device = device
        self.config = SimpleNamespace(in_channels=64, guidance_embeds=False)
        self.answer: torch.Tensor | None = None

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        yield

    def __call__(self, **kwargs: Any) -> tuple[torch.Tensor]:
        # The pipeline takes its device from its modules, and has none here: it works on the CPU.
        moved = {k: v.to(self._device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        self.answer = self._transformer(**moved)[0].cpu()
        return (self.answer,)


def _stock_velocity(
    transformer: Callable[..., Any], probe: Probe, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(B,16,h,w) fp32: one step of the stock pipeline; what its transformer was asked and what it answered."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    seat = _Seat(transformer, device)
    # A scheduler without shift: its sigma is the one that is given.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline: Any
    if probe.conditions:
        pipeline, pictures = _edit_pipeline(scheduler, seat, probe)
    else:
        pipeline, pictures = QwenImagePipeline(scheduler, None, None, None, seat), {}
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, height, width = probe.noisy.shape
    with _area_of_conditions():
        pipeline(
            prompt_embeds=probe.text.to(dtype),
            prompt_embeds_mask=torch.ones(probe.text.shape[:2]) if probe.mask is None else probe.mask,
            latents=pipeline._pack_latents(probe.noisy[:, None], batch, channels, height, width),
            height=HEIGHT,
            width=WIDTH,
            sigmas=[probe.sigma[0]],
            num_inference_steps=1,
            true_cfg_scale=1.0,
            output_type="latent",
            **pictures,
        )
    if seat.answer is None:
        raise RuntimeError("the stock pipeline did not call its transformer")
    target = seat.answer[:, : height * width // 4]  # behind it stands what the model says of the conditions
    velocity: torch.Tensor = pipeline._unpack_latents(target.float(), HEIGHT, WIDTH, 8)
    return velocity[:, :, 0]


def _edit_pipeline(scheduler: Any, seat: _Seat, probe: Probe) -> tuple[Any, dict[str, Any]]:
    """The stock edit pipeline with the conditions' latents in its VAE's place, and its words for their pictures."""
    from diffusers import QwenImageEditPlusPipeline
    from PIL import Image

    latents = iter(probe.conditions)

    class WithoutVae(QwenImageEditPlusPipeline):  # type: ignore[misc]
        def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
            encoded = next(latents)[:, :, None].to(image.dtype)
            if encoded.shape[3:] != (image.shape[3] // 8, image.shape[4] // 8):
                raise RuntimeError(f"the stock edit pipeline made a condition of {tuple(image.shape[3:])} px")
            return encoded

    pictures = [Image.new("RGB", (width, height)) for height, width in CONDITIONS]
    return WithoutVae(scheduler, None, None, None, None, seat), {"image": pictures}


@contextlib.contextmanager
def _area_of_conditions() -> Iterator[None]:
    """The edit pipeline brings pictures to 1024^2 px, a module's constant: thousands of tokens that would show no more
    than few do."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

    before = stock.VAE_IMAGE_SIZE
    stock.VAE_IMAGE_SIZE = CONDITIONS[0][0] * CONDITIONS[0][1]
    try:
        yield
    finally:
        stock.VAE_IMAGE_SIZE = before
