"""Start here when a training step makes the host wait for the device more than once, or changes refused weights."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.step_sums import StepSums, start_sums, sum_over_ranks
from fused_megatron.assembly.training_step import StepUnderWay, begin_step
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.stochastic_state import StochasticState
from fused_megatron.planning.recorded_step import STEP, fake_ranks, record_fake_step
from fused_megatron.sharding import parameter_parts
from fused_megatron.sharding.gradient_norm import clip_coefficient, clip_coefficient_on_device
from fused_megatron.testing.host_waits import HostWaits

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_len": 8, "vocab_size": 32}
NUM_FLAGS = 7  # of the recorded step
LLAMA = {"position": "rotary", "normalization": "rms_norm", "num_kv_heads": 1, "query_key_norm": True}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "capacity_factor": 1.25, "balance_loss": 0.1}


def config_of(
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **parallel: Any,
) -> TrainConfig:
    return TrainConfig(
        GPTConfig(**MODEL | (model or {})),
        ParallelConfig(**{"data_parallel_size": 1} | parallel),
        DataConfig(),
        OptimizerConfig(**optimizer or {}),
        TrainingConfig(**{"global_batch_size": 4, "microbatch_size": 1} | (training or {})),
    )


def assembled(config: TrainConfig, device: str = "cpu") -> Assembly:
    mesh, plan = build_mesh(config, device), plan_pipeline(config)
    return assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device(device)))


def batch_of(config: TrainConfig, seed: int = 0, document_starts: torch.Tensor | None = None) -> Batch:
    rows = config.training.global_batch_size // (config.parallel.data_parallel_size or 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MODEL["vocab_size"], (rows, MODEL["seq_len"] + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:], document_starts=document_starts)


def begin(assembly: Assembly, batch: Batch, flags: Sequence[float] = (0.0,) * 3, **options: Any) -> StepUnderWay:
    config = assembly.config
    return begin_step(
        assembly,
        lambda: batch,
        step=0,
        lr=1e-2,
        num_targets=config.training.global_batch_size * MODEL["seq_len"],
        group=dist.group.WORLD if assembly.mesh.world_size > 1 else None,
        flags=lambda: flags,
        num_refusing=2,
        **options,
    )


def run_step(assembly: Assembly, batch: Batch, flags: Sequence[float] = (0.0,) * 3) -> StepSums:
    return begin(assembly, batch, flags).finish(lambda sums: None)


@pytest.mark.parametrize(("ranks", "stage"), [((1, 1, 1), None), ((2, 2, 2), 0), ((2, 2, 2), 1)], ids=str)
def test_the_host_waits_once_and_one_small_message_is_summed(ranks: tuple[int, int, int], stage: int | None) -> None:
    tp, pp, dp = ranks
    config = config_of(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, zero_stage=stage)
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


FORMS: dict[str, TrainConfig] = {
    "plain": config_of(),
    "llama": config_of(LLAMA, training={"dtype": "bfloat16"}, tensor_parallel_size=2, sequence_parallel=True),
    "dropout": config_of({"hidden_dropout": 0.1, "attention_dropout": 0.1}, {"state_dtype": "bfloat16"}),
    "experts": config_of(EXPERTS, {"clip_norm": 0.0}),
    "replicas": config_of(training={"dtype": "bfloat16"}, data_parallel_size=2, zero_stage=0),
    "state": config_of(training={"dtype": "bfloat16"}, data_parallel_size=2, zero_stage=1),
    "gradients": config_of(training={"dtype": "bfloat16"}, data_parallel_size=2, zero_stage=2),
    "weights": config_of(training={"dtype": "bfloat16"}, data_parallel_size=2, zero_stage=3),
    "sgd": config_of(optimizer={"kind": "sgd"}),
    "muon": config_of(optimizer={"kind": "muon"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_host_waits_once_at_the_end_of_a_step(form: str) -> None:
    """Forward, backward and update of several microbatches on the meta device, which stands for a GPU.

    The batch is sent in two tensors from pinned memory, and loss, norm, flags and loads of experts come back in one.
    """
    config = FORMS[form]
    with fake_ranks(0, config.parallel.num_ranks):
        assembly = assembled(config, "meta")
        for _ in range(2):  # the second step has state and gathered weights
            updates: list[int] = []
            with HostWaits() as waits:
                begun = begin(assembly, batch_of(config), before_update=lambda u=updates, w=waits: u.append(w.fetched))
                is_updated = len(updates) == 1
                begun.finish(lambda sums: None)
            assert (waits.places, waits.sent, waits.fetched) == ([], 2, 1)
            # The copy is queued before the update, so that the host does not wait for the update.
            assert updates == [1] and is_updated == (form not in ("sgd", "muon"))


def test_lengths_of_documents_stay_on_the_host() -> None:
    starts = torch.zeros(4, MODEL["seq_len"], dtype=torch.bool)
    starts[:, 0] = starts[1, 3] = True
    config = config_of()
    with HostWaits() as waits:
        run_step(assembled(config, "meta"), batch_of(config, document_starts=starts))
    assert (waits.places, waits.sent, waits.fetched) == ([], 2, 1)


@pytest.mark.parametrize(
    ("wait", "op"),
    [
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: x.cpu(), "aten::_to_copy"),
        (lambda x: torch.ones(3).to("meta"), "aten::_to_copy"),
        (lambda x: torch.ones(3).to("meta", non_blocking=True), "aten::_to_copy"),
        (lambda x: torch.ones(3, 2).pin_memory()[:, 0].to("meta", non_blocking=True), "aten::_to_copy"),
        (lambda x: x.copy_(torch.ones(3)), "aten::copy_"),
        (lambda x: x[torch.tensor([0, 1])], "aten::index"),
        (lambda x: torch.tensor([1.0, 2.0], device="meta"), "tensor"),
        (lambda x: x.new_tensor(3.0), "new_tensor"),
        (lambda x: x.nonzero(), "aten::nonzero"),
    ],
)
def test_every_wait_is_seen(wait: Callable[[torch.Tensor], Any], op: str) -> None:
    x = torch.zeros(3, device="meta")
    with HostWaits() as waits, torch.no_grad(), contextlib.suppress(NotImplementedError):  # nonzero has no meta kernel
        wait(x)
    assert waits.places == [f"{op} in the caller"]


@pytest.mark.parametrize(
    ("training", "optimizer"), [({}, {}), ({"dtype": "bfloat16"}, {"state_dtype": "bfloat16"})], ids=["32", "16"]
)
@pytest.mark.parametrize("refusal", ["nan", "flag"])
def test_a_refused_step_changes_nothing(training: dict[str, Any], optimizer: dict[str, Any], refusal: str) -> None:
    """The device refuses the update before the host knows of it; the next step is the same as without the refused."""
    config = config_of(EXPERTS | {"router_bias_rate": 0.5, "balance_loss_over": "step"}, optimizer, training)
    assembly, alone = assembled(config), assembled(config)
    for each in (assembly, alone):
        run_step(each, batch_of(config))
    before = {name: tensor.clone() for name, tensor in tensors_of(assembly).items()}
    weight = next(iter(assembly.parameters.values()))
    handle = weight.register_hook(lambda grad: grad * float("nan")) if refusal == "nan" else None

    def judge(sums: StepSums) -> None:
        assert (sums.finite, sums.flags) == ((False, [0.0, 0.0, 1.0]) if handle else (True, [0.0, 1.0, 0.0]))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        begin(assembly, batch_of(config, 1), flags=[0.0, 0.0, 1.0] if handle else [0.0, 1.0, 0.0]).finish(judge)
    for name, tensor in tensors_of(assembly).items():
        assert torch.equal(tensor, before[name]), name
    if handle:
        handle.remove()
    for each in (assembly, alone):  # a flag behind the first two refuses nothing
        each.optimizer.set_step(1)
        run_step(each, batch_of(config, 2), flags=[0.0, 0.0, 3.0])
    for name, tensor in tensors_of(alone).items():
        assert torch.equal(tensor, tensors_of(assembly)[name]), name
    assert not any(torch.equal(tensors_of(assembly)[name], before[name]) for name in assembly.parameters)


def tensors_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    """Return weights, optimizer state, and the state of routers."""
    state = {f"{name}.{kind}": x for name, of in assembly.optimizer.state().items() for kind, x in of.items()}
    routers = {
        f"{block}.{name}": buffer
        for block, router in assembly.expert_loads.routers.items()
        for name, buffer in router.named_buffers()
        if name in ("selection_bias", "previous_load")
    }
    assert routers
    return {**{name: p.detach() for name, p in assembly.parameters.items()}, **state, **routers}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 0.37])
def test_the_device_clips_with_the_bits_of_the_host(clip_norm: float) -> None:
    norms = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).exp().float().tolist()
    for norm in [0.0, clip_norm, 1e-30, 3e38, *norms]:
        ours = clip_coefficient_on_device(torch.tensor(norm, dtype=torch.float64), clip_norm)
        assert ours.dtype == torch.float32
        assert ours.item() == torch.tensor(clip_coefficient(norm, clip_norm), dtype=torch.float32).item()


def test_an_update_by_the_sums_of_the_host_has_the_same_bits() -> None:
    config = config_of(optimizer={"clip_norm": 0.05})
    on_device, on_host = assembled(config), assembled(config)
    for step in range(3):
        batch = batch_of(config, step)
        sums = run_step(on_device, batch)
        assert sums.gradient_norm > 0.05, "clipping must clip"
        on_host.gradients.zero_()
        loss = on_host.accumulate_batch(batch, 0, config.training.global_batch_size * MODEL["seq_len"])
        found = sum_over_ranks(on_host, loss, (), None)
        assert (found.loss, found.gradient_norm) == (sums.loss, sums.gradient_norm)
        on_host.update(1e-2, clip_coefficient(found.gradient_norm, 0.05))
    for name, parameter in on_host.parameters.items():
        assert torch.equal(parameter, on_device.parameters[name]), name


def test_rounding_of_state_makes_no_tensor_from_a_list() -> None:
    """The meta device has no state to round: this looks on a CPU for the op that torch.tensor ends with."""
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.extend([str(func)] if func is torch.ops.aten.lift_fresh.default else [])
            return func(*args, **(kwargs or {}))

    parameter = torch.nn.Parameter(torch.zeros(3, 5))
    rounding = StochasticState({"a": parameter_parts(parameter)}, seed=1)
    narrow = torch.zeros(3, 5, dtype=torch.bfloat16)
    with Made():
        rounding.store("a", 1, [torch.rand(3, 5)], [narrow])
    assert not made and narrow.any()


class Kernels(TorchDispatchMode):
    """Names of the ops that are no views, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.extend([] if func.is_view else [func._schema.name])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_is_one_pass_after_the_norm(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op reads all gradients; one op a group clips, updates, rounds and zeroes: as many in a deeper model."""
    found = []
    for num_layers in (1, 5):
        config = config_of({"num_layers": num_layers}, training={"dtype": dtype})
        assembly = assembled(config)
        run_step(assembly, batch_of(config))  # it has set the gradients to 0
        assembly.gradients.begin()
        loss_sum = assembly.accumulate_batch(batch_of(config, 1), 1, 32)
        with Kernels() as kernels:
            sums = start_sums(assembly, loss_sum, [0.0] * 3, 2, None)
            assembly.update(1e-2, sums.gradient_scale(1.0), sums.refused)
            sums.read()
            assembly.gradients.begin()
        found.append(kernels.names)
    assert found[0] == found[1]
    assert found[0].count("fused_megatron::sum_of_squares") == 1
    assert found[0].count("fused_megatron::adamw_") == 2  # with and without weight decay
    assert len(found[0]) < 35, "the other ops read a few numbers each"


@pytest.mark.parametrize("stage", [0, 2])
def test_the_update_sets_the_gradients_to_0(stage: int) -> None:
    """A step begins without a pass over them, unless a backward has run since."""
    config = config_of(training={"dtype": "bfloat16"}, zero_stage=stage)
    assembly = assembled(config)
    run_step(assembly, batch_of(config))
    assert assembly.gradients.were_zeroed
    assert not any(gradient.any() for gradient in assembly.gradients.by_name(assembly.parameters).values())
    assembly.accumulate_batch(batch_of(config, 1), 1, 32)
    assert not assembly.gradients.were_zeroed
    assembly.gradients.begin()
    assert not any(gradient.any() for gradient in assembly.gradients.by_name(assembly.parameters).values())
