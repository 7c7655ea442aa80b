"""A plain loop whose ranks share weights, gradients and optimizer: torchrun --nproc-per-node 2 examples/sharded_loop.py

Each rank trains on its part of the samples and keeps its rows of everything (ZeRO stage 3). With 4 ranks, two share
every layer, too. Gradients of two microbatches accumulate. The losses equal the losses of plain_loop.py.
"""

import contextlib
import os

import torch
import torch.distributed as dist

import fused_megatron as fm

PLAN = {"tokens": "embedding_rowwise", "up": "colwise", "down": "rowwise", "head": "colwise_gather_output"}


class Model(torch.nn.Module):
    def __init__(self, vocab_size: int = 64, hidden_size: int = 32) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocab_size, hidden_size)
        self.norm = torch.nn.LayerNorm(hidden_size)
        self.up, self.gelu = torch.nn.Linear(hidden_size, 4 * hidden_size), torch.nn.GELU()
        self.down = torch.nn.Linear(4 * hidden_size, hidden_size)
        self.head = torch.nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        return self.head(x + self.down(self.gelu(self.up(self.norm(x)))))


world_size = int(os.environ.get("WORLD_SIZE", "1"))
if world_size > 1:
    dist.init_process_group()
mesh = fm.init_mesh(tensor_parallel_size=2 if world_size > 2 else 1)
torch.manual_seed(0)  # the same on every rank: the same weights
model = Model()
if mesh.tp_size > 1:
    fm.parallelize(model, mesh, PLAN)
fm.shard_data_parallel(model, mesh, zero_stage=3)
optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
for step in range(20):
    tokens = torch.randint(64, (8, 16)).chunk(mesh.dp_size)[mesh.dp_rank]  # this replica's samples
    total = torch.zeros(())
    for i, part in enumerate(tokens.chunk(2)):
        with model.no_sync() if i == 0 else contextlib.nullcontext():
            loss = fm.ops.cross_entropy(model(part).flatten(0, 1), (3 * part + 1).flatten() % 64) / 2
            loss.backward()
        total += loss.detach()
    fm.clip_grad_norm_(model, 100.0)
    optimizer.step()
    optimizer.zero_grad()
    if mesh.dp_group is not None:
        dist.all_reduce(total, group=mesh.dp_group)
    if step % 5 == 4 and mesh.rank == 0:
        print(f"step {step + 1} loss {total.item() / mesh.dp_size:.5f}")
weights = fm.full_state_dict(model, rank0_only=True)  # on every rank; torch.save(weights, ..) on rank 0
assert mesh.rank > 0 or weights["head.weight"].shape == (64, 32)
if world_size > 1:
    dist.destroy_process_group()
