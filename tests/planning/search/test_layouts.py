"""Start here when `plan` refuses a layout that runs, or gives a wrong reason."""

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.search.layouts import Refusals, check_gpus, valid_layouts


def test_reasons_are_grouped_by_class() -> None:
    model = GPTConfig(num_layers=4, hidden_size=120, num_heads=12, num_kv_heads=6, seq_len=2048, vocab_size=100)
    base = TrainConfig(model, training=TrainingConfig(global_batch_size=8, microbatch_size=1))
    refusals = Refusals()
    layouts = valid_layouts(base, 16, load_cluster("h100"), refusals)
    assert {layout.tp for layout in layouts} == {1, 2}
    lines = refusals.lines()
    assert "tp=4 does not divide 6 key-value heads: 5 layouts" in lines
    assert "tp=8 does not divide 12 heads: 3 layouts" in lines
    assert "tp=16 spans nodes of 8 GPUs: 1 layout" in lines
    assert "cp=4, 8, 16 leaves a rank fewer than 1,024 of 2,048 positions: 10 layouts" in lines
    assert any(line.startswith("pp=8, 16 needs more than 4 blocks: ") for line in lines)
    assert len(layouts) + refusals.total == 35  # four factors of 16


def test_gpus_are_of_whole_nodes() -> None:
    cluster = load_cluster("h100")
    for number in (1, 3, 8, 16, 24):
        check_gpus(number, cluster)
    with pytest.raises(InputError, match=r"gpus=12 must be at most .* \(nearest: 8, 16\)"):
        check_gpus(12, cluster)
    with pytest.raises(InputError, match="gpus=0 must be 1 or more"):
        check_gpus(0, cluster)
