"""Start here when memory, activations or transfers of a layout of many ranks differ from the papers.

The layouts come from benchmarks/presets and from a grid. They run on fake tensors with a fake group of all ranks, and
the memory and the transfers of a rank are compared with the papers' formulas.

The grid has splits of 4 ranks, and with the slow marker of 8, 64 and 512 ranks. Tensor- and pipeline-parallel sizes are
1 and 2 (slow: 1, 2, 4 and 8), and each pipeline runs by two schedules (slow: four). Sequence parallelism, recomputation
and forms of the model take turns.
"""

import dataclasses
import itertools
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.models import StageSpan, cut_stages
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.pipeline import simulate
from fused_megatron.pipeline.schedule.action import SENDS, peak_live_activations, stages_of
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.planning.dry_run import DryRun, RankReport
from fused_megatron.planning.rank_communication import message_bytes, stage_communication
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.planning.recorded_step import fake_ranks
from fused_megatron.planning.step_profile import Transfers
from fused_megatron.planning.working_memory import stage_bytes

ROOT = Path(__file__).parents[1]
# tests/planning/test_expert_formulas.py has the presets of experts.
PRESETS = {
    path.stem: path
    for path in sorted((ROOT / "benchmarks" / "presets").glob("*.toml"))
    if not path.stem.startswith("moe_")
}
# Published numbers of parameters, in billions.
WEAK_SCALING = {"gpt_1.2b_tp1": 1.2, "gpt_2.5b_tp2": 2.5, "gpt_4.2b_tp4": 4.2, "gpt_8.3b_tp8": 8.3}
SEQUENCE_PARALLEL = {"gpt_22b_tp8_sequence_parallel": 22.0}
# Billions of parameters, GPUs, TFLOP/s a GPU with recomputation.
THREE_D = {
    "gpt_39b_tp8_pp2_dp32": (39.1, 512, 138), "gpt_76b_tp8_pp4_dp32": (76.1, 1024, 140),
    "gpt_145b_tp8_pp8_dp24": (145.6, 1536, 148), "gpt_310b_tp8_pp16_dp15": (310.1, 1920, 155),
    "gpt_530b_tp8_pp35_dp9": (529.6, 2520, 163), "gpt_1t_tp8_pp64_dp6": (1008.0, 3072, 163),
}  # fmt: skip
BILLIONS = {**WEAK_SCALING, **SEQUENCE_PARALLEL, **{name: figures[0] for name, figures in THREE_D.items()}}
# Tensor and pipeline parallelism with replicas that share the optimizer's state: (billions of parameters, GPUs).
HYBRID = {
    "gpt_530b_tp8_pp35_dp7_zero1": (529.6, 1960),
    "gpt_175b_tp8_pp16_dp8_zero1": (174.6, 1024),
    "llama_70b_tp8_pp2_dp4_zero1": (69.0, 64),
}
ELEMENT = {"float32": 4, "bfloat16": 2}

FORMS: list[dict[str, Any]] = [
    {"recompute": "full"},
    {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "linear_biases": False,
     "tied_embeddings": False, "ffn_hidden_size": 96, "recompute": "selective"},
    {"num_kv_heads": 8, "head_dim": 4, "qkv_bias": False, "dtype": "bfloat16"},
]  # fmt: skip


FEW = (4,)
# Presets beside the grid, with few blocks.
FAST_PRESETS = ("gpt_22b_tp8_sequence_parallel", "gpt_39b_tp8_pp2_dp32")
SLOW_PRESETS = ("gpt_76b_tp8_pp4_dp32",)
on_few_and_on_many_ranks = pytest.mark.parametrize(
    "worlds", [FEW, pytest.param((8, 64, 512), marks=pytest.mark.slow)], ids=str
)


@cache
def configs(worlds: tuple[int, ...]) -> dict[str, TrainConfig]:
    """Return the configs of the grid for these numbers of ranks by name, and small copies of some presets."""
    presets = FAST_PRESETS if worlds == FEW else SLOW_PRESETS
    found = {name: with_few_blocks(load_config(PRESETS[name])) for name in presets}
    sizes = (1, 2) if worlds == FEW else (1, 2, 4, 8)
    for world, tp, pp in itertools.product(worlds, sizes, sizes):
        if tp * pp <= world:
            schedules = ["1f1b", "zb_v"] if worlds == FEW else ["1f1b", "interleaved_1f1b", "zb_h1", "zb_v"]
            for schedule in schedules if pp > 1 else ["1f1b"]:
                name = f"{world} ranks: tp={tp} pp={pp} {schedule}"
                found[name] = small_config(len(found), tp, pp, world // tp // pp, schedule)
    return found


def with_few_blocks(config: TrainConfig) -> TrainConfig:
    """Return a config with 2 blocks for each stage, and a microbatch for each pipeline rank but at least 2."""
    plan, parallel, training = plan_pipeline(config), config.parallel, config.training
    count = max(2, parallel.pipeline_parallel_size)
    batch = count * training.microbatch_size * (parallel.data_parallel_size or 1)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=2 * plan.num_stages),
        training=dataclasses.replace(training, global_batch_size=batch),
    )


