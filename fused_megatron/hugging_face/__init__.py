"""Conversion of Hugging Face model folders (config.json and safetensors) to run folders and back, without transformers.

Reading order: family_description (what a model family provides), rules (which tensors correspond), llama (a family),
known_families, source (an opened folder; fused_megatron/weight_files.py reads its bytes), import_model, leftovers,
export_model.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fused_megatron.hugging_face.import_model import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> object:
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fused_megatron.hugging_face.import_model import load_model  # noqa: PLC0415 - a config.json needs no torch

    return load_model
