"""Start here when training starts with a model that does not fit, or refuses one that fits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter
from fused_megatron.data.token_digest import digest_path
from fused_megatron.training.memory_check import MemoryNeed, checkpoint_copy_bytes, memory_problem
from fused_megatron.training.train import train

GB = 10**9


def test_ranks_of_one_pool_share_its_memory() -> None:
    first, second, other = MemoryNeed("a", 3 * GB, 7 * GB), MemoryNeed("a", 3 * GB, 6 * GB), MemoryNeed("b", GB, 9 * GB)
    assert memory_problem([first, second, other]) is None
    assert memory_problem([MemoryNeed("a", 3 * GB, 0)]) is None  # the system does not tell
    small = MemoryNeed("a", 3 * GB, 5 * GB)
    found = memory_problem([other, small, small])
    assert found == "weights, gradients and optimizer of 2 ranks on a need 6.0 GB, there are 5.0 GB"


def test_a_checkpoint_behind_training_needs_a_copy_of_what_the_rank_writes() -> None:
    config = TrainConfig(GPTConfig(), training=TrainingConfig())
    half = dataclasses.replace(config, training=TrainingConfig(dtype="bfloat16"))
    waits = dataclasses.replace(config, training=TrainingConfig(async_checkpoint=False))
    assert [checkpoint_copy_bytes(each, 1000, 2) for each in (config, half, waits)] == [6000, 7000, 0]
    found = memory_problem([MemoryNeed("a", 3 * GB, 2 * GB)], "copies")
    assert found == "copies of 1 rank on a need 3.0 GB, there are 2.0 GB"


def test_a_flipped_high_bit_asks_for_no_memory(tmp_path: Path) -> None:
    """Without checksums, tokenizer and vocab_size the largest token id decides, and it needs too much memory."""
    with IndexedDatasetWriter(tmp_path / "tokens", np.int32) as writer:
        for i in range(40):
            writer.add_document(np.arange(i, i + 50))
    digest_path(tmp_path / "tokens").unlink()
    data = bytearray((tmp_path / "tokens.bin").read_bytes())
    data[4 * 777 + 3] ^= 64
    (tmp_path / "tokens.bin").write_bytes(bytes(data))
    config = TrainConfig(
        GPTConfig(num_layers=1, hidden_size=512, num_heads=2, seq_len=16),
        data=DataConfig(path=str(tmp_path / "tokens"), cache_folder=str(tmp_path / "cache")),
        training=TrainingConfig(num_steps=1, global_batch_size=4, microbatch_size=2),
    )
    with pytest.raises(InputError) as caught:
        train(config, tmp_path / "run")
    said = str(caught.value)
    assert "need 8,796.1 GB, there are " in said
    assert f"(model.vocab_size=1073741867, from the largest token id in {tmp_path / 'tokens'}.bin)" in said
    stated = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(InputError, match=r"model\.vocab_size=100 must be at least 1073741867, .* the data is damaged"):
        train(stated, tmp_path / "run")
