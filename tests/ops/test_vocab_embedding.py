"""Start here when an embedding whose vocabulary is sharded has a wrong row, or its gradient misses a token."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.ops.vocab_embedding import add_embedding_gradient_, vocab_embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, VOCAB = 40, 70  # of the shards 0 and 1; the last 10 rows are padding


def draw(shape, width, dtype, device="cpu"):
    """Return ids with repeats, and weight [2 ROWS, width]; some ids are 0, many are 7."""
    generator = torch.Generator().manual_seed(sum(shape) + width)
    ids = torch.randint(VOCAB, shape, generator=generator)
    ids.flatten()[::2] = 7
    weight = torch.randn(2 * ROWS, width, generator=generator).to(dtype)
    return ids.to(device), weight.to(device)


# Wide accesses; odd widths; several blocks of columns; one token.
@pytest.mark.parametrize(("shape", "width"), [((13, 3), 40), ((5, 2), 33), ((6, 1), 2056), ((1,), 8), ((4, 0), 8)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_the_shards_add_up_to_the_table(shape, width, dtype, index, device):
    ids, weight = draw(shape, width, dtype, device)
    wanted = F.embedding(ids, weight)
    total = torch.zeros_like(wanted)
    for first in (0, ROWS):
        shard = weight[first : first + ROWS]
        partial, local = vocab_embedding(ids.to(index), shard, first_row=first, vocab_size=VOCAB)
        owned = (ids >= first) & (ids < first + ROWS)
        assert partial.dtype == dtype and partial.is_contiguous() and local.dtype == torch.int64
        assert torch.equal(local, torch.where(owned, ids - first, ROWS))
        assert torch.equal(partial[owned], wanted[owned]) and not partial[~owned].any()
        total += partial
    assert torch.equal(total, wanted)


def test_an_id_outside_the_vocabulary_is_nan_on_every_rank_without_its_row(device):
    ids = torch.tensor([-1, 3, VOCAB - 1, VOCAB, 2 * ROWS, 2**40], device=device)
    weight = torch.ones(ROWS, 24, device=device)
    first, _ = vocab_embedding(ids, weight, first_row=0, vocab_size=VOCAB)
    assert torch.equal(first.isnan().all(1), torch.tensor([True, False, False, True, True, True], device=device))
    second, local = vocab_embedding(ids, weight, first_row=ROWS, vocab_size=VOCAB)
    # A row of padding is a row.
    assert torch.equal(second.isnan().all(1), torch.tensor([True, False, False, False, True, True], device=device))
    assert local.tolist() == [ROWS, ROWS, VOCAB - 1 - ROWS, VOCAB - ROWS, ROWS, ROWS]


@pytest.mark.parametrize(("shape", "width"), [((13, 3), 40), ((5, 2), 33), ((12, 5), 1032), ((1,), 8), ((4, 0), 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_added_to_the_rows_of_the_shard(shape, width, dtype, device):
    """Against float64; 7 has half of the tokens, more than a program has in flight."""
    ids, weight = draw(shape, width, dtype, device)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(*shape, width, generator=generator).to(dtype).to(device)
    for first in (0, ROWS):
        before = torch.randn(ROWS, width, generator=generator).to(device)
        _, local = vocab_embedding(ids, weight[first : first + ROWS], first_row=first, vocab_size=VOCAB)
        found, again = before.clone(), before.clone()
        add_embedding_gradient_(dy, local, found)
        add_embedding_gradient_(dy, local, again)
        assert torch.equal(found, again)
        leaf = weight.double().requires_grad_()
        F.embedding(ids, leaf).backward(dy.double())
        exact = before.double() + leaf.grad[first : first + ROWS]
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-5)
        untouched = torch.ones(ROWS, dtype=torch.bool, device=device)
        untouched[local[local < ROWS]] = False
        assert torch.equal(found[untouched], before[untouched])


def test_a_gradient_of_other_strides(device):
    ids, weight = draw((6, 4), 24, torch.float32, device)
    _, local = vocab_embedding(ids.t(), weight[:ROWS], first_row=0, vocab_size=VOCAB)
    dy = torch.randn(6, 4, 24, generator=torch.Generator().manual_seed(1)).to(device).transpose(0, 1)
    found, wanted = (torch.zeros(ROWS, 24, device=device) for _ in range(2))
    add_embedding_gradient_(dy, local, found)
    add_embedding_gradient_(dy.contiguous(), local.contiguous(), wanted)
    assert torch.equal(found, wanted) and found.any()


@pytest.mark.cpu_kernel
def test_opcheck():
    ids, weight = draw((3, 2), 8, torch.float32)
    ops = torch.ops.fused_megatron
    torch.library.opcheck(ops.vocab_embedding_forward.default, (ids, weight[:ROWS], 0, VOCAB))
    torch.library.opcheck(ops.vocab_embedding_backward_.default, (torch.ones(3, 2, 8), ids, torch.zeros(2 * ROWS, 8)))
