"""Weights and the directories that hold them, under one name.

Reading lies in `safetensors_directory`, writing in `safetensors_export`, finding and fingerprinting a
pipeline in `pipeline`; everything else in the project imports them from here. No pickle is read or written
anywhere.
"""

from qwenimg_dist.models.pipeline import fingerprint_component, resolve_pipeline
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory, TensorEntry, WeightsError, read_header
from qwenimg_dist.models.safetensors_export import TensorSource, verify, write_sharded

__all__ = [
    "SafetensorsDirectory",
    "TensorEntry",
    "TensorSource",
    "WeightsError",
    "fingerprint_component",
    "read_header",
    "resolve_pipeline",
    "verify",
    "write_sharded",
]
