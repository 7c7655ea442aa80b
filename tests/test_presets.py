"""benchmarks/presets: each is built at its real size on the meta device, with a fake group of its real size.

What a rank would hold and send is compared with the papers' formulas, before anyone pays for a GPU hour.
"""

import dataclasses
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.training.config_file import load_config

ROOT = Path(__file__).parents[1]
PRESETS = {path.stem: path for path in sorted((ROOT / "benchmarks" / "presets").glob("*.toml"))}
BILLIONS = {
    "gpt_1.2b_tp1": 1.2, "gpt_2.5b_tp2": 2.5, "gpt_4.2b_tp4": 4.2, "gpt_8.3b_tp8": 8.3,
    "gpt_22b_tp8_sequence_parallel": 22,
}  # fmt: skip
BFLOAT16 = 2
# Weight in bfloat16; gradient, main weight and Adam's two moments in float32.
STATE_BYTES = BFLOAT16 + 4 * 4

SCRIPT = """
import dataclasses, json, sys
import torch, torch.distributed as dist
from pathlib import Path
from torch.testing._internal.distributed.fake_pg import FakeStore
from fused_megatron.models import GPT
from fused_megatron.testing import record_communication
from fused_megatron.training.config_file import load_config

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
groups = {size: dist.new_group(range(size)) if size > 1 else None for size in (1, 2, 4, 8)}

def built(config, num_layers):
    layout = config.parallel
    return GPT(
        dataclasses.replace(config.model, num_layers=num_layers), tp_group=groups[layout.tensor_parallel_size],
        sequence_parallel=layout.sequence_parallel, device=torch.device("meta"), dtype=torch.bfloat16,
    )

def step(config, num_layers):
    model = built(config, num_layers)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}
    def pack(x):
        kept[x.untyped_storage()._cdata] = x
        return x
    shape = config.training.microbatch_size, config.model.seq_len
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
    with record_communication() as ledger:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(tokens, tokens)
        loss.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    kept_bytes = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)
    return {"sent": dict(ledger.num_bytes), "kept": kept_bytes, "loss": list(loss.shape)}

found = {}
for path in map(Path, sys.argv[1:]):
    config = load_config(path, [])
    whole = built(config, config.model.num_layers)
    found[path.stem] = {
        "full": whole.num_parameters(), "shard": sum(p.numel() for p in whole.parameters()),
        "steps": [step(config, num_layers) for num_layers in (1, 2)],
    }
print(json.dumps(found))
"""


@cache
def measured() -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, *map(str, PRESETS.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_size_of_the_papers_is_there() -> None:
    assert set(PRESETS) == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_and_memory(name: str) -> None:
    config, found = load_config(PRESETS[name], []), measured()[name]
    model, ranks = config.model, config.parallel.tensor_parallel_size
    h, v, s, b = model.hidden_size, 51200, model.seq_len, config.training.microbatch_size
    # A block: 12 h^2 of matrices and 13 h of vectors; the embedding of tokens and positions; the last norm.
    blocks = model.num_layers * (12 * h * h + 13 * h)
    assert found["full"] == blocks + 50257 * h + s * h + 2 * h
    assert found["full"] / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)
    # Whole on every rank: norms and the bias after a row-parallel product (6 h a block), positions, the last norm.
    per_block = 12 * h * h // ranks + 7 * h // ranks + 6 * h
    assert found["shard"] == model.num_layers * per_block + v * h // ranks + s * h + 2 * h
    # Korthikanti et al., table 2, without what attention keeps: s b h (10 + 24 / R), or 34 / R with sequence shards.
    bound = s * b * h * (34 / ranks if config.parallel.sequence_parallel else 10 + 24 / ranks)
    if model.recompute == "full":
        bound = s * b * h * BFLOAT16
    one, two = (step["kept"] for step in found["steps"])
    assert 0 <= two - one <= bound
    gigabytes = (found["shard"] * STATE_BYTES + model.num_layers * bound) / 1e9
    assert gigabytes < (80 if name.startswith("gpt_22b") else 32), "the papers' GPUs"


@pytest.mark.parametrize("name", BILLIONS)
def test_communication(name: str) -> None:
    """What one block more sends, and what is left: the embedding, the head and 8 bytes a token for the loss."""
    config, found = load_config(PRESETS[name], []), measured()[name]
    ranks, full = config.parallel.tensor_parallel_size, config.model.recompute == "full"
    tokens = config.model.seq_len * config.training.microbatch_size
    activation = tokens * config.model.hidden_size * BFLOAT16
    one, two = (step["sent"] for step in found["steps"])
    assert found["steps"][0]["loss"] == [config.training.microbatch_size, config.model.seq_len]
    block = {kind: two[kind] - one[kind] for kind in two}
    if ranks == 1:
        assert not any(two.values())
    elif not config.parallel.sequence_parallel:
        # Two forward and two backward; forward once more where it is recomputed.
        assert block["all_reduce"] == (6 if full else 4) * activation
        assert one["all_reduce"] - block["all_reduce"] == 2 * activation
        assert one["all_gather"] == 8 * tokens * ranks and not block["all_gather"]
    else:
        # Gathered operands are gathered again for the weights' gradient; norms and biases add up a few numbers.
        assert block["reduce_scatter"] == 4 * activation and block["all_gather"] == 6 * activation
        assert one["reduce_scatter"] - block["reduce_scatter"] == 2 * activation
        positions = config.model.seq_len * config.model.hidden_size * BFLOAT16  # their gradient is whole on every rank
        assert one["all_gather"] - block["all_gather"] == 3 * activation + positions + 8 * tokens * ranks
        assert block["all_reduce"] < activation / 100


def test_presets_differ_from_a_config_of_ones_own_only_where_they_say() -> None:
    """Their keys are read by the trainer's own parser: a misspelt one would raise in load_config."""
    for path in PRESETS.values():
        config = load_config(path, ["--training.num-steps", "3"])
        assert dataclasses.asdict(config)["training"]["num_steps"] == 3 and path.stem in path.read_text()
