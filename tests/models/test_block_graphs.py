"""Start here when training.cuda_graphs changes a number, or a block does something that a CUDA graph cannot replay."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.config import (
    BERTConfig,
    DataConfig,
    GPTConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.models import GPT
from fused_megatron.models.block_graphs import capture_blocks
from fused_megatron.models.dropout import BatchSlice
from fused_megatron.models.residual_stream import closed
from fused_megatron.sharding import Replicas
from fused_megatron.testing.recorded_graphs import HostInGraphError, recorded_graphs
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "seq_len": 7, "vocab_size": 29}
LLAMA = {"position": "rotary", "normalization": "rms_norm", "num_kv_heads": 2, "query_key_norm": True}
FORMS: dict[str, dict[str, Any]] = {
    "learned": {},
    "llama": LLAMA | {"activation": "swiglu", "linear_biases": False, "tied_embeddings": False},
    "window": {"sliding_window": 3, "embedding_dropout": 0.2},
    "selective": LLAMA | {"recompute": "selective"},
}


def model_of(form: dict[str, Any], dtype: torch.dtype, captured: bool) -> tuple[GPT, GradientBuckets]:
    model = GPT(GPTConfig(**SMALL | form), seed=3, dtype=dtype)
    buckets = GradientBuckets(list(model.parameters()), Replicas())
    if captured:
        with recorded_graphs():
            capture_blocks(model, 3, torch.cuda.make_graphed_callables)
        buckets.zero_()
    return model, buckets


def microbatch(index: int) -> tuple[torch.Tensor, torch.Tensor, BatchSlice]:
    tokens = torch.randint(29, (3, 8), generator=torch.Generator().manual_seed(index))
    return tokens[:, :-1], tokens[:, 1:], BatchSlice(index // 3, 3 * (index % 3), 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_replay_has_the_numbers_of_the_block(form: str, dtype: torch.dtype) -> None:
    """Losses and float32 gradients over three microbatches and an update, bit for bit, by torch's own code for graphs.

    A recorded graph stands for a CUDA graph: it runs only ops, on the recorded addresses and with the recorded numbers.
    """
    found = []
    for captured in (False, True):
        model, buckets = model_of(FORMS[form], dtype, captured)
        losses, gradients = [], []
        for step in range(2):
            buckets.zero_()
            for index in range(3):
                tokens, targets, rows = microbatch(3 * step + index)
                loss = model(tokens, targets, batch_slice=rows)
                # Another gradient for each token: not ones.
                (loss * (1.0 + torch.arange(7) / 7)).sum().backward()
                losses.append(loss.detach().clone())
            buckets.finish()
            gradients += [buckets[p].clone() for p in model.parameters()]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * buckets[parameter].to(dtype)
        found.append(losses + gradients)
    assert all(map(torch.equal, *found)) and len(found[0]) == len(found[1])
    assert all(gradient.any() for gradient in found[0])


def test_evaluation_runs_the_block_itself() -> None:
    """Of any shape, without gradients, and with a cache or other keyword arguments."""
    plain, replayed = (model_of(LLAMA, torch.float32, captured)[0] for captured in (False, True))
    tokens = torch.randint(29, (5, 4), generator=torch.Generator().manual_seed(1))
    for model in (plain, replayed):
        model.eval()
    with torch.no_grad():
        assert torch.equal(plain(tokens), replayed(tokens))
    replayed.train()
    with torch.no_grad():
        assert torch.equal(plain(tokens), replayed(tokens))


def test_another_call_than_the_captured_one_is_refused() -> None:
    model, _ = model_of(LLAMA, torch.float32, True)
    tokens, targets, _ = microbatch(0)
    with pytest.raises(InputError, match=r"x\.shape=\(7, 2, 24\) must be \(7, 3, 24\), as in the captured graph"):
        model(tokens[:2], targets[:2])
    with pytest.raises(InputError, match=r"mask=.* must be .*, as in the captured graph"):
        model(tokens, targets, documents=torch.tensor([0, 7, 9, 21]))
    with pytest.raises(InputError, match=r"rotary=\(7, 3, 3\) must be \(7, 3\), as in the captured graph"):
        model(tokens, targets, positions=torch.zeros(3, 7, dtype=torch.int64))
    with recorded_graphs(), pytest.raises(InputError, match=r"hidden_dropout=0\.1 and attention_dropout=0"):
        model_of({"hidden_dropout": 0.1}, torch.float32, True)
    with pytest.raises(InputError, match="cuda_graphs='block' needs a GPU, and this run is on cpu"):
        capture_blocks(GPT(GPTConfig(**SMALL)), 3)


def test_a_capture_that_reads_a_value_is_refused() -> None:
    """The stand-in is as strict as a GPU."""
    model = GPT(GPTConfig(**SMALL))
    model.blocks["1"].attention.register_forward_pre_hook(lambda _, x: (x[0] * float(x[0].sum() > 0), *x[1:]))
    with recorded_graphs(), pytest.raises(HostInGraphError, match="_local_scalar_dense while a graph is captured"):
        capture_blocks(model, 3, torch.cuda.make_graphed_callables)


def test_dropout_in_a_graph_would_drop_the_same_elements_each_time() -> None:
    """Why the config refuses it: the first sample of a microbatch is a number of the host, which the graph keeps."""
    (dropout_of_first, _), (plain, _) = (model_of({"hidden_dropout": 0.3}, torch.float32, False) for _ in range(2))
    assert plain(*microbatch(0)[:2], batch_slice=BatchSlice(0, 0, 9)).tolist() != (
        plain(*microbatch(0)[:2], batch_slice=BatchSlice(0, 3, 9)).tolist()
    )
    traces = [trace_of(dropout_of_first, first_sample, "cpu") for first_sample in (0, 3)]
    assert traces[0] != traces[1]


class Trace(TorchDispatchMode):
    """Names, shapes and numbers of all ops, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def shown(x: Any) -> Any:
            if isinstance(x, torch.ScriptObject):  # a group, or the kind of a reduction
                return "object"
            return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

        self.ops.append(f"{func} {tree_map(shown, (args, kwargs))}")
        return func(*args, **(kwargs or {}))


