"""Start here when the memory of a GPU under Megatron-core differs from published runs, or docs/planner.md is stale."""

import dataclasses
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import memory_of_engines as tables  # noqa: E402 - of benchmarks

from fused_megatron.benchmarking.report.page_tables import table_between  # noqa: E402 - as above
from fused_megatron.checks import InputError  # noqa: E402 - as above
from fused_megatron.config import ParallelConfig  # noqa: E402 - as above
from fused_megatron.planning.engine_memory import device_memory  # noqa: E402 - as above
from fused_megatron.planning.megatron_tensors import block_bytes, sizes_of  # noqa: E402 - as above
from fused_megatron.planning.prediction.cluster import load_cluster  # noqa: E402 - as above
from fused_megatron.planning.rank_memory import rank_memory  # noqa: E402 - as above


def test_published_runs() -> None:
    rows = tables.published_rows()
    errors = [abs(row.error()) for row in rows if row.published is not None]
    assert len(errors) == 36 and statistics.median(errors) <= 0.04 and max(errors) <= 0.12
    ran_out = [row.predicted() for row in rows if row.published is None]
    assert len(ran_out) == 3 and min(ran_out) > 80


def test_the_page_shows_these_tables() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    shown = table_between(page, tables.NAME)
    assert shown == tables.tables(), "stale: python benchmarks/memory_of_engines.py --write"


@pytest.mark.parametrize("name", tables.KORTHIKANTI)
def test_a_block_keeps_what_korthikanti_counts(name: str) -> None:
    """The coefficients of S B H of the paper's table 2; the paper leaves out the statistics of the norms."""
    for recompute, sequence_parallel in (("selective", True), ("selective", False), ("none", True), ("none", False)):
        config = tables.korthikanti_config(name, recompute, sequence_parallel)
        model, ranks = config.model, config.parallel.tensor_parallel_size
        wanted = 34 / ranks if sequence_parallel else 10 + 24 / ranks
        wanted += 5 * model.num_heads * model.seq_len / model.hidden_size / ranks * (recompute == "none")
        sizes = sizes_of(config)
        found = block_bytes(config, sizes, has_experts=False, fused=False) - 2 * sizes.statistics * sizes.own
        assert found == pytest.approx(wanted * sizes.tokens * sizes.hidden, rel=1e-12)


@pytest.mark.parametrize("name", tables.KORTHIKANTI)
def test_the_first_rank_holds_what_korthikanti_counts(name: str) -> None:
    memory = device_memory(tables.korthikanti_config(name), None, "megatron-lm", pp_rank=0)
    assert memory.parts["activations"] == pytest.approx(tables.korthikanti_activations(name), rel=0.025)


def test_recomputation_keeps_the_inputs_of_blocks() -> None:
    config = tables.korthikanti_config("22B", "full")
    few = device_memory(config, None, "megatron-core").parts["activations"]
    more = device_memory(tables.korthikanti_config("22B"), None, "megatron-core").parts["activations"]
    sizes = sizes_of(config)
    assert more - few == 48 * (block_bytes(config, sizes, False, True) - 4 * sizes.tokens * sizes.heads) - (
        48 * 2 * sizes.own * sizes.hidden
    )


def test_our_engine_and_overheads() -> None:
    config = tables.korthikanti_config("175B")
    memory, tensors = device_memory(config), rank_memory(config)
    assert sum(memory.parts.values()) == tensors.total
    # tp, pp, and the ranks that hold the model, which are all ranks.
    assert memory.overheads["communicators"] == int(0.3e9) * 4
    alone = dataclasses.replace(config, parallel=ParallelConfig(data_parallel_size=1))
    assert device_memory(alone).overheads["communicators"] == 0
    assert device_memory(alone).overheads["context"] == int(1.3e9)
    on_cpus = dataclasses.replace(load_cluster("h100"), device="cpu")
    assert device_memory(config, on_cpus).overhead == 0
    with pytest.raises(InputError, match="engine='apex' must be"):
        device_memory(config, None, "apex")


def test_the_logits_are_on_the_last_rank() -> None:
    config = tables.korthikanti_config("530B")
    first, second, last = (device_memory(config, None, "megatron-core", pp_rank=rank) for rank in (0, 1, 34))
    assert first.total > second.total and device_memory(config, None, "megatron-core").total == first.total
    assert last.overheads["allocator"] - 0.05 * sum(
        last.parts[part] for part in ("optimizer", "activations", "working")
    ) == pytest.approx(6 * 2048 * 51200 / 8, rel=1e-6)
