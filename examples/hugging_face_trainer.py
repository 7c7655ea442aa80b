"""transformers' Trainer with a model in shards: torchrun --nproc-per-node 2 examples/hugging_face_trainer.py

Three lines differ from a Trainer of one process; numbers mark them. Checkpoints have the full weights, as of one
process: continue on any number of ranks with trainer.train(resume_from_checkpoint=True), and load one with
from_pretrained.
"""

import os
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fused_megatron as fm

world_size = int(os.environ.get("WORLD_SIZE", "1"))
if world_size > 1:
    torch.distributed.init_process_group()  # Trainer would do so, but the mesh comes first
torch.manual_seed(0)  # the same on every rank: the same weights and the same samples
config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
model = LlamaForCausalLM(config)
mesh = fm.init_mesh(tensor_parallel_size=min(2, world_size))  # 1; on 4 ranks tp 2 x dp 2
fm.parallelize(model, mesh)  # 2
starts = torch.randint(64, (64, 1))
data = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 64]
folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(tempfile.gettempdir(), "hugging_face_trainer")
arguments = TrainingArguments(
    folder,
    max_steps=12,
    per_device_train_batch_size=8 // mesh.dp_size,
    learning_rate=1e-2,
    max_grad_norm=1.0,
    logging_steps=3,
    save_steps=6,
    use_cpu=not torch.cuda.is_available(),  # on CPUs Trainer sees other ranks only if it is told
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[fm.TrainerCallback()])  # 3
trainer.train()
trainer.save_model(os.path.join(folder, "final"))
held_out = trainer.evaluate()["eval_loss"]
if trainer.is_world_process_zero():
    print(f"held-out loss {held_out:.5f}")
if world_size > 1:
    torch.distributed.destroy_process_group()
