"""Table of mistakes that cost time on a GPU, small sums and waits of the host: (name, file, old, new, tests)."""

_PARTS = ("tests/sharding/test_partial_gradients.py",)

MUTATIONS = (
    (
        "a tensor-parallel rank sends the rest of a message, not its part",
        "fused_megatron/pipeline/run/message_parts.py",
        "min(numel, (self._rank + 1) * size)",
        "numel",
        ("tests/pipeline/run/test_message_parts.py",),
    ),
    (
        "each rank keeps the way that is fastest on itself",
        "fused_megatron/overlap/timed_ways.py",
        "    product_s, *seconds = slowest([product_s, *seconds], group, operands.device)\n",
        "",
        ("tests/overlap/test_timed_ways.py",),
    ),
    (
        "a reduce-scatter counts as an all-reduce",
        "fused_megatron/overlap/chunk_choice.py",
        "moved = 1.0 if dim is None else 0.5",
        "moved = 1.0",
        ("tests/overlap/test_group_costs.py",),
    ),
    (
        "gradients by parts are summed in backward and by the buckets",
        "fused_megatron/sharding/partial_gradients.py",
        "        sum_over(group)\n    return True\n",
        "        sum_over(group)\n    return False\n",
        _PARTS,
    ),
    (
        "the buckets leave gradients by parts as they are",
        "fused_megatron/data_parallel/reduction.py",
        "        self._sum_parts()\n",
        "",
        _PARTS,
    ),
    (
        "rotary frequencies are copied from the host",
        "fused_megatron/models/rotary.py",
        "_frequencies(sequence.seq_len, config, device)",
        '_frequencies(sequence.seq_len, config, torch.device("cpu")).to(device)',
        ("tests/models/test_host_waits.py",),
    ),
)
