"""Start here when attention over several blocks of keys differs from attention over all of them at once."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_megatron.ops import attention_kernels
from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum
from fused_megatron.ops.visible_pairs import Visibility
from fused_megatron.testing.drawn_attention import DrawnAttention

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.15}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("parts", ["whole tiles", "small parts"])
def test_blocks_of_keys_add_up(dtype, parts, monkeypatch):
    if parts == "small parts":
        for name, value in (("_MOST_SCORES", 60), ("_MOST_KEYS", 7), ("_BAND_ROWS", 5)):
            monkeypatch.setattr(attention_kernels, name, value)
    for seed in range(14):
        drawn = DrawnAttention(seed)
        found, log_sum_exp = drawn.found(dtype)
        sees_nothing = ~drawn.seen().any(-1).t()
        assert ((log_sum_exp == float("-inf")).all(-1) == sees_nothing).all()
        for name, actual, wanted in zip(("context", "query", "key", "value"), found, drawn.expected(), strict=True):
            assert actual.dtype == dtype
            torch.testing.assert_close(
                actual.double(), wanted, rtol=0, atol=LIMIT[dtype], msg=lambda text, n=name, s=seed: f"{n}, {s}: {text}"
            )


def test_the_same_bits_again():
    for seed in range(8):
        for one, other in zip(
            DrawnAttention(seed).found(torch.float32)[0], DrawnAttention(seed).found(torch.float32)[0], strict=True
        ):
            assert torch.equal(one, other)


def test_bfloat16_is_as_exact_as_the_kernel_over_the_whole_sequence():
    """The error of four blocks is at most twice the error of torch's kernel on the whole sequence."""
    seq_len, batch = 256, 2
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(seq_len, batch, 4, 16, dtype=torch.float64) for _ in range(4))
    visibility = Visibility(True, None, ((0,),) * batch, seq_len)
    ranges = [(start, start + 64) for start in range(0, seq_len, 64)]

    def by_blocks(dtype, blocks):
        q, k, v, g = (t.to(dtype) for t in (query, key, value, grad))
        total = AttentionSum(q)
        for start, stop in blocks:
            total.add(k[start:stop], v[start:stop], visibility.tiles([(0, seq_len)], [(start, stop)]))
        gradients = AttentionGradients(g, q, *total.result())
        own = [gradients.add(k[a:b], v[a:b], visibility.tiles([(0, seq_len)], [(a, b)])) for a, b in blocks]
        return [total.result()[0], gradients.grad_query(), *(torch.cat(parts) for parts in zip(*own, strict=True))]

    exact = by_blocks(torch.float64, [(0, seq_len)])
    whole, split = (by_blocks(torch.bfloat16, blocks) for blocks in ([(0, seq_len)], ranges))
    for wanted, one, four in zip(exact, whole, split, strict=True):
        assert (four.double() - wanted).norm() <= 2 * (one.double() - wanted).norm()


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.numel = max(self.numel, leaf.numel() if isinstance(leaf, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize(
    "seq_len", [1 << 18, pytest.param(1 << 20, marks=pytest.mark.slow)], ids=["262144", "a million"]
)
@pytest.mark.parametrize("window", [None, 4096])
def test_no_scores_of_long_sequences(window, seq_len):
    """One of eight ranks with an eighth of the positions, a range from each end: no tensor is larger than q."""
    rows = seq_len // 8
    half = rows // 2
    ranges = [(0, half), (seq_len - half, seq_len)]
    visibility = Visibility.of_documents(True, window, [0, seq_len * 2 // 7, seq_len], 1, seq_len)
    tiles = visibility.tiles(ranges, ranges)
    with FakeTensorMode():
        query, key = torch.empty(rows, 1, 4, 64), torch.empty(rows, 1, 2, 64)
        with _LargestTensor() as largest:
            total = AttentionSum(query)
            total.add(key, key, tiles)
            AttentionGradients(query, query, *total.result()).add(key, key, tiles)
    assert largest.numel == query.numel()
