"""What pictures, captions, pairs, edits and prompts are read from: one model per file of `producers/sources`."""

from __future__ import annotations

import keyword
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from qwenimg_dist.config.section import Section

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
    label_columns: LabelColumns = Field(default_factory=dict)
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
    retry_missing: bool = False
    """Ask again for URLs whose server said that there is no such picture (404, or no such object), once per `produce`:
    for those that may have been uploaded since. Costs a request each, and every unit that has one is gone through
    again. Pictures that could not be reached are always asked for again."""
    caption_columns: dict[str, str] | None = None
    """Several kinds of captions, drawn by `data.caption_weights`: kind -> its column, for example `{raw: text,
    recaption: llava}` (columns)."""
    label_columns: LabelColumns = Field(default_factory=dict)
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
    label_columns: LabelColumns = Field(default_factory=dict)
    """Labels that the source gives, for `where` and `data.weights`: name -> its key in the `.json` member, or a list of
    keys that name themselves. Text becomes the index column `label_<name>`, numbers `score_<name>`. Changed labels list
    their rows anew and encode nothing."""
    retry_missing: bool = False
    """Ask again, once per `produce`, for pictures of tars in a bucket that were not there: for a tar that was removed
    and put back as it was (of one that was written anew, all pictures are asked for by themselves). Costs a request
    each, and every unit that has one is gone through again; each such `produce` gives it a further part."""


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
    retry_missing: bool = False
    """Ask again for URLs whose server said that there is no such picture (404, or no such object), once per `produce`:
    for those that may have been uploaded since. Costs a request each, and every unit that has one is gone through
    again. Pictures that could not be reached are always asked for again."""


class EditsSource(Section):
    """Source pictures, instruction and target in `.jsonl` or `.parquet` files; pictures as for `pairs`."""

    kind: Literal["edits"]
    path: str | None = None
    """A file, or a folder of files."""
    source_columns: tuple[str, ...] = Field(default=("source",), min_length=1)
    """Each with a picture or a list of pictures; their order is that of the conditions."""
    instruction_column: str = "instruction"
    """A string, or a list of strings for several wordings."""
    instruction: str | None = None
    """One instruction for every row, in the place of a column. `''` is none at all: the pictures alone are what the
    target is made from, as in reconstruction (I2I), whose `source_columns` may be the target's own column."""
    target_column: str = "target"
    max_sources: PositiveInt = 4
    """Rows with more source pictures are refused."""
    meta_columns: tuple[str, ...] = ()
    """Columns kept as JSON with each sample."""
    root: str | None = None
    """What relative uris are relative to; `None` is the folder of the files."""
    retry_missing: bool = False
    """Ask again for URLs whose server said that there is no such picture (404, or no such object), once per `produce`:
    for those that may have been uploaded since. Costs a request each, and every unit that has one is gone through
    again. Pictures that could not be reached are always asked for again."""


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
