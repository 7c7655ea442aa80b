"""Start here when the predicted time of a step, or one of its parts, is wrong."""

import dataclasses

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.step_time import PARTS, fastest_possible, predict_step
from fused_megatron.planning.rank_communication import expert_communication_by_axis

A100 = load_cluster("a100")
# Only products take time, at 100 TFLOP/s.
PRODUCTS_ONLY = dataclasses.replace(
    A100,
    peak_tflops=100.0,
    product_efficiency=1.0,
    product_us=0.0,
    attention_efficiency=1.0,
    memory_gb_per_s=1e12,
    launch_us=0.0,
    node_gb_per_s=1e12,
    node_latency_us=0.0,
    network_gb_per_s=1e12,
    network_latency_us=0.0,
    step_ms=0.0,
)
MODEL = GPTConfig(num_layers=8, hidden_size=1024, num_heads=16, seq_len=512, vocab_size=32768)


def _config(model=MODEL, batch=64, micro=2, **parallel):
    return TrainConfig(
        model=model,
        parallel=ParallelConfig(**{"data_parallel_size": 1, **parallel}),
        training=TrainingConfig(dtype="bfloat16", global_batch_size=batch, microbatch_size=micro),
    )


def _products(model, sequences):
    """Return the FLOPs of a step, from the sizes: 2 operations a weight and token forward, 4 backward."""
    hidden, tokens = model.hidden_size, sequences * model.seq_len
    linear = model.num_layers * 12 * hidden**2 + model.vocab_size * hidden
    scores = model.num_layers * 4 * sequences * model.seq_len**2 * hidden / 2  # causal: half of the pairs
    return 6 * tokens * linear + scores * (1 + 2.5)


def test_one_rank_takes_the_time_of_its_products():
    prediction = predict_step(_config(), PRODUCTS_ONLY)
    assert prediction.seconds == pytest.approx(_products(MODEL, 64) / 1e14, rel=1e-9)
    assert prediction.parts["products"] == pytest.approx(prediction.seconds)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_adds_a_forward(recompute):
    model = dataclasses.replace(MODEL, recompute=recompute)
    more = predict_step(_config(model), PRODUCTS_ONLY).seconds - predict_step(_config(), PRODUCTS_ONLY).seconds
    tokens = 64 * MODEL.seq_len
    attention = MODEL.num_layers * 2 * tokens * MODEL.seq_len * MODEL.hidden_size
    blocks = attention + MODEL.num_layers * 2 * tokens * 12 * MODEL.hidden_size**2
    assert more * 1e14 == pytest.approx(attention if recompute == "selective" else blocks, rel=1e-9)


@pytest.mark.parametrize("axis", ["tensor_parallel_size", "data_parallel_size", "context_parallel_size"])
def test_four_ranks_take_a_quarter_of_the_products(axis):
    whole, shared = predict_step(_config(), PRODUCTS_ONLY), predict_step(_config(**{axis: 4}), PRODUCTS_ONLY)
    assert shared.seconds == pytest.approx(whole.seconds / 4, rel=1e-6)


def test_the_bubble_of_1f1b_is_the_number_of_other_ranks_over_microbatches():
    # Equal stages: no embedding's or head's products.
    model = dataclasses.replace(MODEL, vocab_size=128, pad_vocab_size_to_multiple_of=1)
    prediction = predict_step(_config(model, pipeline_parallel_size=4, pipeline_cut=(2, 2, 2, 2)), PRODUCTS_ONLY)
    busy = prediction.seconds - prediction.parts["pipeline bubble"]
    assert prediction.parts["pipeline bubble"] / busy == pytest.approx(3 / 32, rel=0.01)


