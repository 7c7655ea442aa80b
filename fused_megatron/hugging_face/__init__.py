"""Models as Hugging Face's transformers keeps them (config.json and safetensors), to and from run folders.

Reading order: family, rules and llama (which configs and names there are, and what they are here), families,
source (a folder opened; fused_megatron/weight_files.py has the bytes), import_model, leftovers, export_model,
command. transformers itself is not needed.
"""

from fused_megatron.hugging_face.import_model import load_model

__all__ = ["load_model"]
