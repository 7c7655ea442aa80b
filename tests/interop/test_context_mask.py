"""Start here when a packed document, a window or a mask of transformers is not recognised under context parallelism."""

import pytest
import torch
from transformers import masking_utils

from fused_megatron.checks import InputError
from fused_megatron.interop.context_mask import make_context_mask


def packed(mask_function, positions):
    """As transformers' create_causal_mask combines a mask with packed documents."""
    documents = masking_utils.find_packed_sequence_indices(positions)
    # transformers before 5.23 (Python 3.10 has 5.20 at most) does not count positions from each document's first.
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, _: function)
    inside = remap(mask_function, positions)
    return masking_utils.and_masks(inside, masking_utils.packed_sequence_mask_function(documents))


def test_documents_of_packed_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    for function, window in [
        (masking_utils.causal_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(2), 2),
    ]:
        mask = make_context_mask(2, 6, 6, mask_function=packed(function, positions), local_size=window)
        assert (mask.causal, mask.window, mask.padding) == (True, window, None)
        assert mask.documents.tolist() == [0, 3, 6, 7, 12]


def test_masks_without_documents():
    plain = masking_utils.causal_mask_function
    padding = torch.tensor([[True, True, False], [True, True, True]])
    mask = make_context_mask(2, 3, 3, mask_function=plain, attention_mask=padding)
    assert mask.causal and mask.documents is None and torch.equal(mask.padding, ~padding)
    assert make_context_mask(1, 3, 3, mask_function=plain, attention_mask=padding[1:]).padding is None
    assert not make_context_mask(2, 3, 3, mask_function=masking_utils.bidirectional_mask_function).causal


def prefix(sample, head, query, key):
    """The first three tokens see each other."""
    return (key <= query) | (key < 3)


def strided(sample, head, query, key):
    """Neighbours see each other as in a causal mask, but some far keys are hidden."""
    return (key <= query) & ((query - key) % 5 != 2)


def chunks(sample, head, query, key):
    return (key <= query) & (query // 1000 == key // 1000)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (prefix, {}, "query .* sees other keys"),
        (strided, {}, "query .* sees other keys"),
        (masking_utils.sliding_window_causal_mask_function(3), {}, "query .* sees other keys"),
        (masking_utils.sliding_window_bidirectional_mask_function(3), {"local_size": 3}, "query .* sees other keys"),
        (
            masking_utils.sliding_window_causal_mask_function(1),
            {"local_size": 1},
            "sliding_window=1 must be at least 2",
        ),
        (chunks, {"device": "meta"}, "attention in chunks of 1000 positions"),
        (masking_utils.causal_mask_function, {"kv_length": 20}, "20 keys for 12 queries"),
        (masking_utils.causal_mask_function, {"q_offset": 3}, "no cache may hold tokens"),
    ],
)
def test_other_masks_are_refused(function, options, words):
    with pytest.raises(InputError, match=words):
        make_context_mask(**{"batch_size": 1, "q_length": 12, "kv_length": 12, "mask_function": function} | options)
