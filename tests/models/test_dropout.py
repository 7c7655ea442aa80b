"""Start here when dropout or recomputation changes the numbers of a layout."""

from typing import Any

import pytest
import torch

from fused_megatron import models
from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, ParallelConfig, TrainConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT, BatchSlice, TransformerBlock, cut_stages
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.ops.attention import AttentionMask, attend
from fused_megatron.planning.verify.config_check import verify_config
from fused_megatron.sharding import Replicas, SequenceLayout
from fused_megatron.tensor_parallel import parameter_parts
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks

LAYERS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "seq_len": 8, "ffn_hidden_size": 44,
    "vocab_size": 101, "pad_vocab_size_to_multiple_of": 48, "init_std": 0.1, "activation": "swiglu",
    "normalization": "rms_norm", "position": "rotary",
}  # fmt: skip
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "embedding_dropout": 0.1}
BATCH, STEP = 8, 3


def batch_of_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, targets and an upstream gradient, each [B, S]."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(101, (BATCH, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.randn(BATCH, 8, generator=generator)


def one_step(
    rank: int, world_size: int, tp: int, sequence_parallel: bool, microbatch: int, changes: dict[str, Any]
) -> tuple[int, torch.Tensor, dict[str, Any]]:
    """Return this rank's losses [B / dp, S], and the shard and gradient of every full parameter."""
    mesh = init_mesh(tp)
    config = GPTConfig(**{**LAYERS, **DROPOUT, **changes})
    model = GPT(config, layout=mesh.layout(sequence_parallel=sequence_parallel), seed=3)
    buckets = GradientBuckets(list(model.parameters()), Replicas.of_copies(mesh.dp_group))
    count = BATCH // mesh.dp_size
    torch.manual_seed(100 + rank)  # torch's random state must not matter
    losses = []
    for first in range(mesh.dp_rank * count, (mesh.dp_rank + 1) * count, microbatch):
        tokens, target, upstream = (part[first : first + microbatch] for part in batch_of_tokens())
        loss = model(tokens, target, batch_slice=BatchSlice(STEP, first, BATCH))
        loss.backward(upstream)
        losses.append(loss.detach())
    buckets.reduce_after_backwards(1)
    buckets.finish()
    gradients = {
        part.full_name(name): (part.shard, part.of(buckets[p])[: part.shard.real_shape(part.of(p).shape)[0]].clone())
        for name, p in model.named_parameters()
        for part in parameter_parts(p)
    }
    return mesh.dp_rank, torch.cat(losses), gradients


@pytest.fixture(scope="module")
def one_process() -> Any:
    """Return losses and gradients of one process, by kind of recomputation."""
    ways = "none", "selective", "full"
    found = run_cases_on_ranks(one_step, 1, [(1, False, BATCH, {"recompute": way}) for way in ways])
    return {way: rank for way, (rank,) in zip(ways, found, strict=True)}


LAYOUTS: dict[int, list[tuple[int, bool, int, dict[str, Any]]]] = {  # by ranks: tp, sequence_parallel, microbatch, ...
    2: [(2, False, 8, {}), (2, True, 4, {"recompute": "selective"}), (1, False, 2, {})],
    4: [(4, True, 8, {"recompute": "full"}), (2, True, 1, {"recompute": "full"})],
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_drops_the_same(one_process: Any, world_size: int) -> None:
    cases = LAYOUTS[world_size]
    for (tp, *_), ranks in zip(cases, run_cases_on_ranks(one_step, world_size, cases), strict=True):
        assert_equals_one_process(ranks, tp, one_process["none"])


def assert_equals_one_process(ranks: list[Any], tp: int, one: Any) -> None:
    _, losses, expected = one
    torch.testing.assert_close(torch.cat([found for _, found, _ in ranks[::tp]]), losses, rtol=2e-6, atol=2e-6)
    for _, _, gradients in ranks:
        for name, (shard, gradient) in gradients.items():
            full = expected[name][1]
            mine = full[tuple(slice(o, o + n) for o, n in zip(shard.offset, gradient.shape, strict=True))]
            if gradient.numel():
                error = (gradient - mine).abs().max() / full.abs().max().clamp(min=1e-3)
                assert error < 2e-5, f"tp={tp}: {name}: {error:.1e}"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_replays_dropout_bit_for_bit(one_process: Any, recompute: str) -> None:
    _, losses, gradients = one_process[recompute]
    _, expected_losses, expected = one_process["none"]
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(gradient, expected[name][1]) for name, (_, gradient) in gradients.items())


def model_of(**changes: Any) -> GPT:
    return GPT(GPTConfig(**{**LAYERS, **changes}), seed=3)


def losses_of(model: GPT, batch_slice: BatchSlice | None = None) -> torch.Tensor:
    tokens, target, _ = batch_of_tokens()
    return model(tokens, target, batch_slice=batch_slice).detach()


