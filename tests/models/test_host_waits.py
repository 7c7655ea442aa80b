"""Start here when the host waits for the GPU in forward or backward: a value is read, or a tensor is copied."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import fused_megatron as fm
from fused_megatron.config import GPTConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models import GPT, rotary
from fused_megatron.models.dropout import BatchSlice
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.sharding import Replicas
from fused_megatron.testing.host_waits import HostWaits

FORMS: dict[str, dict[str, Any]] = {
    "learned": {"hidden_dropout": 0.1},
    "llama": {"position": "rotary", "normalization": "rms_norm", "num_kv_heads": 2, "query_key_norm": True},
    "yarn": {
        "position": "rotary",
        "rotary_scaling": "yarn",
        "rotary_scaling_factor": 4.0,
        "rotary_original_seq_len": 8,
        "recompute": "full",
    },
    "window": {"position": "rotary", "sliding_window": 5, "attention_dropout": 0.1, "recompute": "selective"},
    "capacity": {"num_experts": 4, "experts_per_token": 2, "capacity_factor": 1.25, "balance_loss": 0.01},
}


def places(form: dict[str, Any], layout: ParallelLayout) -> list[str]:
    """Return the places of forward and backward at which the host waits."""
    config = GPTConfig(num_layers=2, hidden_size=32, num_heads=4, seq_len=16, vocab_size=104, **form)
    model = GPT(config, device="meta", dtype=torch.bfloat16, layout=layout)
    GradientBuckets(list(model.parameters()), Replicas())
    tokens = torch.zeros(16, 2, dtype=torch.int64, device="meta").t()
    with HostWaits() as waits:
        loss = model(tokens, tokens, batch_slice=BatchSlice(0, 0, 2), reduction="sum")
        (loss if isinstance(loss, torch.Tensor) else loss.output).backward()
    return waits.places


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_in_forward_and_backward(form: str) -> None:
    assert places(FORMS[form], fm.init_mesh().layout()) == []


def test_a_copy_from_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rotary._frequencies
    monkeypatch.setattr(rotary, "_frequencies", lambda *args: original(*args[:-1], torch.device("cpu")).to(args[-1]))
    (place,) = places(FORMS["llama"], fm.init_mesh().layout())
    assert place.startswith("aten::_to_copy in rotary.py")


@pytest.fixture
def two_fake_ranks() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield fm.init_mesh(tensor_parallel_size=2)
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_tensor_parallel_block(two_fake_ranks: Any, sequence_parallel: bool) -> None:
    """Korthikanti et al. 2022, section 4.2.2, and two gathers of operands; no small sums of gradients."""
    layout = two_fake_ranks.layout(sequence_parallel=sequence_parallel)
    assert places(FORMS["llama"], layout) == []

    def collectives(num_layers: int) -> tuple[int, int]:
        config = GPTConfig(num_layers=num_layers, hidden_size=32, num_heads=4, seq_len=16, vocab_size=104)
        model = GPT(config, device="meta", dtype=torch.bfloat16, layout=layout)
        GradientBuckets(list(model.parameters()), Replicas())
        tokens = torch.zeros(16, 2, dtype=torch.int64, device="meta").t()
        with record_communication() as forward:
            loss = model(tokens, tokens, reduction="sum")
        with record_communication() as backward:
            loss.backward()
        return sum(forward.counts.values()), sum(backward.counts.values())

    (forward, backward), (more_forward, more_backward) = collectives(1), collectives(2)
    wanted = (4, 6) if sequence_parallel else (2, 2)
    assert (more_forward - forward, more_backward - backward) == wanted