def test_the_head_computes_its_gradients_in_forward():
    # Few products of the blocks: the time of the last stage is its head's.
    model = dataclasses.replace(MODEL, num_layers=2, vocab_size=65536)
    config = _config(model, batch=8, pipeline_parallel_size=2, pipeline_cut=(1, 1))
    own, other = (predict_step(config, PRODUCTS_ONLY, engine=name) for name in ("fused-megatron", "llm-foundry"))

    def seconds(prediction):
        return {action.kind: end - start for action, start, end in prediction.timeline.events[1]}

    head = 2 * 2 * MODEL.seq_len * MODEL.hidden_size * 65536 / 1e14
    assert seconds(own)[Kind.FORWARD] - seconds(other)[Kind.FORWARD] == pytest.approx(2 * head, rel=1e-6)
    assert seconds(other)[Kind.BACKWARD] - seconds(own)[Kind.BACKWARD] == pytest.approx(2 * head, rel=1e-6)
    # Backward adds the gradient, which forward kept, to the gradients of the step: 3 passes in float32.
    slow = dataclasses.replace(PRODUCTS_ONLY, memory_gb_per_s=10.0)
    alone = dataclasses.replace(config, model=dataclasses.replace(model, num_layers=1))
    last = dataclasses.replace(alone, parallel=dataclasses.replace(alone.parallel, pipeline_cut=(1, 0)))
    assert seconds(predict_step(last, slow))[Kind.BACKWARD] == pytest.approx(3 * 4 * 1024 * 65536 / 10e9, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "share"), [({}, 1), ({"tensor_parallel_size": 2}, 2), ({"data_parallel_size": 2}, 2)]
)
def test_the_first_and_the_last_stage_sum_a_tied_table(layout, share):
    slow = dataclasses.replace(PRODUCTS_ONLY, gpus_per_node=1, network_gb_per_s=1.0)
    config = _config(pipeline_parallel_size=4, **layout)

    def seconds(tied, cluster=slow):
        model = dataclasses.replace(MODEL, tied_embeddings=tied)
        return predict_step(dataclasses.replace(config, model=model), cluster).parts["data parallel"]

    # With ZeRO each replica sums its rows.
    assert seconds(True) - seconds(False) == pytest.approx(4 * 32768 * 1024 / share / 1e9, rel=0.02)
    # A gather of gloo also takes passes over memory.
    cpu = dataclasses.replace(slow, device="cpu", gpus_per_node=8, memory_gb_per_s=1.0)
    assert seconds(True, cpu) - seconds(False, cpu) > 10 * (seconds(True) - seconds(False))


def test_tensor_parallel_ranks_send_four_all_reduces_a_block():
    cluster = dataclasses.replace(PRODUCTS_ONLY, node_gb_per_s=10.0)
    prediction = predict_step(_config(tensor_parallel_size=2, overlap=False), cluster, engine="megatron-core")
    activation = 2 * 2 * MODEL.seq_len * MODEL.hidden_size  # bytes of a microbatch
    sent = 32 * (4 * MODEL.num_layers + 2) * activation  # a ring of two sends each byte once
    assert prediction.parts["tensor parallel"] == pytest.approx(sent / 10e9, rel=1e-6)


@pytest.mark.parametrize(("zero_stage", "factor"), [(0, 2 * 4), (1, 4 + 2)])
def test_replicas_reduce_gradients_and_gather_weights(zero_stage, factor):
    cluster = dataclasses.replace(PRODUCTS_ONLY, node_gb_per_s=1.0, transfer_overlap=0.0)
    prediction = predict_step(_config(data_parallel_size=4, zero_stage=zero_stage), cluster, engine="megatron-core")
    layers, hidden = MODEL.num_layers, MODEL.hidden_size
    parameters = layers * (12 * hidden**2 + 13 * hidden) + (MODEL.vocab_size + MODEL.seq_len + 2) * hidden
    assert prediction.parts["data parallel"] == pytest.approx(0.75 * factor * parameters / 1e9, rel=1e-6)


