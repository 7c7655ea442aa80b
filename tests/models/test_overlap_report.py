"""Start here when the lines of a run on overlap differ from what its layers do, or a warning is missing."""

import math
import sys
from collections import Counter

import pytest
import torch

import fused_megatron as fm
from fused_megatron.assembly.build import build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.models import BatchSlice
from fused_megatron.models.overlap_report import LayerOverlap, overlap_lines, stage_overlap
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.overlap import OverlapCosts
from fused_megatron.overlap.timed_ways import BY_SYMMETRIC_MEMORY, Chosen
from fused_megatron.testing.run_on_ranks import run_on_ranks

ATTENTION, PROJECTION = "attention.query_key_value", "attention.projection"
ASKED = {"4 chunks": 4, "off": False, "by the model": True}


def reported(rank, ranks):
    """Return for each setting the rows, and the collectives of a step by (layer, direction)."""
    mesh = fm.init_mesh(tensor_parallel_size=ranks)
    # Every product wants chunks, except the products for sums of weight gradients.
    costs = OverlapCosts(1e9, 0.0, 1e8)
    real = sys.modules["fused_megatron.overlap.chunk_choice"].overlap_costs
    found = {}
    for name, overlap in ASKED.items():
        for sequence_parallel in (False, True):
            sys.modules["fused_megatron.overlap.chunk_choice"].overlap_costs = lambda *arguments: costs
            config = TrainConfig(
                GPTConfig(num_layers=2, hidden_size=16, num_heads=2, seq_len=768, vocab_size=64),
                ParallelConfig(tensor_parallel_size=ranks, sequence_parallel=sequence_parallel, overlap=overlap),
                training=TrainingConfig(global_batch_size=1, microbatch_size=1),
            )
            model = build_stages(config, mesh, plan_pipeline(config), torch.device("cpu"))
            with record_communication() as quiet:
                rows = stage_overlap(model.stages, config)
            assert not quiet.counts
            tokens = torch.zeros(1, 768, dtype=torch.int64)
            (stage,) = model.stages.values()
            with record_communication() as ledger:
                model.loss_sum(stage(tokens, batch_slice=BatchSlice(0, 0, 1)), tokens).backward()
            made = Counter((entry.kind, entry.layer, entry.backward) for entry in ledger.entries)
            found[name, sequence_parallel] = rows, made
    sys.modules["fused_megatron.overlap.chunk_choice"].overlap_costs = real
    measured = stage_overlap(model.stages, config, measures=True)
    return found, measured, real(mesh.tp_group, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def answers():
    first, second = run_on_ranks(reported, 2)
    assert [row._replace(ways=dict(row.ways)) for row in first[1]] == second[1]
    return first


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_the_rows_say_what_the_step_does(answers, asked, sequence_parallel):
    rows, made = answers[0][asked, sequence_parallel]
    ways = {row.layer: {direction: chosen.num_chunks for direction, chosen in row.ways.items()} for row in rows}
    assert [row.layer for row in rows] == [ATTENTION, PROJECTION, "mlp"]
    both = {"forward", "backward"}
    assert [set(ways[layer]) for layer in (ATTENTION, PROJECTION)] == (
        [both, both] if sequence_parallel else [{"backward"}, {"forward"}]
    )
    gathers, sums = ("all_gather", "reduce_scatter") if sequence_parallel else ("", "all_reduce")
    kinds = {ATTENTION: (gathers, sums), PROJECTION: (sums, gathers), "mlp": (sums, sums)}
    for layer, of_layer in kinds.items():
        for direction, kind in zip(("forward", "backward"), of_layer, strict=True):
            if direction in ways[layer]:
                for block in range(2):
                    number = made[kind, f"blocks.{block}.{layer}", direction == "backward"]
                    assert number == ways[layer][direction], (layer, direction)
    numbers = {number for of_layer in ways.values() for number in of_layer.values()}
    assert numbers == {"4 chunks": {4}, "off": {1}}.get(asked, numbers) and max(numbers) > 1 - (asked == "off")


def test_predicted_and_measured_times_are_in_the_rows(answers):
    found, measured, costs = answers
    assert costs.slowdown == 1
    for row in measured:  # through shared memory, of the last setting
        assert row.on_cpu and row.shared_memory and row.measured_s >= 0 and row.warning is None
        for chosen in row.ways.values():
            assert chosen.num_chunks == 1 and not chosen.is_timed
            assert 0 < chosen.exposed_s <= chosen.transfer_s * 1.001
    for row in found["by the model", True][0]:
        for chosen in row.ways.values():
            assert 0 <= chosen.exposed_s < chosen.transfer_s and row.measured_s is None
    for row in found["4 chunks", True][0]:
        assert all(math.isnan(chosen.exposed_s) for chosen in row.ways.values())


def test_lines_of_a_run(answers):
    head, *lines = overlap_lines(answers[1])
    assert head == (
        "overlap of products and collectives: by the cost model; each rank does its transfers itself, through shared "
        "memory: nothing can hide"
    )
    assert [line.split(":")[0] for line in lines] == [f"  {ATTENTION}", f"  {PROJECTION}", "  mlp"]
    assert all("forward whole, " in line and " ms exposed (predicted); backward" in line for line in lines)
    assert all(line.endswith(" ms exposed") and "; measured " in line for line in lines)
    rows = answers[0]["4 chunks", False][0]
    assert overlap_lines([row._replace(shared_memory=False) for row in rows])[:2] == [
        "overlap of products and collectives: 4 chunks",
        f"  {ATTENTION}: backward in 4 chunks",
    ]
    assert overlap_lines([]) == []


WHOLE, UNKNOWN = Chosen(1, 1e-3, 5e-4, 5e-4), Chosen(1, math.nan, math.nan, math.nan)
FUSED = Chosen(BY_SYMMETRIC_MEMORY, 1e-3, 5e-4, 1e-4, is_timed=True)


@pytest.mark.parametrize(
    ("asked", "on_cpu", "ways", "part"),
    [
        (True, False, {"forward": WHOLE, "backward": WHOLE}, "overlap=True hides nothing in mlp: 1 ms of its"),
        (True, False, {"forward": WHOLE, "backward": FUSED}, None),
        (True, False, {"forward": WHOLE._replace(exposed_s=2e-5)}, None),  # 2 % of the product
        (True, True, {"forward": WHOLE}, None),  # a CPU does its transfers itself
        (4, True, {"forward": UNKNOWN}, "parallel.overlap=4, but mlp runs whole: it has too few rows"),
        (4, True, {"forward": UNKNOWN, "backward": UNKNOWN._replace(num_chunks=4)}, None),
        (1, False, {"forward": UNKNOWN}, None),
        (False, False, {"forward": WHOLE}, None),
    ],
)
def test_a_warning_where_an_asked_overlap_did_not_happen(asked, on_cpu, ways, part):
    row = LayerOverlap("mlp", asked, on_cpu, False, ways)
    assert row.warning is None if part is None else part in row.warning
    lines = overlap_lines([row])
    assert len(lines) == 2 + (part is not None) and (part is None or lines[-1].startswith("warning: parallel."))


def test_text_of_a_timed_way():
    text = LayerOverlap("mlp", True, False, False, {"forward": FUSED}, 3e-4).text
    assert text == "mlp: forward by symmetric memory, 0.1 of 0.5 ms exposed (timed); measured 0.3 ms exposed"


def of_other_models(rank, ranks):
    """Return the rows of a model with one row, and of a model with experts; 4 chunks are asked."""
    mesh = fm.init_mesh(tensor_parallel_size=ranks, expert_parallel_size=ranks)
    found = []
    for form in ({"seq_len": 1}, {"seq_len": 8, "num_experts": 4}):
        config = TrainConfig(
            GPTConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=64, **form),
            ParallelConfig(
                tensor_parallel_size=ranks, expert_parallel_size=ranks if "num_experts" in form else 1, overlap=4
            ),
            training=TrainingConfig(global_batch_size=1, microbatch_size=1),
        )
        model = build_stages(config, mesh, plan_pipeline(config), torch.device("cpu"))
        found.append(stage_overlap(model.stages, config))
    return found


def test_chunks_that_the_rows_or_the_experts_do_not_give():
    for one_row, experts in run_on_ranks(of_other_models, 2):
        assert [row.warning.split(" runs")[0] for row in one_row] == [
            f"parallel.overlap=4, but {layer}" for layer in (ATTENTION, PROJECTION, "mlp")
        ]
        assert [row.layer for row in experts] == [ATTENTION, PROJECTION, "mlp.experts"]
        assert experts[2].text == "mlp.experts: forward and backward in 2 chunks"  # two local experts
