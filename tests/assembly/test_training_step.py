"""Start here when a training step, after its backwards, makes the host wait for the device more than once."""

from collections import Counter

import pytest
import torch

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.recorded_step import STEP, record_fake_step

MODEL = GPTConfig(num_layers=2, hidden_size=16, num_heads=2, seq_len=8, vocab_size=32)
NUM_FLAGS = 7  # of the recorded step


@pytest.mark.parametrize(("ranks", "stage"), [((1, 1, 1), None), ((2, 2, 2), 0), ((2, 2, 2), 1)], ids=str)
def test_the_host_waits_once_and_one_small_message_is_summed(ranks: tuple[int, int, int], stage: int | None) -> None:
    tp, pp, dp = ranks
    parallel = ParallelConfig(
        tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, zero_stage=stage
    )
    config = TrainConfig(MODEL, parallel=parallel, training=TrainingConfig(global_batch_size=4, microbatch_size=1))
    recorder = record_fake_step(config, 0, torch.device("cpu")).recorder
    found: Counter[str] = Counter()
    for (phase, action), work in recorder.work.items():
        for what, number in work.items() if phase == STEP and action is None else ():
            found["syncs"] += number * (what.what == "host_syncs")
            if what.kind == "all_reduce" and len(what.group) == tp * pp * dp:
                found[what.what] += number
    assert found["syncs"] == 1
    if tp * pp * dp > 1:
        assert (found["calls"], found["bytes"]) == (1, 8 * (2 + NUM_FLAGS))