def test_zero_stage_2_reduces_gradients_in_every_microbatch():
    cluster = dataclasses.replace(PRODUCTS_ONLY, node_gb_per_s=1.0, transfer_overlap=0.0)
    prediction = predict_step(_config(data_parallel_size=4, zero_stage=2), cluster, engine="megatron-core")
    layers, hidden = MODEL.num_layers, MODEL.hidden_size
    blocks = layers * (12 * hidden**2 + 13 * hidden)
    parameters = blocks + (MODEL.vocab_size + MODEL.seq_len + 2) * hidden
    sent = 0.75 * (8 * 4 + 2) * parameters  # eight microbatches a replica
    assert prediction.parts["data parallel"] == pytest.approx(sent / 1e9, rel=1e-6)


def test_a_host_that_launches_slowly_sets_the_floor_on_a_gpu_and_adds_on_a_cpu():
    slow = dataclasses.replace(PRODUCTS_ONLY, launch_us=1e4)
    on_gpu, on_cpu = (predict_step(_config(), dataclasses.replace(slow, device=device)) for device in ("cuda", "cpu"))
    products = predict_step(_config(), PRODUCTS_ONLY).seconds
    assert on_gpu.parts["launch floor"] == pytest.approx(on_gpu.seconds - products)
    # The core of a CPU rank has eight threads here, which share the products.
    assert on_cpu.seconds == pytest.approx(on_gpu.seconds + products / 8, rel=1e-6)


