"""ZeRO stage 2 in an Accelerate loop: torchrun --nproc-per-node 2 examples/accelerate_sharded_loop.py

Accelerate shares the samples among the ranks, and counts the microbatches of a step. shard_data_parallel stands in for
the wrapper that prepare(model) would put around the model.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import fused_megatron as fm

accelerator = Accelerator(gradient_accumulation_steps=2)  # makes the process group, too
torch.manual_seed(0)  # the same on every rank: the same weights and the same order of the samples
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)).to(accelerator.device)
fm.shard_data_parallel(model, fm.init_mesh(), zero_stage=2)
optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
x = torch.randn(512, 8)
loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True).sign()), batch_size=16, shuffle=True)
optimizer, loader, scheduler = accelerator.prepare(optimizer, loader, scheduler)
for epoch in range(10):
    total = torch.zeros((), device=accelerator.device)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                fm.clip_grad_norm_(model, 1.0)  # accelerator.clip_grad_norm_ would see one rank's rows
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.detach() / len(loader)
    mean = accelerator.reduce(total, reduction="mean")
    accelerator.print(f"epoch {epoch + 1} loss {mean.item():.5f}")
accelerator.end_training()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