def test_masks_follow_step_and_seed_and_places_differ() -> None:
    model = model_of(**DROPOUT)
    first, again, later = (losses_of(model, BatchSlice(step, 0, BATCH)) for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)
    states = model.get_buffer("dropout_states")
    assert len(set(states[:, 0].tolist())) == states.shape[0] == 1 + 4 * 2
    assert not torch.equal(states, GPT(model.config, seed=4).get_buffer("dropout_states"))


@pytest.mark.parametrize("kind", list(DROPOUT))
def test_each_kind_drops_its_share_and_keeps_the_mean(kind: str) -> None:
    plain, model = model_of(), model_of(**{kind: 0.5})
    dropped = torch.stack([losses_of(model, BatchSlice(step, 0, BATCH)) for step in range(3)])
    assert (dropped != losses_of(plain)).float().mean() > 0.9
    # Nothing is dropped if the probability is below 2^-32: another path through attention gives the same numbers.
    nothing = model_of(**{kind: 1e-10})
    torch.testing.assert_close(losses_of(nothing, BatchSlice(0, 0, BATCH)), losses_of(plain), rtol=1e-6, atol=1e-6)


def test_the_old_names_of_a_batch_slice_work_for_a_release_and_warn() -> None:
    model, (tokens, target, _) = model_of(**DROPOUT), batch_of_tokens()
    with pytest.warns(DeprecationWarning, match="BatchPosition is now called BatchSlice"):
        old = models.BatchPosition(1, 0, BATCH)
    with pytest.warns(DeprecationWarning, match=r"position= of GPT.forward\(\) is now called batch_slice=") as warned:
        losses = model(tokens, target, position=old)
    assert warned[0].filename == __file__
    assert torch.equal(losses, losses_of(model, BatchSlice(1, 0, BATCH)))


def test_evaluation_drops_nothing() -> None:
    assert torch.equal(losses_of(model_of(**DROPOUT).eval()), losses_of(model_of()))


def test_dropout_asks_where_it_is() -> None:
    with pytest.raises(InputError, match="batch_slice=None must be given where the model drops elements"):
        losses_of(model_of(**DROPOUT))
    with pytest.raises(InputError, match=r"first_sample=2 \+ tokens.shape\[0\]=8 must be at most global_batch_size=8"):
        losses_of(model_of(**DROPOUT), BatchSlice(0, 2, BATCH))
    with pytest.raises(InputError, match=r"first_sample=8 must be in \[0, global_batch_size=8\)"):
        BatchSlice(0, BATCH, BATCH)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_keeps_less(recompute: str) -> None:
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    model = model_of(**DROPOUT, recompute=recompute)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        x = torch.randn(8, BATCH, 24, requires_grad=True)
        sequence = SequenceLayout.whole(8)
        masks = model._masks(BATCH, sequence, BatchSlice(0, 0, BATCH))
        model._blocks(x, AttentionMask(causal=True), masks, model._rotary(sequence, x))
    # Without recomputation four tensors a layer are [S, B, N, S] (scores, softmax, dropped); with full none is.
    probabilities = [n for n in kept if n == BATCH * 4 * 8 * 8]
    assert bool(probabilities) == (recompute == "none")
    if recompute == "full":
        assert sum(n for n in kept if n >= 24 * 24) <= 2 * x.numel()


@pytest.mark.parametrize(("build", "message"), [
    (lambda: GPTConfig(num_heads=4, num_kv_heads=3), "num_heads=4 must be divisible by num_kv_heads=3 (nearest: 3, 6)"),
    (lambda: GPTConfig(activation="relu"),
     "activation='relu' must be one of: 'gelu', 'swiglu', 'geglu', 'gelu_exact'"),
    (lambda: GPTConfig(recompute="all"), "recompute='all' must be one of: 'none', 'selective', 'full'"),
    (lambda: GPTConfig(hidden_dropout=1.0), "hidden_dropout=1.0 must lie in [0, 1)"),
    (lambda: GPTConfig(position="rotary", rotary_fraction=0.01),
     "rotary_fraction=0.01 must leave a pair of the 64 elements of a head to rotate (at least 0.03125)"),
    (lambda: GPTConfig(hidden_size=24, num_heads=5),
     "hidden_size=24 must be divisible by num_heads=5 (nearest: 20, 25)"),
])  # fmt: skip
def test_settings_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value) == message


def refused(rank: int, world_size: int) -> list[str]:
    layout = init_mesh(world_size).layout()
    messages = []
    for changes in ({"num_heads": 6, "num_kv_heads": 3}, {"num_heads": 12, "num_kv_heads": 6}, {"ffn_hidden_size": 46}):
        with pytest.raises(InputError) as caught:
            TransformerBlock(GPTConfig(**{**LAYERS, **changes}), layout=layout)
        messages.append(str(caught.value))
    return messages


def test_heads_and_widths_that_ranks_do_not_divide() -> None:
    for messages in run_on_ranks(refused, 4):
        assert messages == [
            "num_heads=6 must be divisible by tensor_parallel_size=4 (nearest: 4, 8)",
            "num_kv_heads=6 must divide tensor_parallel_size=4, or be divisible by it (nearest: 4, 8)",
            "ffn_hidden_size=46 must be divisible by tensor_parallel_size=4 (nearest: 44, 48)",
        ]


