"""Fixed sizes of gradient buckets and of updates; this file imports no torch, so that formulas start without it."""

BYTES_PER_ELEMENT = 4
"""Gradients are accumulated and summed in float32."""
BUCKETS_UNDER_WAY = 2
"""Most packed copies of buckets at a time: one is sent while the next is packed."""
BATCH_ELEMENTS = 1 << 24
"""Most elements that an elementwise rule updates at once, unless one tensor has more: the size of its temporaries."""
