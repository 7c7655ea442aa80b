"""Start here when a gradient is in the wrong bucket, or at the wrong offset in it."""

import torch
from torch import nn

from fused_megatron.data_parallel.bucket_layout import lay_out_buckets

META = torch.device("meta")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=META))


def test_buckets_are_cut_from_the_last_layer_on() -> None:
    a, b, c, d = parameter(2, 3), parameter(5), parameter(4, 4), parameter()
    (buckets,) = lay_out_buckets({0: [a, b, c, d]}, bucket_bytes=4 * 20).values()
    assert [bucket.parameters for bucket in buckets] == [(d, c, b), (a,)]
    assert [bucket.num_elements for bucket in buckets] == [32, 8]
    assert buckets[0].offsets() == {d: 0, c: 8, b: 24}
    assert [len(bucket.parameters) for bucket in lay_out_buckets({0: [a, b, c, d]}, 1)[frozenset({0})]] == [1] * 4


def test_a_bucket_holds_one_kind_and_buckets_are_in_the_order_in_which_they_fill() -> None:
    a, b, c, d, e, f = (parameter(size) for size in (1, 20, 1, 1, 1, 1))
    kinds = {a: 1, c: 1, e: 1}
    (buckets,) = lay_out_buckets({0: [a, b, c, d, e, f]}, 4 * 2, lambda p: kinds.get(p)).values()
    assert [bucket.parameters for bucket in buckets] == [(f, d), (e, c), (b,), (a,)]
    assert buckets == lay_out_buckets({0: [a, b, c, d, e, f]}, 4 * 2, kinds.get)[frozenset({0})]


def test_views_are_the_flat_tensor_in_the_shapes_of_the_parameters() -> None:
    a, b = parameter(2, 3), parameter(0, 7)
    ((bucket,),) = lay_out_buckets({0: [a, b]}, bucket_bytes=1e6).values()
    flat = torch.arange(1.0, 9.0)
    views = bucket.views(flat)
    assert torch.equal(views[a], flat[:6].view(2, 3)) and views[b].shape == (0, 7)
    views[a].zero_()
    assert flat.tolist() == [0.0] * 6 + [7.0, 8.0]  # padding belongs to no parameter


def test_every_gradient_begins_at_a_multiple_of_16_bytes() -> None:
    parameters = [parameter(3), parameter(2, 5), parameter(), parameter(0, 7), parameter(16), parameter(1, 1)]
    ((bucket,),) = lay_out_buckets({0: parameters}, bucket_bytes=1e6).values()
    views = bucket.views(torch.zeros(bucket.num_elements))
    assert [views[p].data_ptr() % 16 for p in parameters] == [0] * 6


def test_a_tied_weight_has_a_bucket_of_its_own() -> None:
    tied, first, second = parameter(3), parameter(1), parameter(2)
    layouts = lay_out_buckets({0: [tied, first], 4: [second, tied]}, bucket_bytes=1e6)
    assert {tuple(sorted(stages)): [b.parameters for b in buckets] for stages, buckets in layouts.items()} == {
        (0, 4): [(tied,)],
        (0,): [(first,)],
        (4,): [(second,)],
    }


def test_no_parameters_need_no_bucket() -> None:
    assert lay_out_buckets({0: []}, 1) == {}
