"""Table of mistakes that cost time on a GPU, small sums and waits of the host: (name, file, old, new, tests)."""

_PARTS = ("tests/sharding/test_partial_gradients.py",)

MUTATIONS = (
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