LAYOUTS = [
    {},
    {"tensor_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_parallel_size": 4, "stages_per_rank": 2},
    {"pipeline_parallel_size": 2, "schedule": "zb_h1", "data_parallel_size": 2, "zero_stage": 2},
    {"data_parallel_size": 16, "zero_stage": 3},
    {"context_parallel_size": 2, "tensor_parallel_size": 2, "data_parallel_size": 2},
    {"data_parallel_size": 4, "expert_parallel_size": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cluster", ["a100", "b200"])
def test_parts_add_up_and_the_bound_holds(layout, cluster):
    experts = {"num_experts": 8, "linear_biases": False} if "expert_parallel_size" in layout else {}
    config = _config(dataclasses.replace(MODEL, **experts), **layout)
    prediction = predict_step(config, load_cluster(cluster))
    assert tuple(prediction.parts) == PARTS
    assert min(prediction.parts.values()) >= 0
    assert sum(prediction.parts.values()) == pytest.approx(prediction.seconds)
    assert fastest_possible(config, load_cluster(cluster)) <= prediction.seconds
    assert prediction.low_s < prediction.seconds < prediction.high_s
    assert len(prediction.timeline.events) == config.parallel.pipeline_parallel_size


@pytest.mark.parametrize("name", ["node_gb_per_s", "network_gb_per_s", "memory_gb_per_s", "peak_tflops"])
def test_a_faster_machine_is_never_slower(name):
    faster = dataclasses.replace(A100, **{name: 2 * getattr(A100, name)})
    for layout in LAYOUTS[:-1]:
        config = _config(**layout)
        assert predict_step(config, faster).seconds <= predict_step(config, A100).seconds * (1 + 1e-12)


def test_zero_stage_3_over_a_slow_network_is_slow():
    model = dataclasses.replace(MODEL, num_layers=4, hidden_size=4096, num_heads=32)
    slow = dataclasses.replace(A100, network_gb_per_s=0.5)
    times = [predict_step(_config(model, data_parallel_size=32, zero_stage=stage), slow) for stage in (1, 3)]
    assert times[1].parts["data parallel"] > times[0].parts["data parallel"] > 0


def test_missing_sizes_are_one_line():
    with pytest.raises(InputError, match="data_parallel_size=None must be given"):
        predict_step(_config(data_parallel_size=None), A100)
    with pytest.raises(InputError, match=r"model.vocab_size=None must be given.* \(--model.vocab-size 50257\)"):
        predict_step(_config(dataclasses.replace(MODEL, vocab_size=None)), A100)
    with pytest.raises(InputError, match="engine='x' must be one of"):
        predict_step(_config(), A100, engine="x")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_replicas_send_the_bytes_of_the_ledger(tied, zero_stage):
    model = GPTConfig(
        num_layers=3, hidden_size=64, num_heads=4, seq_len=32, vocab_size=1001, tied_embeddings=tied, position="rotary"
    )
    config = _config(model, batch=12, micro=2, data_parallel_size=2, zero_stage=zero_stage)
    cluster = dataclasses.replace(PRODUCTS_ONLY, node_gb_per_s=1e-3, transfer_overlap=0.0)
    transfers = DryRun(config).rank(0).transfers
    num_bytes = sum(transfers[kind, "dp"].num_bytes for kind in ("all_gather", "reduce_scatter"))
    # A ring of two ranks sends half of the bytes of a tensor.
    assert predict_step(config, cluster).parts["data parallel"] == pytest.approx(num_bytes / 2 / 1e6, rel=2e-3)


def test_expert_groups_take_the_order_of_the_mesh():
    model = dataclasses.replace(MODEL, num_experts=16, ffn_hidden_size=512)
    slow = dataclasses.replace(PRODUCTS_ONLY, gpus_per_node=4, network_gb_per_s=10.0)
    sizes = {"data_parallel_size": 8, "expert_dispatch": "all_to_all"}

    def seconds(ep, etp):
        config = _config(model, expert_parallel_size=ep, expert_tensor_parallel_size=etp, **sizes)
        sent = expert_communication_by_axis(config, StageSpan(0, 1, 0, 8)).get("ep", {"all_to_all": 0})["all_to_all"]
        return predict_step(config, slow).parts["expert parallel"], 4 * sent / 10e9

    # Ranks of an expert are neighbours, in a node: only tokens to ranks of the other node take time.
    for (ep, etp), leaving in (((2, 4), 1), ((4, 2), 2 / 3), ((8, 1), 4 / 7), ((4, 1), 0)):
        predicted, whole = seconds(ep, etp)
        assert predicted == pytest.approx(leaving * whole, rel=1e-3, abs=1e-9), (ep, etp)


def test_messages_are_work_of_a_cpu_but_not_of_a_gpu():
    config = _config(pipeline_parallel_size=4, pipeline_cut=(2, 2, 2, 2))
    cpu = dataclasses.replace(PRODUCTS_ONLY, device="cpu", gpus_per_node=4, network_gb_per_s=1.0, memory_gb_per_s=4.0)

    def busy(cluster):
        return predict_step(config, cluster).played.busy

    message = 2 * 2 * MODEL.seq_len * MODEL.hidden_size / 1e9
    fast = dataclasses.replace(cpu, network_gb_per_s=1e12)
    more = [slow - quick for slow, quick in zip(busy(cpu), busy(fast), strict=True)]
    # Ranks in the middle have four messages a microbatch, both ends have two.
    assert more == pytest.approx([32 * number * message for number in (2, 4, 4, 2)], rel=1e-6)
    assert busy(PRODUCTS_ONLY) == busy(dataclasses.replace(PRODUCTS_ONLY, network_gb_per_s=1.0))
    # A link that is slower than the copies (8 passes over memory) keeps no core busy.
    copied, linked = (busy(dataclasses.replace(cpu, network_gb_per_s=speed)) for speed in (0.5, 0.01))
    assert copied == pytest.approx(linked)


def test_a_ring_of_a_cpu_sends_through_gloo_and_attends_in_tiles():
    whole, ring = (_config(context_parallel_size=2, context_parallel_method=name) for name in ("all_to_all", "ring"))
    cpu = dataclasses.replace(PRODUCTS_ONLY, device="cpu", gpus_per_node=2)
    attention = MODEL.num_layers * 4 * 64 * MODEL.seq_len**2 * MODEL.hidden_size / 2 * 3.5 / 2 / 1e14
    assert predict_step(ring, cpu).seconds - predict_step(whole, cpu).seconds == pytest.approx(attention, rel=1e-3)
    slow = dataclasses.replace(cpu, network_gb_per_s=1.0)
    sent, none = (predict_step(config, slow).parts["context parallel"] for config in (ring, whole))
    assert sent > 0.1 and none < 1e-9
