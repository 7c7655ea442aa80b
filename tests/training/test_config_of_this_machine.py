"""Start here when an imported model's config does not start on this machine, or starts smaller than it need be."""

from fused_megatron.config import GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.training.config_of_this_machine import config_of_this_machine


def config_of(**model: object) -> TrainConfig:
    fields = {"num_layers": 30, "hidden_size": 576, "num_heads": 9, "vocab_size": 49152, "seq_len": 8192}
    return TrainConfig(
        model=GPTConfig(**(fields | {"position": "rotary"} | model)),
        training=TrainingConfig(global_batch_size=8, microbatch_size=1),
    )


def test_a_processor_and_a_gpu_get_what_they_can_train() -> None:
    full = config_of()
    found, reason = config_of_this_machine(full, "cpu", 64e9)
    assert found.model.seq_len == 512 and found.training == full.training
    assert reason.endswith("64 GB free starts with seq_len=512, global_batch_size=8 (full length of the model: 8192)")
    assert config_of_this_machine(full, "cuda", 141e9) == (full, "")
    # The length is halved until the memory is enough.
    whole = rank_memory(full.for_device("cuda")).total
    tight, _ = config_of_this_machine(full, "cuda", 0.9 * whole)
    assert tight.model.seq_len in (2048, 4096)
    assert rank_memory(tight.for_device("cuda")).total <= 0.8 * 0.9 * whole


def test_after_the_shortest_length_the_batch_is_halved_and_then_the_copy_of_checkpoints_goes() -> None:
    large = config_of(hidden_size=2304, num_layers=24)
    found, _ = config_of_this_machine(large, "cpu", 200e9)
    assert (found.model.seq_len, found.training.global_batch_size) == (128, 2)
    none, reason = config_of_this_machine(large, "cpu", 1e9)
    assert (none.model.seq_len, none.training.global_batch_size, none.training.async_checkpoint) == (128, 1, False)
    assert "1 GB free" in reason


def test_a_table_of_positions_keeps_its_length() -> None:
    found, _ = config_of_this_machine(config_of(position="learned"), "cpu", 64e9)
    assert found.model.seq_len == 8192 and found.training.global_batch_size == 1
