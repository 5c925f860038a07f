"""Takes away captions of too few or too many tokens, counted by the pipeline's own tokenizer.

Tokens of the caption alone: the encoder adds the template's few. What is longer than `model.max_text_tokens` would be
cut in mid-sentence. Needs `PIPELINE/tokenizer`, and loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import NonNegativeInt, PositiveInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Resources, Scorer, Value, Values, number


class Params(FilterParams):
    min_tokens: NonNegativeInt = 1
    max_tokens: PositiveInt = 512


def load(params: Params, resources: Resources) -> Scorer:
    """Raises ValueError if the pipeline has no tokenizer."""
    from transformers import Qwen2Tokenizer  # a second to import: not by the driver

    folder = resources.pipeline_dir / "tokenizer"
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: filters.caption_length counts by it; give a whole pipeline directory")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)

    def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
        ids = tokenizer([one.captions[0] for one in facts], verbose=False).input_ids
        return [{"caption_tokens": float(len(of_caption))} for of_caption in ids]

    return score


def admit(values: Values, params: Params) -> Rejection | None:
    tokens = number(values, "caption_tokens")
    if tokens < params.min_tokens:
        return Rejection(reason="caption_too_short", detail=f"{tokens:.0f} tokens < min_tokens={params.min_tokens}")
    if tokens > params.max_tokens:
        return Rejection(reason="caption_too_long", detail=f"{tokens:.0f} tokens > max_tokens={params.max_tokens}")
    return None


FILTER = Filter(
    params=Params,
    stage=3,
    looks_at="captions",
    scores=("caption_tokens",),
    load=load,
    per_caption=True,
    admit=admit,
)
