"""Start here when fm.LightningStrategy trains, clips, saves or loads unlike Lightning on one process."""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

lightning = pytest.importorskip("lightning")

PLAN = {"tokens": "embedding_rowwise", "up": "colwise", "down": "rowwise", "head": "colwise_gather_output"}
SAMPLES = torch.arange(16).unsqueeze(1).add(torch.arange(5)) % 13


class Model(nn.Module):
    def __init__(self, vocab_size=13, hidden_size=6):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.up, self.gelu, self.down = nn.Linear(hidden_size, 8), nn.GELU(), nn.Linear(8, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens):
        x = self.tokens(tokens)
        return self.head(x + self.down(self.gelu(self.up(self.norm(x)))))


class Module(lightning.LightningModule):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model, self.made = model, optimizer
        self.losses, self.held_out = [], []

    def loss(self, tokens):
        return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), (3 * tokens + 1).flatten() % 13)

    def training_step(self, tokens, index):
        loss = self.loss(tokens)
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach().clone())))
        return loss

    def validation_step(self, tokens, index):
        self.log("held_out", self.loss(tokens), sync_dist=True)

    def configure_optimizers(self):
        return self.made


def fits(rank, world_size, folder, name, size=1, zero_stage=None, resumes=None):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    # As torchrun sets them. The process group exists already.
    place |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.manual_seed(0)
    model = Model()
    part, strategy = {"num_replicas": 1, "rank": 0}, "auto"
    if world_size > 1:
        mesh = fm.init_mesh(tensor_parallel_size=size)
        strategy = fm.LightningStrategy(mesh, process_group_backend="gloo")
        part = strategy.distributed_sampler_kwargs
        assert part == {"num_replicas": world_size // size, "rank": rank // size}
        fm.parallelize(model, mesh, PLAN)
    if zero_stage is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        fm.shard_data_parallel(model, mesh, zero_stage)
        optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": world_size, "gradient_clip_val": 0.4}
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    # Lightning's own sampler shuffles where there are several ranks, and only there.
    options |= {"use_distributed_sampler": False}
    trainer = lightning.Trainer(strategy=strategy, default_root_dir=folder, **options)
    module = Module(model, optimizer)
    sampler = DistributedSampler(SAMPLES, **part, shuffle=False)
    loader = DataLoader(SAMPLES, batch_size=4 // part["num_replicas"], sampler=sampler)
    before = trainer.validate(module, loader, verbose=False)[0]["held_out"]
    trainer.fit(module, loader, ckpt_path=resumes)
    after = trainer.validate(module, loader, verbose=False)[0]["held_out"]
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    weights = fm.full_state_dict(model)
    return module.losses, before, after, {name: value.sum().item() for name, value in weights.items()}


def assert_equal_states(found, expected):
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in found["state_dict"].items():
        torch.testing.assert_close(value, expected["state_dict"][name], rtol=1e-4, atol=1e-6)
    moments, others = (each["optimizer_states"][0]["state"] for each in (found, expected))
    assert moments.keys() == others.keys() and len(moments) == 9
    for index, state in moments.items():
        for key, value in state.items():
            torch.testing.assert_close(value, others[index][key], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    (found,) = run_on_ranks(fits, 1, folder, "one", timeout_s=240)
    assert len(found[0]) == 8 and found[2] < found[1]
    return folder, found


LAYOUTS = [
    pytest.param(2, 2, None, marks=pytest.mark.slow),
    (4, 2, None),
    pytest.param(4, 2, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "size", "zero_stage"), LAYOUTS)
def test_losses_and_checkpoints_are_those_of_one_process(one_process, world_size, size, zero_stage):
    folder, expected = one_process
    name = f"{world_size}-{size}-{zero_stage}"
    found = run_on_ranks(fits, world_size, folder, name, size, zero_stage, timeout_s=300)
    for rank in found:
        torch.testing.assert_close(rank[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank[1:3], expected[1:3], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank[3], expected[3], rtol=1e-4, atol=1e-5)
    saved, reference = (torch.load(folder / f"{each}.ckpt", weights_only=False) for each in (name, "one"))
    if zero_stage is None:
        assert_equal_states(saved, reference)
        resumed = run_on_ranks(fits, world_size, folder, "resumed", size, None, folder / "one.ckpt", timeout_s=300)
        assert resumed[0][0] == []  # both epochs are done
        torch.testing.assert_close(resumed[0][2:], expected[2:], rtol=1e-5, atol=1e-6)
        assert_equal_states(torch.load(folder / "resumed.ckpt", weights_only=False), reference)


def other_precision(rank, world_size):
    mesh = fm.init_mesh(pipeline_parallel_size=2)
    with pytest.raises(InputError, match="pipeline_parallel_size=2: Lightning runs whole models"):
        fm.LightningStrategy(mesh)


def test_mistakes_end_in_one_line():
    run_on_ranks(other_precision, 2)
