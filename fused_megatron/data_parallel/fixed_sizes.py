"""Fixed sizes of gradient buckets and of updates; this file imports no torch, so that formulas start without it."""

BYTES_PER_ELEMENT = 4
"""Gradients are accumulated and summed in float32."""
BUCKETS_UNDER_WAY = 2
"""Most packed copies of buckets at a time: one is sent while the next is packed."""
BATCH_ELEMENTS = 1 << 24
"""Most elements that an elementwise rule updates at once, unless one tensor has more: the size of its temporaries."""
ALIGNED_ELEMENTS = 8
"""A parameter's part of a flat tensor begins at a multiple of this many elements: 16 bytes or more in every dtype.
Elsewhere the CUDA kernels of AdamW and of the gradient norm access one element at a time."""


def aligned(num_elements: int) -> int:
    """Return the room of a part of a flat tensor: its elements, with padding up to the next part."""
    return -(-num_elements // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
