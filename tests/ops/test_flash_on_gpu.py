"""Start here when tiles are packed wrongly for the flash kernel of GPUs, which an emulation stands in for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.ops import attention_tiles
from fused_megatron.ops.attention_kernels import MatrixProducts, kernel_for
from fused_megatron.ops.flash_on_gpu import FlashOnGpu, plan_launches
from fused_megatron.ops.visible_pairs import Visibility
from fused_megatron.testing.drawn_attention import DrawnAttention


class EmulatedFlash(TorchDispatchMode):
    """Computes aten's flash ops of packed sequences in plain PyTorch, and counts the calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._flash_attention_forward.default:
            self.calls += 1
            return (*self._forward(*args[:5], **kwargs), None, None, None)
        if func is torch.ops.aten._flash_attention_backward.default:
            self.calls += 1
            return self._backward(*args[:8], **kwargs)
        return func(*args, **(kwargs or {}))

    def _sequences(self, queries, keys, left, right):
        for i in range(len(queries) - 1):
            q, k = slice(*queries[i : i + 2].tolist()), slice(*keys[i : i + 2].tolist())
            rows, columns = torch.arange(q.stop - q.start)[:, None], torch.arange(k.stop - k.start)
            last = rows + len(columns) - len(rows)  # the key that is aligned with the query
            hidden = torch.zeros(len(rows), len(columns), dtype=torch.bool)
            hidden |= (columns > last + right) if right >= 0 else False
            hidden |= (columns < last - left) if left >= 0 else False
            yield q, k, hidden

    def _scores(self, q, k, hidden, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("inD,jnD->nij", q, k) * scale).masked_fill(hidden, float("-inf"))

    def _forward(self, query, key, value, queries, keys, *, scale, window_size_left, window_size_right):
        context = torch.full_like(query, float("nan"))
        log_sum_exp = query.new_full((query.shape[1], query.shape[0]), float("nan"))
        for q, k, hidden in self._sequences(queries, keys, window_size_left, window_size_right):
            scores = self._scores(query[q], key[k], hidden, scale)
            values = value[k].repeat_interleave(query.shape[1] // key.shape[1], 1)
            context[q] = torch.einsum("nij,jnd->ind", scores.softmax(-1), values)
            log_sum_exp[:, q] = scores.logsumexp(-1)
        return context, log_sum_exp

    def _backward(
        self,
        grad,
        query,
        key,
        value,
        context,
        log_sum_exp,
        queries,
        keys,
        *,
        scale,
        window_size_left,
        window_size_right,
    ):
        gradients = [torch.full_like(t, float("nan")) for t in (query, key, value)]
        shared = query.shape[1] // key.shape[1]
        for q, k, hidden in self._sequences(queries, keys, window_size_left, window_size_right):
            p = (self._scores(query[q], key[k], hidden, scale) - log_sum_exp[:, q, None]).exp()
            of_p = torch.einsum("ind,jnd->nij", grad[q], value[k].repeat_interleave(shared, 1))
            of_scores = p * (of_p - (grad[q] * context[q]).sum(-1).t()[..., None]) * scale
            gradients[0][q] = torch.einsum("nij,jnd->ind", of_scores, key[k].repeat_interleave(shared, 1))
            of_key = torch.einsum("nij,ind->jnd", of_scores, query[q])
            of_value = torch.einsum("nij,ind->jnd", p, grad[q])
            for gradient, each in zip(gradients[1:], (of_key, of_value), strict=True):
                gradient[k] = each.unflatten(1, (-1, shared)).sum(2)
        return gradients


def test_context_and_gradients(monkeypatch):
    monkeypatch.setattr(attention_tiles, "choose_kernel", lambda *_, **__: (FlashOnGpu(), "emulated"))
    compared = 0
    for seed in range(30):
        drawn = DrawnAttention(seed, most_positions=30)
        if drawn.padding is not None or drawn.kept is not None or drawn.tensors[2].shape[-1] != 8:
            continue
        compared += 1
        with EmulatedFlash():
            found, _ = drawn.found(torch.float64)
        for actual, wanted in zip(found, drawn.expected(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert compared > 5


@pytest.mark.parametrize("window", [None, 4])
def test_documents_of_a_batch_are_one_launch_each_way(window):
    documents = [0, 1, 4, 10, 13, 20, 29, 30]
    visibility = Visibility.of_documents(True, window, documents, 3, 10)
    tiles = visibility.tiles([(0, 10)], [(0, 10)])
    (launch,) = plan_launches(tiles)
    assert launch.tiles == tiles
    assert (launch.left, launch.right) == ((-1 if window is None else 3), 0)


def test_documents_of_one_row_are_packed_without_a_copy():
    tiles = Visibility.of_documents(True, None, [0, 1, 4, 10], 1, 10).tiles([(0, 10)], [(0, 10)])
    (launch,) = plan_launches(tiles)
    query = torch.randn(10, 1, 4, 8)
    assert launch.pack_queries(query).data_ptr() == query.data_ptr()


def test_tiles_that_share_rows_are_in_launches_of_their_own():
    """A zig-zag rank's two ranges see the keys of another rank's first range, and one of them also its second."""
    visibility = Visibility(True, None, ((0,),), 16)
    launches = plan_launches(visibility.tiles([(0, 4), (12, 16)], [(4, 8), (8, 12)]))
    assert [len(launch.tiles) for launch in launches] == [1, 1]
    launches = plan_launches(visibility.tiles([(4, 8), (8, 12)], [(0, 4), (12, 16)]))
    assert [len(launch.tiles) for launch in launches] == [1, 1]


def test_shapes_without_values():
    visibility = Visibility.of_documents(True, None, [0, 5, 16, 21, 32], 2, 16)
    query = torch.empty(16, 2, 8, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(16, 2, 2, 64, dtype=torch.bfloat16, device="meta")
    (launch,) = plan_launches(visibility.tiles([(0, 16)], [(0, 16)]))
    packed = [launch.pack_queries(query), launch.pack_keys(key)]
    assert [tuple(t.shape) for t in packed] == [(32, 8, 64), (32, 2, 64)]
    assert [tuple(t.shape) for t in launch.unpack_keys(packed[1])] == [(2, 2, 5, 64), (2, 2, 11, 64)]


def test_the_reason_of_a_choice():
    assert isinstance(kernel_for("cuda", torch.bfloat16, 64, 64)[0], FlashOnGpu)
    for arguments, reason in (
        (("cuda", torch.bfloat16, 320, 320), "head dim of at most 256, not 320"),
        (("cuda", torch.float32, 64, 64), "float16 and bfloat16 only"),
        (("cuda", torch.bfloat16, 64, 64, True), "padding mask"),
        (("cpu", torch.float32, 8, 8, False, True), "dropout"),
        (("cpu", torch.float32, 8, 6), "keys have head dim 8 and values 6"),
    ):
        kernel, found = kernel_for(*arguments)
        assert isinstance(kernel, MatrixProducts) and reason in found