def trace_of(model: GPT, first_sample: int, device: str) -> list[str]:
    """Return the ops of one block of the model, forward and backward, in a microbatch."""
    kept: list[str] = []
    block, trace = model.blocks["1"], Trace()
    forward = block.forward

    def traced(*arguments: Any, **options: Any) -> Any:
        x = closed(arguments[0]).detach().requires_grad_()
        options["may_leave_open"] = False
        with trace:
            y = forward(x, *arguments[1:], **options)
            y.backward(torch.zeros_like(y))
        kept.extend(trace.ops)
        return y.detach()

    block.forward = traced
    try:
        tokens = torch.zeros(3, 7 if not model.sequence_parallel else 8, dtype=torch.int64, device=device)
        model(tokens, tokens, batch_slice=BatchSlice(1, first_sample, 9))
    finally:
        block.forward = forward
    return kept


@pytest.fixture
def two_fake_ranks() -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield fm.init_mesh(tensor_parallel_size=2)
    dist.destroy_process_group()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_each_microbatch_runs_the_same_ops(form: str, sequence_parallel: bool, two_fake_ranks: Any) -> None:
    """On the meta device, which stands for a GPU: the same kernels, shapes and numbers, forward and backward."""
    config = GPTConfig(**SMALL | FORMS[form] | {"seq_len": 8})
    layout = two_fake_ranks.layout(sequence_parallel=sequence_parallel)
    model = GPT(config, device="meta", dtype=torch.bfloat16, layout=layout)
    GradientBuckets(list(model.parameters()), Replicas())
    first, second = (trace_of(model, first_sample, "meta") for first_sample in (0, 3))
    assert first == second and len(first) > 30


