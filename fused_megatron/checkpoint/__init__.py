"""Checkpoints: named boxes of full tensors, stored in a folder of safetensors files and a JSON manifest.

This room knows no model and no optimizer. Reading order: sharding/box.py (shards), manifest (content of a checkpoint),
shard_file (bytes of a file), save, background_save, load, verify, folder (names, and deletion of old checkpoints).
"""

from fused_megatron.checkpoint.background_save import BackgroundSave
from fused_megatron.checkpoint.errors import CheckpointError
from fused_megatron.checkpoint.folder import checkpoint_step, list_checkpoints
from fused_megatron.checkpoint.load import load_checkpoint, read_tensor
from fused_megatron.checkpoint.manifest import Manifest, read_manifest
from fused_megatron.checkpoint.save import save_checkpoint
from fused_megatron.checkpoint.verify import checkpoint_to_resume, newest_checkpoint, verify_checkpoint
from fused_megatron.sharding.box import StreamedBox, TensorBox

__all__ = [
    "BackgroundSave",
    "CheckpointError",
    "Manifest",
    "StreamedBox",
    "TensorBox",
    "checkpoint_step",
    "checkpoint_to_resume",
    "list_checkpoints",
    "load_checkpoint",
    "newest_checkpoint",
    "read_manifest",
    "read_tensor",
    "save_checkpoint",
    "verify_checkpoint",
]
