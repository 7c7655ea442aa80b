"""Start here when the GPT gives other losses or gradients at some layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import ParallelLayout, init_mesh
from fused_megatron.models import GPT, attention
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.sharding import Replicas
from fused_megatron.tensor_parallel import parameter_parts
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks
from fused_megatron.testing.sharded_models import perturb_vectors_

# Large weights, so that attention scores differ: near uniform attention the gradients of queries and keys are small
# differences of large numbers, which float32 cannot hold. No size is a power of two, and 101 vocabulary entries leave
# padding on the last ranks (on all of one rank at R = 4).
SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "num_heads": 4, "seq_len": 12, "ffn_hidden_size": 44, "vocab_size": 101,
    "pad_vocab_size_to_multiple_of": 48, "init_std": 0.1,
}  # fmt: skip
BATCH, SEQ_LEN = 6, 8
PACKED = "packed"  # not a field of GPTConfig: the rows consist of the documents of DOCUMENTS
DOCUMENTS = ((8,), (1,) * 8, (3, 5), (1, 2, 4, 1), (5, 3), (2, 6))


# Every kind of layer in another form. 2 key-value heads are fewer than 4 ranks.
LLAMA: dict[str, Any] = {
    "activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 2,
    "tied_embeddings": False,
}  # fmt: skip
MIXED: dict[str, Any] = {
    "activation": "geglu", "position": "rotary", "rotary_fraction": 0.7, "rotary_base": 500.0, "num_kv_heads": 1,
}  # fmt: skip


def config_of(changes: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{**SIZES, **{name: value for name, value in changes.items() if name != PACKED}})


def packed(rows: slice) -> dict[str, torch.Tensor]:
    """Return the arguments of the model by which it masks and numbers the documents of some rows."""
    lengths = [length for row in DOCUMENTS[rows] for length in row]
    positions = [[i for length in row for i in range(length)] for row in DOCUMENTS[rows]]
    return {"documents": torch.tensor([0, *lengths]).cumsum(0), "positions": torch.tensor(positions)}


def reference_losses(w: dict[str, torch.Tensor], tokens: torch.Tensor, target: torch.Tensor, config: GPTConfig) -> Any:
    """Compute the loss per token [B, S] from full weights with plain torch."""
    batch, seq_len = tokens.shape
    width, heads, head_dim = config.hidden_size, config.num_heads, config.hidden_size // config.num_heads

    def linear(x: torch.Tensor, name: str, part: str = "") -> torch.Tensor:
        return x @ w[f"{name}.weight{part}"].t() + w[f"{name}.bias{part}"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config.normalization == "rms_norm":
            return F.rms_norm(x, (width,), w[f"{name}.weight"], config.layer_norm_eps)
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [B, N, S, D]
        pairs = int(head_dim * config.rotary_fraction) // 2
        angle = torch.arange(seq_len)[:, None] * config.rotary_base ** -(torch.arange(pairs).double() / pairs)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * pairs :]], dim=-1)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        if config.num_kv_heads is None:
            q, k, v = linear(x, name).view(batch, seq_len, heads, 3, head_dim).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = (
                linear(x, name, f".{part}").view(batch, seq_len, -1, head_dim).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            k, v = (t.repeat_interleave(heads // config.num_kv_heads, dim=1) for t in (k, v))
        if config.position == "rotary":
            q, k = rotated(q), rotated(k)
        future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / head_dim**0.5).masked_fill(future, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq_len, width)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        if config.activation == "gelu":
            return F.gelu(linear(x, name), approximate="tanh")
        gate, up = linear(x, name, ".gate"), linear(x, name, ".up")
        return (F.silu(gate) if config.activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up

    x = w["token_embedding.weight"][tokens]
    if config.position == "learned":
        x = x + w["position_embedding"][:seq_len]
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        context = attention(norm(x, f"{block}.attention_norm"), f"{block}.attention.query_key_value")
        x = x + linear(context, f"{block}.attention.projection")
        hidden = mlp(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.expansion")
        x = x + linear(hidden, f"{block}.mlp.projection")
    head = w.get("head.weight", w["token_embedding.weight"])
    logits = norm(x, "final_norm") @ head.t()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(batch, seq_len)


def batch_of_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, targets (some ignored) and a random upstream gradient, each [B, S]."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, SEQ_LEN + 1), generator=generator)
    target = tokens[:, 1:].clone()
    target[0, 3] = target[4, 0] = -100
    return tokens[:, :-1], target, torch.randn(BATCH, SEQ_LEN, generator=generator)


def one_backward(
    rank: int, world_size: int, tp: int, sequence_parallel: bool, dtype: torch.dtype, changes: dict[str, Any]
) -> tuple[int, torch.Tensor, dict[str, tuple[Any, torch.Tensor, torch.Tensor]]]:
    """Return this rank's rows of the loss, and for each parameter its shard, value and gradient summed over dp."""
    mesh = init_mesh(tp)
    model = GPT(config_of(changes), layout=mesh.layout(sequence_parallel=sequence_parallel), seed=3, dtype=dtype)
    perturb_vectors_(model)
    buckets = GradientBuckets(list(model.parameters()), Replicas.of_copies(mesh.dp_group), bucket_bytes=20_000)
    rows = slice(mesh.dp_rank * BATCH // mesh.dp_size, (mesh.dp_rank + 1) * BATCH // mesh.dp_size)
    tokens, target, upstream = (part[rows] for part in batch_of_tokens())
    keywords = packed if changes.get(PACKED) else lambda rows: {}
    losses = model(tokens, target, **keywords(rows))
    # Two microbatches of uneven size.
    cut = tokens.shape[0] // 2
    for first, last in ((0, cut), (cut, tokens.shape[0])):
        if first == cut:
            buckets.reduce_after_backwards(1)
        part = slice(first, last)
        documents = keywords(slice(rows.start + first, rows.start + last))
        model(tokens[part], target[part], **documents).backward(upstream[part])
    buckets.finish()
    result = {}
    for name, p in model.named_parameters():
        for part in parameter_parts(p):
            value, gradient = part.of(p.detach()), part.of(buckets[p])
            real = tuple(slice(n) for n in part.shard.real_shape(tuple(value.shape)))
            result[part.full_name(name)] = (part.shard, value[real].clone(), gradient[real].clone())
    return mesh.dp_rank, losses.detach(), result


def assembled(ranks: list[Any], which: int) -> dict[str, torch.Tensor]:
    """Assemble full tensors from every rank's shards; replicated ones must be bitwise equal on all ranks."""
    full: dict[str, torch.Tensor] = {}
    for _, _, shards in ranks:
        for name, (shard, *tensors) in shards.items():
            tensor = tensors[which]
            place = tuple(slice(o, o + n) for o, n in zip(shard.offset, tensor.shape, strict=True))
            whole = full.setdefault(name, torch.full(shard.full_shape, float("nan"), dtype=tensor.dtype))
            held = whole[place]
            assert bool((held.isnan() | (held == tensor)).all()), f"{name} differs between ranks that both hold it"
            whole[place] = tensor
    assert not any(t.isnan().any() for t in full.values())
    return full


def reference_of(
    weights: dict[str, torch.Tensor], changes: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return losses and gradients of the plain model in the dtype of the weights."""
    tokens, target, upstream = batch_of_tokens()
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    if changes.get(PACKED):
        losses = torch.stack([losses_by_document(leaves, tokens, target, changes, row) for row in range(BATCH)])
    else:
        losses = reference_losses(leaves, tokens, target, config_of(changes))
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), {name: w.grad for name, w in leaves.items() if w.grad is not None}


def losses_by_document(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, target: torch.Tensor, changes: dict[str, Any], row: int
) -> torch.Tensor:
    """Compute the losses of a row [S] from its documents, each by itself."""
    documents = zip(*(part[row : row + 1].split(DOCUMENTS[row], 1) for part in (tokens, target)), strict=True)
    return torch.cat([reference_losses(weights, *document, config_of(changes))[0] for document in documents])


def assert_equal_plain_model(world_size: int, cases: list[tuple[int, bool, dict[str, Any]]]) -> None:
    arguments = [(tp, sequence_parallel, torch.float32, changes) for tp, sequence_parallel, changes in cases]
    for (tp, _, changes), ranks in zip(cases, run_cases_on_ranks(one_backward, world_size, arguments), strict=True):
        assert_equals_plain_model(ranks, tp, changes)


def assert_equals_plain_model(ranks: list[Any], tp: int, changes: dict[str, Any]) -> None:
    weights, gradients = assembled(ranks, 0), assembled(ranks, 1)
    losses, expected = reference_of({name: w.double() for name, w in weights.items()}, changes)
    found = torch.cat([losses for (dp_rank, losses, _) in ranks[::tp]])
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Without rotation the gradient of a key bias is 0 in exact arithmetic, so it is compared with the query's.
        scale = expected[name.replace("bias.key", "bias.query")].abs().max()
        error = (gradients[name].double() - gradient).abs().max() / scale
        assert error < 1e-5, f"{changes} on {len(ranks)} ranks: {name}: {error:.1e}"


# At two ranks an untied head is among the forms.
LAYOUTS: dict[int, list[tuple[int, bool, dict[str, Any]]]] = {  # by number of ranks: tp, sequence_parallel, changes
    1: [(1, False, {}), (1, False, LLAMA), (1, False, {PACKED: True})],
    2: [
        (2, False, {"tied_embeddings": False}),
        (2, True, {"tied_embeddings": False, "recompute": "selective"}),
        (2, True, {**LLAMA, "recompute": "full"}),
        (2, True, {**LLAMA, PACKED: True, "recompute": "full"}),
        (1, False, {PACKED: True, "recompute": "selective"}),
    ],
    4: [
        (4, True, {"recompute": "full"}),
        (2, True, {}),
        (4, True, {**LLAMA, "recompute": "selective"}),
        (2, False, MIXED),
        (2, True, {**MIXED, PACKED: True}),
    ],
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_losses_and_every_gradient_equal_the_plain_model(world_size: int) -> None:
    assert_equal_plain_model(world_size, LAYOUTS[world_size])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, LLAMA, MIXED, {PACKED: True}, {**LLAMA, PACKED: True}],
    ids=["gpt2", "llama", "mixed", "gpt2-packed", "llama-packed"],
)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_every_layout_and_recomputation(tp: int, sequence_parallel: bool, changes: dict[str, Any]) -> None:
    recomputed = [{**changes, "recompute": recompute} for recompute in ("none", "selective", "full")]
    assert_equal_plain_model(tp, [(tp, sequence_parallel, form) for form in recomputed])


def test_float64_model_is_exact() -> None:
    forms = {}, LLAMA, MIXED, {PACKED: True}, {**LLAMA, PACKED: True}
    cases = [(1, False, torch.float64, changes) for changes in forms]
    for changes, ranks in zip(forms, run_cases_on_ranks(one_backward, 1, cases), strict=True):
        losses, _ = reference_of(assembled(ranks, 0), changes)
        torch.testing.assert_close(ranks[0][1], losses, rtol=1e-12, atol=1e-12)


def test_every_layout_starts_from_the_same_weights() -> None:
    forms = {"tied_embeddings": False}, LLAMA
    sizes = [
        run_cases_on_ranks(one_backward, n, [(n, False, torch.float32, form) for form in forms]) for n in (1, 2, 4)
    ]
    for ways in zip(*sizes, strict=True):
        whole, *others = (assembled(ranks, 0) for ranks in ways)
        for name, weight in whole.items():
            assert all(torch.equal(weight, other[name]) for other in others), name
        assert 0.09 < whole["head.weight"].std() < 0.11
        # 1 / sqrt(2 num_layers) times the other weights
        assert 0.045 < whole["blocks.1.mlp.projection.weight"].std() < 0.055


@pytest.mark.parametrize(("tp", "changes"), [(2, {}), (4, {**LLAMA, "recompute": "full"})], ids=["gpt2", "llama"])
def test_bfloat16_errs_at_most_twice_as_much_as_plain_torch(tp: int, changes: dict[str, Any]) -> None:
    ranks = run_on_ranks(one_backward, tp, tp, True, torch.bfloat16, changes)
    weights, gradients = assembled(ranks, 0), assembled(ranks, 1)
    exact, exact_gradients = reference_of({name: w.double() for name, w in weights.items()}, changes)
    plain, plain_gradients = reference_of(weights, changes)

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return (found.double() - wanted).square().mean().sqrt().item()

    assert error(ranks[0][1], exact) < 2 * error(plain, exact)
    for name, gradient in exact_gradients.items():
        # Two ranks round more often than one process, and the error of a sum of few small numbers is random. So one
        # rounding of the largest gradient is allowed in addition.
        floor = 2**-8 * gradient.abs().max().item()
        assert error(gradients[name], gradient) < 2 * error(plain_gradients[name], gradient) + floor, name


def counted_collectives(rank: int, world_size: int, num_layers: int) -> tuple[dict[str, int], dict[str, int]]:
    calls: dict[str, int] = {}
    for name in ("all_reduce", "all_gather_single", "reduce_scatter_single", "broadcast", "all_gather", "all_to_all"):
        original = getattr(dist, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls[_name] = calls.get(_name, 0) + 1
            return _original(*args, **kwargs)

        setattr(dist, name, counting)
    model = GPT(GPTConfig(**{**SIZES, "num_layers": num_layers}), layout=init_mesh(world_size).layout())
    tokens, target, upstream = batch_of_tokens()
    calls.clear()  # collectives with which layers measured the group
    losses = model(tokens, target)
    forward = dict(calls)
    calls.clear()
    losses.backward(upstream)
    return forward, dict(calls)


def test_two_all_reduces_forward_and_two_backward_per_layer() -> None:
    for forward, backward in run_on_ranks(counted_collectives, 2, 3):
        # Besides the layers: the embedding and the loss once forward, the head once backward.
        assert forward == {"all_reduce": 2 * 3 + 1, "all_gather_single": 1}
        assert backward == {"all_reduce": 2 * 3 + 1}


def test_padded_vocabulary_has_no_gradient_and_no_probability() -> None:
    model = GPT(GPTConfig(**SIZES), seed=1)
    tokens, target, upstream = batch_of_tokens()
    with torch.no_grad():
        model.token_embedding.weight[SIZES["vocab_size"] :] = 50.0  # would get all probability
    before = model(tokens, target)
    before.backward(upstream)
    assert model.token_embedding.weight.grad is not None
    assert not model.token_embedding.weight.grad[SIZES["vocab_size"] :].any()
    with torch.no_grad():
        model.token_embedding.weight[SIZES["vocab_size"] :] = -50.0
    assert torch.equal(before, model(tokens, target))


def losses_of_tiny_vocabulary(rank: int, world_size: int) -> torch.Tensor:
    config = GPTConfig(**{**SIZES, "vocab_size": 5, "pad_vocab_size_to_multiple_of": 128})
    tokens, target, _ = batch_of_tokens()
    model = GPT(config, layout=init_mesh(world_size).layout(), seed=2)
    return model(tokens % 5, target.where(target < 0, target % 5)).detach()


def test_a_vocabulary_that_is_nearly_all_padding() -> None:
    one, two = (run_on_ranks(losses_of_tiny_vocabulary, n)[0] for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("hidden_size", 25, "hidden_size=25 must be divisible by num_heads=4 (nearest: 24, 28)"),
    ("num_layers", 0, "num_layers=0 must be 1 or more"),
])  # fmt: skip
def test_sizes_that_do_not_fit(field: str, value: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        GPT(GPTConfig(**{**SIZES, field: value}))
    assert str(caught.value) == message


def refused(rank: int, world_size: int) -> list[str]:
    group, tokens = dist.group.WORLD, torch.zeros(1, 7, dtype=torch.int64)
    without_me = dist.new_group([1 - rank])

    def build(tp_group: Any, **changes: Any) -> GPT:
        return GPT(GPTConfig(**{**SIZES, **changes}), layout=ParallelLayout(tp_group, sequence_parallel=True))

    messages = []

    def refuse(mistake: Callable[[], Any]) -> None:
        with pytest.raises(InputError) as caught, record_communication() as seen:
            mistake()
        messages.append(str(caught.value))
        assert not seen.counts

    refuse(lambda: build(group, num_heads=3))
    refuse(lambda: build(group, ffn_hidden_size=45))  # the first layers of a group measure it
    refuse(lambda: build(without_me))
    model = build(group)
    refuse(lambda: model(tokens, tokens))
    return messages


def test_mistakes_are_one_error_on_every_rank_before_any_collective() -> None:
    for heads, ffn, group, sequence in run_on_ranks(refused, 2):
        assert heads == "num_heads=3 must be divisible by tensor_parallel_size=2 (nearest: 2, 4)"
        assert ffn == "ffn_hidden_size=45 must be divisible by tensor_parallel_size=2 (nearest: 44, 46)"
        assert "does not contain this rank" in group
        assert sequence == "sequence length ids.shape[0]=7 must be divisible by tensor_parallel_size=2 (nearest: 6, 8)"


def test_positions_that_do_not_fit() -> None:
    model, tokens = GPT(GPTConfig(**SIZES)), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"positions from 0 to 12 must lie in \[0, seq_len=12\)"):
        model(tokens, positions=torch.tensor([[0, 1, 12], [0, 0, 0]]))
    with pytest.raises(InputError, match=r"positions.shape=\(3,\)"):
        model(tokens, positions=torch.arange(3))


@pytest.mark.parametrize("form", [LLAMA, {"position": "rotary"}], ids=["llama", "one product"])
def test_packed_tokens_are_rotated_without_a_copy(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, used, products = [], [], []
    original = attention.rotary_query_key_value

    def watched(qkv: torch.Tensor, *tables: torch.Tensor, **heads: Any) -> Any:
        query, key, value = original(qkv, *tables, **heads)
        seen.extend([query, key])
        used.extend(tables)
        return query, key, value

    monkeypatch.setattr(attention, "rotary_query_key_value", watched)
    model, (tokens, *_) = GPT(config_of(form)), batch_of_tokens()
    for block in model.blocks.values():
        block.attention.query_key_value.register_forward_hook(
            lambda module, inputs, y: products.append(y.untyped_storage().data_ptr())
        )
    model(tokens, **packed(slice(0, BATCH)))
    # All tokens as one sequence; queries and keys are views of the product that made them.
    assert len(seen) == 4 and all(x.shape[:2] == (BATCH * SEQ_LEN, 1) for x in seen)
    assert [x.untyped_storage().data_ptr() for x in seen[::2]] == products
    assert [x.untyped_storage().data_ptr() for x in seen[1::2]] == products
    # Rotation depends on distances only, so a wrong start of the positions would hardly show in the loss.
    pairs = used[0].shape[1]
    positions = packed(slice(0, BATCH))["positions"].t().reshape(-1, 1)
    angles = positions * 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    torch.testing.assert_close(used[0], angles.cos().float())
    torch.testing.assert_close(used[1], angles.sin().float())


def test_sequence_longer_than_positions() -> None:
    with pytest.raises(InputError, match=r"tokens.shape\[1\]=13 must be at most seq_len=12"):
        GPT(GPTConfig(**SIZES))(torch.zeros(1, 13, dtype=torch.int64))


def test_number_of_parameters_counts_no_padding_and_no_shard_twice() -> None:
    width, ffn, vocab = SIZES["hidden_size"], SIZES["ffn_hidden_size"], SIZES["vocab_size"]
    layer = 4 * width * width + 4 * width + 2 * width * ffn + ffn + width + 4 * width
    expected = 2 * layer + 2 * width + (vocab + SIZES["seq_len"]) * width
    assert GPT(GPTConfig(**SIZES)).num_parameters() == expected
