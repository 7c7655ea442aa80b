"""Conversion of Hugging Face model folders (config.json and safetensors) to run folders and back, without transformers.

Reading order: family_description (what a model family provides), rules (which tensors correspond), llama (a family),
known_families, source (an opened folder; fused_megatron/weight_files.py reads its bytes), import_model, leftovers,
export_model.
"""

from fused_megatron.hugging_face.import_model import load_model

__all__ = ["load_model"]