FAST = {"hidden_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout_kernel": "fast"}


def test_the_mask_of_the_kernel_is_the_same_when_recomputed_and_leaves_the_generator() -> None:
    """Losses and gradients of the three forms of recomputation are equal bit for bit, whatever torch's seed is."""
    found = [
        one_step(0, 1, 1, False, 4, {**FAST, "recompute": recompute}) for recompute in ("none", "selective", "full")
    ]
    for _, losses, gradients in found[1:]:
        assert torch.equal(losses, found[0][1])
        assert all(torch.equal(gradient, found[0][2][name][1]) for name, (_, gradient) in gradients.items())
    _, exact, _ = one_step(0, 1, 1, False, 4, {**FAST, "attention_dropout_kernel": "exact"})
    _, none, _ = one_step(0, 1, 1, False, 4, {**FAST, "attention_dropout": 0.0})
    assert not torch.equal(found[0][1], exact) and not torch.equal(found[0][1], none)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    dropout = masks(step=1).in_kernel(0, 0.5, first_head=0)
    attend(
        *torch.randn(3, 5, 2, 4, 8, generator=torch.Generator().manual_seed(0)), AttentionMask(True), dropout=dropout
    )
    assert torch.equal(torch.rand(3), wanted)


def masks(step: int, first_sample: int = 0, first_site: int = 0) -> DropoutMasks:
    states = torch.zeros(3, 2, dtype=torch.int64)
    return DropoutMasks(
        states, BatchSlice(step, first_sample, 8), SequenceLayout.whole(5), seed=4, first_site=first_site
    )


def test_every_site_step_microbatch_and_rank_has_another_mask_of_the_kernel() -> None:
    ones = torch.ones(64, 1, 4, 64)
    value = torch.eye(64)[:, None, None].expand(64, 1, 4, 64)  # the context is the probabilities
    drawn = []
    for dropout in (
        masks(1).in_kernel(0, 0.25, 0),
        masks(2).in_kernel(0, 0.25, 0),
        masks(1, first_sample=4).in_kernel(0, 0.25, 0),
        masks(1).in_kernel(1, 0.25, 0),
        masks(1).in_kernel(0, 0.25, 4),
        masks(1, first_site=4).in_kernel(0, 0.25, 0),
    ):
        context = attend(0 * ones, ones, value, AttentionMask(), dropout=dropout)
        # Uniform attention: a probability is dropped, or 1 / 64 / (1 - p).
        torch.testing.assert_close(context, (context != 0) / 48)
        assert abs((context == 0).float().mean() - 0.25) < 0.02
        drawn.append(context == 0)
    # Independent masks agree where both drop or both keep: 0.25^2 + 0.75^2.
    for i, mask in enumerate(drawn):
        assert all(abs((mask == other).float().mean() - 0.625) < 0.02 for other in drawn[:i])
    assert masks(1).rows(1, 3).in_kernel(0, 0.25, 0) == masks(1).in_kernel(1, 0.25, 0)


def test_stages_draw_the_masks_of_the_whole_model() -> None:
    config = GPTConfig(**{**LAYERS, "attention_dropout": 0.3, **FAST})
    batch_slice = BatchSlice(STEP, 0, BATCH)
    tokens, target, _ = batch_of_tokens()
    whole = GPT(config, seed=3)(tokens, target, batch_slice=batch_slice)
    x = tokens
    for span in cut_stages(config, 2):
        stage = GPT(config, seed=3, stage=span)
        x = stage(x, batch_slice=batch_slice)
    assert torch.equal(stage.loss(x, target), whole)


def fast_on_two_ranks(rank: int, world_size: int) -> tuple[float, int]:
    _, losses, gradients = one_step(rank, world_size, 2, True, 4, FAST)
    return losses.double().sum().item(), len(gradients)


def test_the_mask_of_the_kernel_on_tensor_parallel_ranks() -> None:
    """All ranks have the same losses; they differ from one rank, since each rank's kernel draws for its heads."""
    (loss, count), (other, _) = run_on_ranks(fast_on_two_ranks, 2)
    assert loss == other and count > 10
    assert loss != one_step(0, 1, 1, False, 4, FAST)[1].double().sum().item()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GPTConfig(attention_dropout_kernel="flash"), "attention_dropout_kernel='flash' must be one of"),
        (lambda: GPTConfig(attention_dropout_kernel="fast", sliding_window=4), "must be 'exact' with sliding_window=4"),
        (
            lambda: TrainConfig(GPTConfig(attention_dropout_kernel="fast"), ParallelConfig(context_parallel_size=2)),
            "must be 'exact' with context_parallel_size=2",
        ),
        (
            lambda: TrainConfig(GPTConfig(attention_dropout_kernel="fast"), data=DataConfig(mask_documents=True)),
            "must be 'exact' with mask_documents=True",
        ),
        (
            lambda: verify_config(TrainConfig(GPTConfig(attention_dropout_kernel="fast"))),
            "no two layouts have the same numbers",
        ),
    ],
)
def test_where_the_mask_of_the_kernel_is_refused(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
