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
    (
        "the gradient of the residual stream is added by a kernel of its own",
        "fused_megatron/models/residual_stream.py",
        "norm(x, return_total=True)",
        "(norm(x), x)",
        ("tests/models/test_block_kernels.py",),
    ),
    (
        "a norm loses the gradient of what else reads its input",
        "fused_megatron/ops/rms_norm.py",
        "            need_dweight,\n            dtotal,\n",
        "            need_dweight,\n            None if x.dtype == dy.dtype else dtotal,\n",
        ("tests/ops/test_norm.py",),
    ),
    (
        "an open sum is closed without the branch",
        "fused_megatron/models/residual_stream.py",
        "ops.bias_dropout_add(x.output, None, x.stream, 0.0) if",
        "x.stream if",
        ("tests/models/test_gpt_stages.py",),
    ),
    (
        "the gradient of value is left out of the buffer",
        "fused_megatron/ops/rotary_query_key_value.py",
        "        parts[2].copy_(dv)\n",
        "        parts[2].zero_()\n",
        ("tests/ops/test_rotary_query_key_value.py",),
    ),
    (
        "gradients are rotated forwards in the buffer",
        "fused_megatron/ops/rotary_query_key_value.py",
        "parts[1], cos, sin, 0, True)",
        "parts[1], cos, sin, 0, False)",
        ("tests/ops/test_rotary_query_key_value.py",),
    ),
    (
        "the dropout of the attention kernel is the same on every rank",
        "fused_megatron/models/dropout.py",
        "{batch.first_sample} {first_head}",
        "{batch.first_sample}",
        ("tests/models/test_dropout.py",),
    ),
    (
        "stages draw the dropout of the attention kernel as if each were the first",
        "fused_megatron/models/stack.py",
        "first_site=len(DROPOUT_SITES) * self.span.start,",
        "first_site=0,",
        ("tests/models/test_dropout.py",),
    ),
    (
        "the dropout of the attention kernel moves torch's generator",
        "fused_megatron/ops/attention.py",
        "    with torch.random.fork_rng(devices=[device] if is_cuda else []):\n",
        "    with nullcontext():\n",
        ("tests/models/test_dropout.py",),
    ),
    (
        "an embedding adds the tokens of other ranks",
        "fused_megatron/reference/vocab_embedding.py",
        "    local = local.where(owned, rows)\n",
        "    local = local.where(owned, 0)\n",
        ("tests/ops/test_vocab_embedding.py",),
    ),
)
