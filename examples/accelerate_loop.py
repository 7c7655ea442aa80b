"""The loop of plain_loop.py with Hugging Face Accelerate: torchrun --nproc-per-node 2 examples/accelerate_loop.py

Four lines differ; numbers mark them. prepare_model(evaluation_mode=True) moves the model to its device and sets up
mixed precision. It leaves DistributedDataParallel out: these ranks share the layers, and their gradients are final.
"""

import os

import torch
from accelerate import Accelerator  # 1

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
accelerator = Accelerator()  # 2, which makes the process group, too
torch.manual_seed(0)  # the same on every rank: the same weights and the same samples
model = Model()
fm.parallelize(model, fm.init_mesh(tensor_parallel_size=world_size), PLAN)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)  # 3
for step in range(20):
    tokens = torch.randint(64, (8, 16)).to(model.norm.weight.device)
    loss = fm.ops.cross_entropy(model(tokens).flatten(0, 1), (3 * tokens + 1).flatten() % 64)
    accelerator.backward(loss)  # 4
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4 and os.environ.get("RANK", "0") == "0":
        print(f"step {step + 1} loss {loss.item():.5f}")
if world_size > 1:
    torch.distributed.destroy_process_group()