def small_config(turn: int, tp: int, pp: int, dp: int, schedule: str) -> TrainConfig:
    stages_per_rank = 2 if schedule in ("interleaved_1f1b", "zb_v") else 1
    form = dict(FORMS[turn % 3])
    training = TrainingConfig(
        global_batch_size=4 * pp * dp, microbatch_size=2, dtype=form.pop("dtype", "float32"),
    )  # fmt: skip
    model = GPTConfig(
        num_layers=pp * stages_per_rank, hidden_size=64, num_heads=16, seq_len=32, vocab_size=1000, **form
    )
    parallel = ParallelConfig(
        tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, schedule=schedule,
        stages_per_rank=stages_per_rank, sequence_parallel=tp > 1 and turn % 2 == 0,
    )  # fmt: skip
    return TrainConfig(model, parallel, training=training)


@cache
def measured(worlds: tuple[int, ...]) -> list[tuple[str, TrainConfig, dict[int, RankReport]]]:
    """Return (name, config, report by pipeline rank) for the first and the last pipeline rank; presets also second."""
    found = []
    for name, config in configs(worlds).items():
        parallel = config.parallel
        pp, ranks_of_a_place = parallel.pipeline_parallel_size, ranks_of_a_stage(parallel)
        dry_run = DryRun(config)
        places = {
            # A rank in the middle of its data- and tensor-parallel groups.
            place: dry_run.rank(place * ranks_of_a_place + ranks_of_a_place // 2)
            for place in sorted({0, min(1, pp - 1), pp - 1} if name in PRESETS else {0, pp - 1})
        }
        found.append((name, config, places))
    return found


def ranks_of_a_stage(parallel: ParallelConfig) -> int:
    return parallel.tensor_parallel_size * (parallel.data_parallel_size or 1)


def activation_bytes(config: TrainConfig) -> int:
    """Return the bytes of an activation [S, B, H]."""
    training, model = config.training, config.model
    return training.microbatch_size * model.seq_len * model.hidden_size * ELEMENT[training.dtype]


def num_messages(config: TrainConfig, rank: RankReport) -> int:
    """Count the messages that a rank sends: one a microbatch at each border of its stages with another rank."""
    placement = plan_pipeline(config).placement
    borders = 0
    for index in rank.spans:
        before, behind = placement[max(0, index - 1)], placement[min(len(placement) - 1, index + 1)]
        borders += (before != rank.pp_rank) + (behind != rank.pp_rank)
    return borders * num_microbatches(config)


def num_microbatches(config: TrainConfig) -> int:
    training = config.training
    return training.global_batch_size // training.microbatch_size // (config.parallel.data_parallel_size or 1)


def test_every_size_of_the_papers_is_there() -> None:
    assert set(PRESETS) == {*BILLIONS, *HYBRID, "gpt_7b_tp2"}  # docs/gpu_step.md has the last one
    assert len(configs(FEW)) - len(FAST_PRESETS) == 4 + 2
    assert len(configs((8, 64, 512))) - len(SLOW_PRESETS) == 10 + 6 * 3 + 2 * (16 + 12 * 3)


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_of_a_preset(name: str) -> None:
    config = load_config(PRESETS[name])
    model, pp = config.model, config.parallel.pipeline_parallel_size
    h, v, s = model.hidden_size, 51200, model.seq_len
    # A block has 12 h^2 elements of matrices and 13 h of vectors; then token and position embeddings and a norm.
    whole = model.num_layers * (12 * h * h + 13 * h) + 50257 * h + s * h + 2 * h
    places = sorted({0, min(1, pp - 1), pp - 1})
    between = pp - len(places) + 1
    total = 0
    for place in places:
        own = place * ranks_of_a_stage(config.parallel)
        with fake_ranks(own, config.parallel.num_ranks):
            stages = build_stages(config, build_mesh(config, "cpu"), plan_pipeline(config), torch.device("meta"))
            total += stages.num_parameters() * (between if place == 1 < pp - 1 else 1)
            held = sum(parameter.numel() for parameter in stages.parameters())
            assert held == rank_memory(config, place).num_parameters
    assert total == whole
    # Narayanan et al. 2021, equation 2, with the padded vocabulary.
    paper = 12 * model.num_layers * h * h * (1 + 13 / (12 * h) + (v + s) / (12 * model.num_layers * h))
    assert whole == pytest.approx(paper, rel=2e-3)
    assert whole / 1e9 == pytest.approx(BILLIONS[name], rel=0.002 if name in THREE_D else 0.02)


@on_few_and_on_many_ranks
def test_a_rank_holds_what_the_formula_says(worlds: tuple[int, ...]) -> None:
    for name, config, places in measured(worlds):
        parallel, training = config.parallel, config.training
        batch = training.microbatch_size * (parallel.data_parallel_size or 1) * parallel.pipeline_parallel_size
        few = dataclasses.replace(config, training=dataclasses.replace(training, global_batch_size=batch))
        for place, rank in places.items():
            memory = rank_memory(few, place)
            assert memory.num_parameters == rank.num_parameters, name
            # Weight and gradient; Adam's two moments and in bfloat16 a main weight, which the replicas share.
            whole, shared = (8, 8) if config.training.dtype == "float32" else (6, 12)
            share = -(-rank.num_parameters // (parallel.data_parallel_size or 1))
            assert memory.weights + memory.gradients == whole * rank.num_parameters, name
            assert memory.optimizer == shared * share, name


@pytest.mark.parametrize("name", HYBRID)
def test_a_hybrid_preset(name: str) -> None:
    """Parameters are as published; a rank holds its weights and gradients, and one replica's share of the state."""
    config, (billions, gpus) = load_config(PRESETS[name]), HYBRID[name]
    parallel, replicas = config.parallel, config.parallel.data_parallel_size or 1
    assert (parallel.num_ranks, parallel.zero_stage) == (gpus, 1)
    ranks = [rank_memory(config, place) for place in range(parallel.pipeline_parallel_size)]
    # Vectors that all tensor-parallel ranks hold, and padding of the vocabulary, are counted several times.
    total = 8 * sum(memory.num_parameters for memory in ranks) / 1e9
    assert total == pytest.approx(billions, rel=0.01)
    for memory in ranks:
        assert memory.weights + memory.gradients == 6 * memory.num_parameters
        assert memory.optimizer == pytest.approx(12 * memory.num_parameters / replicas, rel=1e-6)
        assert memory.total < 80e9


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("llama") else pytest.mark.slow) for name in HYBRID]
)
def test_a_hybrid_preset_sends_its_gradients_and_weights_once(name: str) -> None:
    config = load_config(PRESETS[name])
    report = DryRun(with_few_blocks(config)).rank(config.parallel.num_ranks // 2)
    _, reduced = report.transfers["reduce_scatter", "dp"]
    _, gathered = report.transfers["all_gather", "dp"]
    # Seven replicas do not divide the rows.
    assert 4 * report.num_parameters <= reduced <= 4.002 * report.num_parameters
    assert 2 * gathered == reduced


LLAMA = {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "linear_biases": False}
SHARDED = {
    "70b": ({"num_layers": 80, "hidden_size": 8192, "num_heads": 64, "ffn_hidden_size": 28672}, 32000),
    "405b": ({"num_layers": 126, "hidden_size": 16384, "num_heads": 128, "ffn_hidden_size": 53248}, 128256),
}


def sharded_over_1024(name: str, stage: int, num_layers: int | None = None) -> TrainConfig:
    sizes, vocab_size = SHARDED[name]
    sizes = sizes if num_layers is None else {**sizes, "num_layers": num_layers}
    return TrainConfig(
        GPTConfig(**sizes, num_kv_heads=8, seq_len=64, vocab_size=vocab_size, tied_embeddings=False, **LLAMA),
        ParallelConfig(tensor_parallel_size=8, data_parallel_size=128, zero_stage=stage),
        training=TrainingConfig(global_batch_size=128, microbatch_size=1, dtype="bfloat16"),
    )


@pytest.mark.parametrize(
    ("name", "stage", "num_layers"),
    [
        ("70b", 2, 2),
        ("405b", 3, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(SHARDED, (1, 2, 3), [None])),
    ],
)
def test_bytes_of_a_rank_of_1024(name: str, stage: int, num_layers: int | None) -> None:
    """A rank holds only 6 + 12 / d, 2 + 16 / d or 18 / d bytes a parameter (stages 1, 2, 3) between two steps."""
    config = sharded_over_1024(name, stage, num_layers)
    report = DryRun(config).rank(0)
    with fake_ranks(0, 1024):
        stages = build_stages(config, build_mesh(config, "cpu"), plan_pipeline(config), torch.device("meta"))
        shapes = [parameter.shape for parameter in stages.parameters()]
    whole = sum(shape.numel() for shape in shapes)
    share = sum(-(-shape[0] // 128) * (shape.numel() // shape[0]) for shape in shapes)
    weights, gradients = 2 * (share if stage == 3 else whole), 4 * (share if stage >= 2 else whole)
    # This rank is the first of its group: its blocks are full.
    besides = report.assembled_bytes - (weights + gradients + 12 * share)
    assert 0 <= besides < 1e5  # positions of rotary embeddings, counters, a number in place of each absent weight


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BILLIONS, *HYBRID])
def test_a_preset_runs_with_all_its_blocks(name: str) -> None:
    """Peaks are near the formula, which only estimates the memory that a kernel takes while it computes."""
    config = load_config(PRESETS[name])
    dry_run = DryRun(config)
    ranks = dry_run.pipeline_ranks()
    for rank in sorted({0, ranks[len(ranks) // 2], ranks[-1]}):
        report = dry_run.rank(rank)
        memory = rank_memory(config, report.pp_rank)
        assert report.num_parameters == memory.num_parameters
        assert report.peak_bytes == pytest.approx(memory.total, rel=0.1)
        assert report.peak_bytes < (32e9 if name in WEAK_SCALING else 80e9)


def test_presets_fit_the_gpus_of_the_papers() -> None:
    for name, path in PRESETS.items():
        assert rank_memory(load_config(path)).total / 1e9 < (32 if name in WEAK_SCALING else 80), name


@on_few_and_on_many_ranks
def test_activations_are_those_of_the_formula_and_within_the_papers_bound(worlds: tuple[int, ...]) -> None:
    for name, config, places in measured(worlds):
        model, parallel = config.model, config.parallel
        ranks, activation = parallel.tensor_parallel_size, activation_bytes(config)
        own = activation // (ranks if parallel.sequence_parallel else 1)
        for rank in places.values():
            for index, span in rank.spans.items():
                more = StageSpan(span.index, span.num_stages, span.start, span.stop + 1)
                block = stage_bytes(config, more).kept - stage_bytes(config, span).kept
                kept = {memory.layer: num_bytes for memory, num_bytes in rank.kept[index].items()}
                open_sum = not (model.linear_biases or model.hidden_dropout or model.recompute == "full")
                for layer in range(span.start, span.stop):
                    # The output of a stage's last block is a message, which the next stage keeps. Without biases and
                    # dropout the next block's norm makes the output, and the first block's input is of other layers.
                    is_sent = layer == span.stop - 1 and not span.last
                    of_others = layer == span.start if open_sum else is_sent
                    assert kept.get(f"blocks.{layer}", 0) == block - own * of_others, (name, index, layer)
                if name in PRESETS:
                    # Korthikanti et al., table 2, without what attention keeps: s b h (10 + 24 / R), or 34 / R; 2 B.
                    bound = activation // 2 * (34 / ranks if parallel.sequence_parallel else 10 + 24 / ranks)
                    assert block <= bound, name
                assert model.recompute != "full" or block == own, name


@on_few_and_on_many_ranks
def test_a_stage_hands_on_what_the_next_one_takes(worlds: tuple[int, ...]) -> None:
    for name, config, places in measured(worlds):
        for rank in places.values():
            for kind in ("send", "receive"):
                calls, num_bytes = rank.transfers.get((kind, "pp"), Transfers(0, 0))
                assert num_bytes == calls * message_bytes(config), name
                assert calls == num_messages(config, rank), name


@on_few_and_on_many_ranks
def test_groups(worlds: tuple[int, ...]) -> None:
    for name, config, places in measured(worlds):
        parallel = config.parallel
        tp, pp, dp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size or 1
        for place, rank in places.items():
            own = place * tp * dp + tp * dp // 2
            first = own // tp * tp
            groups = {
                "tp": tuple(range(first, first + tp)),
                "pp": tuple(own % (tp * dp) + i * tp * dp for i in range(pp)),
                "dp": tuple(place * tp * dp + own % tp + i * tp for i in range(dp)),
            }
            assert rank.groups == {axis: ranks for axis, ranks in groups.items() if len(ranks) > 1}, name


@on_few_and_on_many_ranks
def test_tensor_parallel_communication(worlds: tuple[int, ...]) -> None:
    """The bytes of every stage equal the formula; a block sends the number of activations that the papers state."""
    for name, config, places in measured(worlds):
        model, activation = config.model, activation_bytes(config)
        again = 2 if model.recompute == "full" else 0  # forward once more
        for rank in places.values():
            for index, span in rank.spans.items():
                formula = stage_communication(config, span)
                sent = Counter(rank.sent[index])
                if config.parallel.sequence_parallel and span.last and sent["all_gather"] != formula["all_gather"]:
                    # On a CPU the logits of 16-bit activations take several tiles: the head gathers its input again.
                    sent["all_gather"] -= activation
                assert dict(sent) == formula, name
                more = StageSpan(span.index, span.num_stages, span.start, span.stop + 1)
                block = Counter(stage_communication(config, more))
                block.subtract(formula)
                if config.parallel.tensor_parallel_size == 1:
                    assert not block, name
                elif config.parallel.sequence_parallel:
                    # Korthikanti et al., section 4.2.2: the same bytes, and a second gather of operands for weights.
                    assert block["reduce_scatter"] == (4 + again) * activation, name
                    assert block["all_gather"] == (6 + again) * activation, name
                else:
                    # Shoeybi et al., section 3: two all-reduces in forward and two in backward.
                    assert +block == {"all_reduce": (4 + again) * activation}, name


@on_few_and_on_many_ranks
def test_data_parallel_communication(worlds: tuple[int, ...]) -> None:
    for name, config, places in measured(worlds):
        for rank in places.values():
            _, reduced = rank.transfers.get(("reduce_scatter", "dp"), Transfers(0, 0))
            _, gathered = rank.transfers.get(("all_gather", "dp"), Transfers(0, 0))
            if (config.parallel.data_parallel_size or 1) == 1:
                assert (reduced, gathered) == (0, 0), name
            else:  # rows are padded to the same number on every rank
                size = ELEMENT[config.training.dtype]
                assert 4 * rank.num_parameters <= reduced <= 4.4 * rank.num_parameters, name
                assert gathered * 4 == reduced * size, name


@on_few_and_on_many_ranks
def test_pipelines(worlds: tuple[int, ...]) -> None:
    """Narayanan et al. 2021, section 2.2: the bubble is (p - 1) / (v m) of the work, with v times the messages."""
    for name, config, _ in measured(worlds):
        parallel, plan, m = config.parallel, plan_pipeline(config), num_microbatches(config)
        p, v = parallel.pipeline_parallel_size, parallel.stages_per_rank or 1
        schedule = plan.schedule(m)
        timeline = simulate(schedule)
        assert not timeline.stuck, name
        bubble = timeline.bubble / max(timeline.busy)
        if schedule.name in ("1f1b", "interleaved_1f1b"):
            assert bubble == pytest.approx((p - 1) / (v * m)), name
        else:
            assert bubble < (p - 1) / m, name
        if name not in PRESETS or m < 100:  # the largest would take seconds
            sends = [sum(action.kind in SENDS for action in actions) for actions in lower(schedule).actions]
            borders = sum(a != b for a, b in itertools.pairwise(schedule.placement))
            assert sum(sends) == 2 * m * borders, name
        if schedule.name == "1f1b":
            assert peak_live_activations(schedule) == [min(m, p - rank) for rank in range(p)], name
        assert all(len(stages_of(schedule.placement, rank)) == v for rank in range(p)), name


@pytest.mark.parametrize("name", THREE_D)
def test_published_speeds_are_within_what_the_layout_allows(name: str) -> None:
    """No published step is faster than the formula's FLOPs at an A100's peak with the bubble of the schedule."""
    _, gpus, tflops = THREE_D[name]
    config = load_config(PRESETS[name])
    parallel, model, training = config.parallel, config.model, config.training
    ranks = parallel.num_ranks
    assert ranks == gpus and f"{tflops} TFLOP/s" in PRESETS[name].read_text()
    _, hardware = gpt_step_flops(model, training.global_batch_size * model.seq_len)
    p, v = parallel.pipeline_parallel_size, parallel.stages_per_rank or 1
    least_s = hardware / (gpus * 312e12) * (1 + (p - 1) / (v * num_microbatches(config)))
    assert least_s < hardware / (gpus * tflops * 1e12)
    # Stages of equal size, as in the paper.
    spans = cut_stages(model, p * v, placement=plan_pipeline(config).placement)
    assert {span.stop - span.start for span in spans} == {model.num_layers // (p * v)}


def test_presets_differ_from_a_config_of_ones_own_only_where_they_say() -> None:
    """The trainer's own parser reads the presets: load_config would raise for a misspelt key."""
    for path in PRESETS.values():
        config = load_config(path, ["--training.num-steps", "3"])
        assert config.training.num_steps == 3 and path.stem in path.read_text()
