"""Labels a row by what its captions speak of: general, portrait, text or design.

Rules by words, English and Chinese (`qwenimg_dist/models/prompt_enhance.py`), over all captions that are left. What a
picture shows and no caption says is not seen: combine with scores of pixels where the label is used, for example
`category == 'text' or text_level > 0`.
"""

from __future__ import annotations

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values
from qwenimg_dist.models.prompt_enhance import Category, category_of


class Params(FilterParams):
    reject: tuple[Category, ...] = ()


def score(facts: Facts) -> dict[str, Value]:
    return {"category": category_of("\n".join(facts.captions))}


def admit(values: Values, params: Params) -> Rejection | None:
    if values["category"] in params.reject:
        return Rejection(reason="category", detail=f"{values['category']} is one of reject={list(params.reject)}")
    return None


FILTER = Filter(params=Params, stage=6, looks_at="captions", scores=(), labels=("category",), score=score, admit=admit)
