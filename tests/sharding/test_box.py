"""Start here when a shard covers the wrong rows or columns of its tensor."""

import itertools
import random

import pytest
import torch

from fused_megatron.sharding.box import Box, TensorBox, cover_problem, row_blocks


def mask(full_shape, box):
    m = torch.zeros(full_shape, dtype=torch.int64)
    m[box.slices((0,) * len(full_shape))] = 1
    return m


def random_box(shape, generator):
    offset = tuple(generator.randint(0, n - 1) for n in shape)
    return Box(offset, tuple(generator.randint(1, n - o) for n, o in zip(shape, offset, strict=True)))


@pytest.mark.parametrize("shape", [(9,), (5, 4), (3, 4, 5)])
def test_intersection_is_that_of_the_masks(shape):
    generator = random.Random(0)
    empty = 0
    for _ in range(200):
        a, b = random_box(shape, generator), random_box(shape, generator)
        common = a.intersect(b)
        expected = mask(shape, a) * mask(shape, b)
        empty += common is None
        assert torch.equal(expected, mask(shape, common) if common else torch.zeros_like(expected))
    assert 0 < empty < 200


@pytest.mark.parametrize("shape", [(6,), (4, 4), (3, 2, 4)])
def test_cover_problem_is_found_exactly_when_the_masks_do_not_add_up_to_one(shape):
    generator = random.Random(1)
    good = 0
    for _ in range(300):
        cuts = [sorted({0, n, generator.randint(0, n)}) for n in shape]
        boxes = [
            Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
            for spans in itertools.product(*(list(itertools.pairwise(c)) for c in cuts))
        ]
        change = generator.choice(["none", "drop", "double", "extra"])
        if change == "drop":
            boxes.pop(generator.randrange(len(boxes)))
        elif change == "double":
            boxes.append(generator.choice(boxes))
        elif change == "extra":
            boxes.append(random_box(shape, generator))
        generator.shuffle(boxes)
        whole = torch.equal(
            sum((mask(shape, b) for b in boxes), torch.zeros(shape, dtype=torch.int64)),
            torch.ones(shape, dtype=torch.int64),
        )
        assert (cover_problem(shape, boxes) is None) == whole
        good += whole
    assert good > 50


def test_boxes_of_no_dims_and_outside():
    assert cover_problem((), [Box((), ())]) is None
    assert "overlap" in cover_problem((), [Box((), ()), Box((), ())])
    assert "1 of 1" in cover_problem((), [])
    assert "not inside" in cover_problem((4,), [Box((2,), (3,))])
    assert cover_problem((0, 3), []) is None
    assert not Box((-1,), (2,)).lies_in((4,))
    assert not Box((0, 0), (1, 1)).lies_in((4,))
    # Box of a rank that holds nothing.
    assert Box((64, 0), (0, 4)).lies_in((33, 4)) and not Box((64, 0), (1, 4)).lies_in((33, 4))
    assert not Box((-1, 0), (0, 4)).lies_in((33, 4)) and Box((), ()).lies_in(())
    assert TensorBox.whole(torch.zeros(2, 3)).box == Box((0, 0), (2, 3))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (3, 0), (5, 3), (2, 100)])
@pytest.mark.parametrize("limit", [1, 24, 1000])
def test_row_blocks_cover_the_rows_in_order_within_the_limit(shape, limit):
    blocks = list(row_blocks(shape, 4, limit))
    numel = torch.Size(shape).numel()
    num_rows = (shape[0] if shape else 1) if numel else 0
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(num_rows))
    for start, stop in blocks:
        assert stop - start == 1 or (stop - start) * numel // num_rows * 4 <= limit


def comparisons(monkeypatch, num_boxes, last):
    """Count the pairs of boxes that are compared for a tensor cut into columns, the last of which has width `last`."""
    pairs, intersect = [], Box.intersect
    monkeypatch.setattr(Box, "intersect", lambda self, other: pairs.append(0) or intersect(self, other))
    columns = [Box((0, i), (num_boxes, 1)) for i in range(num_boxes - 1)] + [Box((0, num_boxes - 1), (num_boxes, last))]
    return cover_problem((num_boxes, num_boxes + 1), columns), len(pairs)


def test_thousands_of_boxes_are_not_compared_with_each_other(monkeypatch):
    assert comparisons(monkeypatch, 2000, 2) == (None, 0)
    problem, pairs = comparisons(monkeypatch, 2000, 1)
    assert problem == "its 2000 boxes overlap, or leave holes" and pairs <= 20_000
