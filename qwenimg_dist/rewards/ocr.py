"""How well a picture shows the text that its prompt quotes, in English and Chinese: 1 - edit distance / length of the
longer, letters and digits alone.

Text that was not asked for counts against a picture, since a model else learns to write it twice. Needs the extra `ocr`
(the models come with it), and runs on the CPU. Refuses to judge a prompt that quotes nothing: NaN with a note, and
`pairs` names the prompt before it draws anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from pydantic import Field, PositiveInt

from qwenimg_dist.models.ocr import OcrEngine, full_text, model_files
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.kind import Judge, Kind, Resources, RewardParams
from qwenimg_dist.text_match import edit_similarity, in_order_of, normalise, quoted_texts, quotes_found


class Params(RewardParams):
    detect_side: PositiveInt = Field(default=736, ge=64)
    """px, long side at which text is looked for."""
    read_side: PositiveInt = Field(default=1536, ge=64)
    """px, long side at which it is read."""
    max_lines: PositiveInt = 48
    """The highest are read."""
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    """What is read below this counts as not there."""
    extra_text: bool = False
    """Whether text that nobody asked for is free; for prompts that quote only some of what is to be seen."""
    text_key: str | None = None
    """Key of the metadata with the text (or a list of texts) that is to be shown; null takes what the prompt quotes."""


def asked_for(prompt: Prompt, params: Params) -> list[str]:
    """The texts that the picture is to show, those without any letter or digit left out."""
    if params.text_key is None:
        return quoted_texts(prompt.text)
    given = prompt.metadata.get(params.text_key)
    texts = given if isinstance(given, list | tuple) else [given]
    return [text for text in texts if isinstance(text, str) and normalise(text)]


def similarity(asked: Sequence[str], shown: str, *, extra_text: bool = False) -> float:
    """0 to 1. Several texts may stand in the picture in any order."""
    if extra_text:
        return quotes_found(asked, shown)
    return edit_similarity("".join(in_order_of(asked, shown)), shown)


def _check(params: Params) -> None:
    model_files()


def _load(params: Params, resources: Resources) -> Judge:
    engine = OcrEngine(
        num_threads=resources.num_threads,
        detect_side=params.detect_side,
        read_side=params.read_side,
        max_lines=params.max_lines,
    )

    def one(image: Image.Image, prompt: Prompt) -> float:
        asked = asked_for(prompt, params)
        if not asked:
            raise ValueError(_refuse(prompt, params))  # NaN for whoever asked, with this as its note
        read = [line for line in engine.read(image) if line.text and line.confidence >= params.min_confidence]
        return similarity(asked, full_text(read), extra_text=params.extra_text)

    def judge(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    return judge


def _refuse(prompt: Prompt, params: Params) -> str | None:
    if asked_for(prompt, params):
        return None
    if params.text_key is not None:
        return f"its metadata has no text in {params.text_key!r} (reward.settings.ocr.text_key)"
    return (
        f"{prompt.text!r} quotes no text: put what the picture is to show between quotation marks, or name a key of "
        "the metadata in reward.settings.ocr.text_key"
    )


REWARD = Kind(params=Params, load=_load, check=_check, refuse=_refuse)
