"""Cached latents decoded to pictures again: what the model sees of a row, its crop and its colours.

Place in the flow: `data inspect inspect.decode=true` puts these beside the originals. Only latents that were made by
the VAE of `model=...` are decoded: another VAE's would give a wrong picture without an error. Of each row the largest
class it has is taken. Refuses a data set without such latents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from qwenimg_dist.commands.data_inspect_rows import Entries, jpeg_url, read_entries
from qwenimg_dist.config import Config
from qwenimg_dist.data.catalog import Places, TarFile
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.reader import TarReader
from qwenimg_dist.models.identity import latents_facet_names
from qwenimg_dist.models.pipeline import pipeline_dir
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.report.contact_sheet import SheetRow
from qwenimg_dist.schema import IMAGE, Kind

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def with_decoded(dataset: Dataset, config: Config, rows: Sequence[SheetRow]) -> list[SheetRow]:
    """The rows, with the decoded latents of those that have any. Raises `DataError` naming what is there instead."""
    folder = pipeline_dir(config.model, components=("vae",))
    there = set(dataset.facets())
    kind = cast(Kind, rows[0].kind if rows else IMAGE)  # a data set has rows of one kind
    facets = {px: facet for px, facet in latents_facet_names(folder, config, kind).items() if facet in there}
    if not facets:
        others = ", ".join(sorted(facet for facet in there if facet.startswith("latents-"))) or "none"
        raise DataError(
            f"inspect.decode: {dataset.root} has no latents made by model={config.model.name} with these encode "
            f"settings (there is: {others}); give the model=... and encode.... that `produce` was given"
        )
    codec = LatentCodec.load(folder, dtype=_DTYPES[config.encode.compute_dtype], device=config.cluster.device)
    numbers = np.array([row.row for row in rows], dtype=np.int64)
    pictures: dict[int, tuple[str, str]] = {}
    for resolution, facet in sorted(facets.items(), reverse=True):
        todo = numbers[[number not in pictures for number in numbers.tolist()]]
        entries = read_entries(dataset, facet, todo)
        for row, picture in _decoded(dataset, facet, entries, codec, config):
            pictures[row] = (f"{resolution} px", jpeg_url(picture, config.inspect.thumbnail))
    return [replace(row, decoded=pictures[row.row]) if row.row in pictures else row for row in rows]


def _decoded(
    dataset: Dataset, facet: str, entries: Entries, codec: LatentCodec, config: Config
) -> Iterator[tuple[int, Image.Image]]:
    """In batches of one shape, sized as `produce` sizes its own."""
    shapes: defaultdict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries.values():
        shapes[tuple(entry["shape"])].append(entry)
    reader = TarReader()
    try:
        for (_, height, width), of_shape in sorted(shapes.items()):
            count = max(1, config.encode.image_batch_pixels // (64 * height * width))
            for begin in range(0, len(of_shape), count):
                batch = of_shape[begin : begin + count]
                images = codec.decode(torch.stack(_read(dataset, facet, batch, reader)))
                levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
                for entry, pixels in zip(batch, levels.numpy(), strict=True):
                    yield entry["row"], Image.fromarray(pixels)
    finally:
        reader.close()


def _read(dataset: Dataset, facet: str, entries: Sequence[Mapping[str, Any]], reader: TarReader) -> list[torch.Tensor]:
    """The latents (16, h, w) fp32."""
    names = sorted({entry["tar"] for entry in entries})
    sizes = _tar_sizes(dataset, facet, {int(entry["row"]) // dataset.unit_size for entry in entries})
    places = Places(
        tars=[TarFile(path=dataset.tar(facet, name), size_bytes=sizes[name]) for name in names],
        tar=np.array([names.index(entry["tar"]) for entry in entries], dtype=np.int32),
        offset=np.array([entry["offset"] for entry in entries], dtype=np.int64),
        nbytes=np.array([entry["nbytes"] for entry in entries], dtype=np.int64),
        keys=np.array([entry["key"] for entry in entries], dtype=np.bytes_),
    )
    buffers: list[npt.NDArray[np.uint8]] = [np.empty(int(entry["nbytes"]), dtype=np.uint8) for entry in entries]
    reader.read(places, buffers)
    return [
        torch.from_numpy(buffer).view(_DTYPES[entry["dtype"]]).view(*entry["shape"]).float()
        for buffer, entry in zip(buffers, entries, strict=True)
    ]


def _tar_sizes(dataset: Dataset, facet: str, units: set[int]) -> dict[str, int]:
    parts: list[Part] = [part for unit in units for part in dataset.unit_parts(facet, unit)]
    return {tar.name: tar.size_bytes for part in parts for tar in dataset.tars(part)}