REFUSED: dict[str, dict[str, Any]] = {
    "hidden_dropout=0.1, which drops": {"hidden_dropout": 0.1},
    "attention_dropout=0.1, which drops": {"attention_dropout": 0.1},
    r"recompute='full' \(recompute='selective' works\)": {"recompute": "full"},
    "num_experts=4, whose": {"num_experts": 4},
    "mask_documents=True, whose": {"mask_documents": True},
    "pipeline_parallel_size=2, where": {"pipeline_parallel_size": 2},
    "context_parallel_size=2": {"context_parallel_size": 2},
    "zero_stage=2, whose": {"zero_stage": 2},
    "zero_stage=3, whose": {"zero_stage": 3},
    "model.family='bert', whose": {"num_token_types": 2},
}


@pytest.mark.parametrize("text", REFUSED)
def test_configs_that_no_graph_can_keep(text: str) -> None:
    """One line names the setting. Without graphs, the same config is valid."""

    def config_of(cuda_graphs: str) -> TrainConfig:
        kind = BERTConfig if "num_token_types" in REFUSED[text] else GPTConfig
        sections = {"model": kind(**SMALL), "parallel": ParallelConfig(), "data": DataConfig()}
        for name, section in sections.items():
            fields = {field.name for field in dataclasses.fields(section)}
            own = {key: value for key, value in REFUSED[text].items() if key in fields}
            sections[name] = dataclasses.replace(section, **own)
        return TrainConfig(**sections, optimizer=OptimizerConfig(), training=TrainingConfig(cuda_graphs=cuda_graphs))

    config_of("off")
    with pytest.raises(InputError, match=f"^cuda_graphs='block' must be 'off' with {text}"):
        config_of("block")


def steps_of_replicas(rank: int, world_size: int, zero_stage: int, captured: bool) -> list[torch.Tensor]:
    """Return this rank's weights after three steps of two microbatches on data-parallel ranks."""
    from fused_megatron.assembly.assemble import assemble  # noqa: PLC0415 - a room above models
    from fused_megatron.assembly.build import build_mesh, build_stages  # noqa: PLC0415
    from fused_megatron.assembly.pipeline_plan import plan_pipeline  # noqa: PLC0415
    from fused_megatron.assembly.training_step import training_step  # noqa: PLC0415
    from fused_megatron.data.batch import Batch  # noqa: PLC0415

    training = TrainingConfig(global_batch_size=4 * world_size, microbatch_size=2, dtype="bfloat16", bucket_mb=1e-3)
    parallel = ParallelConfig(zero_stage=zero_stage)
    config = TrainConfig(GPTConfig(**SMALL | LLAMA), parallel, DataConfig(), OptimizerConfig(), training)
    mesh, plan = build_mesh(config), plan_pipeline(config)
    assembly = assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))
    if captured:
        with recorded_graphs():
            capture_blocks(assembly.model.stages[0], 2, torch.cuda.make_graphed_callables)
    for step in range(3):
        tokens = torch.randint(29, (4, 8), generator=torch.Generator().manual_seed(10 * rank + step))
        training_step(
            assembly,
            lambda rows=tokens: Batch(rows[:, :-1], rows[:, 1:]),
            step=step,
            lr=1e-2,
            num_targets=28 * world_size,
            group=dist.group.WORLD,
            flags=lambda: [0.0],
            num_refusing=1,
            judge=lambda sums: None,
        )
    assembly.weights.finish()
    return [parameter.detach().clone() for parameter in assembly.parameters.values()]


def test_replicas_reduce_and_gather_around_the_graphs() -> None:
    """Buckets are sent as the backward of each block ends; a block waits for its gathered weights before it runs."""
    cases = run_cases_on_ranks(steps_of_replicas, 2, [(0, False), (0, True), (1, False), (1, True)])
    for plain, captured in zip(cases[::2], cases[1::2], strict=True):
        for of_plain, of_captured in zip(plain, captured, strict=True):
            assert all(map(torch.equal, of_plain, of_captured))
