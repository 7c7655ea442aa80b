"""Formulas for the bytes that a rank sends in a step."""

from collections import Counter

from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import TrainConfig
from fused_megatron.config.parallel import cheapest_dispatch
from fused_megatron.models import StageSpan


def stage_communication(config: TrainConfig, span: StageSpan) -> dict[str, int]:
    """Compute the bytes of a stage's tensor-parallel collectives, forward and backward of one microbatch, by kind.

    Bytes count whole tensors, as record_communication does. A ring sends (R - 1) / R of them, and twice as many for an
    all-reduce. A is the bytes of an activation [S, B, H]; with context parallelism S is the number of positions of the
    rank that holds most. k is 1 for a block that recompute="full" recomputes, since backward repeats its forward, and
    otherwise 0. A block sends

        all_reduce      (4 + 2 k) A                         Shoeybi et al. 2019 (arXiv:1909.08053), section 3
      instead with sequence parallelism
        reduce_scatter  (4 + 2 k) A                         Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2
        all_gather      (6 + 2 k) A                         two of them gather an operand again for backward
      and in both cases, with G key-value heads of size D
        all_reduce      8 G D (H + 1) if G is less than R (8 G D H without biases); with query_key_norm over all heads
                        (2 + k) 8 bytes a token

    The first and the last stage also send an all-reduce of A each; with sequence parallelism, a reduce-scatter and an
    all-gather of A instead. The first stage then all-gathers the gradient of learned positions. The last stage gathers
    12 bytes a token and rank for the loss. Where tensor-parallel ranks share the messages of a pipeline
    (parallel.scatter_messages), a stage all-gathers A for each message that it receives.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
    """
    model, parallel = config.model, config.parallel
    ranks, rows = parallel.tensor_parallel_size, config.most_positions
    tokens = config.training.microbatch_size * rows
    if ranks == 1:
        return {}
    size = config.training.element_bytes
    activation = size * tokens * model.hidden_size
    blocks, ends = span.stop - span.start, span.first + span.last
    again = 2 * model.recomputed_blocks(blocks) if model.recompute == "full" else 0
    # Gradients of parameters that several ranks hold, while each rank uses them for different heads.
    qkv_bias = model.linear_biases if model.qkv_bias is None else model.qkv_bias
    copied = 2 * model.kv_heads * model.head_size * (model.hidden_size + qkv_bias) * (model.kv_heads < ranks)
    over_all_heads = model.query_key_norm and model.query_key_norm_over == "all_heads"
    sent = Counter(all_gather=12 * tokens * ranks * span.last, all_reduce=blocks * 4 * copied)
    sent["all_reduce"] += (2 * blocks + model.recomputed_blocks(blocks)) * 8 * tokens * over_all_heads
    if parallel.scatters_messages:
        sent["all_gather"] += ranks * message_bytes(config) * _messages_received(config, span)
    if not parallel.sequence_parallel:
        sent["all_reduce"] += (blocks * 4 + again + ends) * activation
    else:
        sent["reduce_scatter"] = (blocks * 4 + again + ends) * activation
        sent["all_gather"] += (blocks * 6 + again + ends) * activation
        if span.first and model.position == "learned":
            sent["all_gather"] += size * rows * model.hidden_size
    return {kind: num_bytes for kind, num_bytes in sent.items() if num_bytes}


def part_gradient_bytes(config: TrainConfig, span: StageSpan) -> int:
    """Compute the bytes of the gradients that tensor-parallel ranks make by parts, and sum once in a step.

    4 bytes an element: the norms of query_key_norm per head, 2 D a block; routers, since ranks divide the tokens; with
    sequence parallelism all norms, the biases that every rank holds, and the gates of shared experts. With a ZeRO
    stage, a rank sums only its rows.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
    """
    model, parallel = config.model, config.parallel
    if parallel.tensor_parallel_size == 1:
        return 0
    blocks, experts = span.stop - span.start, sum(map(model.has_experts, range(span.start, span.stop)))
    per_head = model.query_key_norm and model.query_key_norm_over != "all_heads"
    elements = blocks * 2 * model.head_size * per_head + experts * model.hidden_size * (model.num_experts or 0)
    if parallel.sequence_parallel:
        norm = model.hidden_size * (1 if model.normalization == "rms_norm" else 2)
        elements += blocks * 2 * norm + norm * span.last
        elements += (2 * blocks - experts) * model.hidden_size * model.linear_biases
        elements += experts * model.hidden_size * model.shared_expert_gate
    return 4 * elements


def message_bytes(config: TrainConfig) -> int:
    """Compute the bytes that a rank sends to the next stage for a microbatch: of [S, B, H] or of its part.

    Tensor-parallel ranks send parts: sequence shards, or with parallel.scatter_messages equal parts of the same
    activation (the last ranks may have fewer elements). The activation and its gradient have the same size. With
    context parallelism S is the number of positions of the rank that holds most.
    """
    model, parallel = config.model, config.parallel
    rows = config.most_positions // (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)
    elements = rows * config.training.microbatch_size * model.hidden_size
    parts = parallel.tensor_parallel_size if parallel.scatters_messages else 1
    return config.training.element_bytes * -(-elements // parts)


def _messages_received(config: TrainConfig, span: StageSpan) -> int:
    """Count the messages that a stage receives from other ranks for one microbatch, forward and backward."""
    placement = plan_pipeline(config).placement
    neighbours = placement[max(0, span.index - 1) : span.index + 2]
    return sum(rank != placement[span.index] for rank in neighbours)


def attention_communication(
    config: TrainConfig, span: StageSpan, cp_rank: int = 0, *, evenly: bool = False
) -> dict[str, int]:
    """Compute the bytes that attention sends between context-parallel ranks for one microbatch of a stage, by kind.

    Forward and backward together, without documents and padding. m is the number of rows of the rank, B G 2 D the
    elements of a row's keys and values. A block sends

        ring            send            3 m' B G 2 D    m' rows that other ranks need, summed over these ranks: keys and
                                                        values in forward and in backward, and the same number of
                                                        gradients of the rows that this rank needs
        all_gather      all_gather      2 n m B G 2 D   n ranks; m of the rank with most rows
                        reduce_scatter  n m B G 2 D
        all_to_all      all_to_all      query, key, value and context to heads and back, and their gradients

    and its forward again where config.model recomputes attention. A ring of groups that exchange heads sends both.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
        cp_rank: the context-parallel rank.
        evenly: count a causal ring as if its ranks divided the sequence evenly, without torch. It differs by a few
            rows, and the ranks may have their numbers of bytes in another order.
    """
    if (sent := _zig_zag_communication(config, span, cp_rank, evenly)) is not None:
        return sent
    # With torch, which the other formulas start without.
    from fused_megatron.assembly.microbatches import partition_of  # noqa: PLC0415
    from fused_megatron.context_parallel import exchange_size  # noqa: PLC0415
    from fused_megatron.context_parallel.attention_plan import plan_of  # noqa: PLC0415
    from fused_megatron.context_parallel.head_exchange import HeadExchange  # noqa: PLC0415
    from fused_megatron.ops.attention import AttentionMask  # noqa: PLC0415

    model, parallel = config.model, config.parallel
    ranks, batch = parallel.context_parallel_size, config.training.microbatch_size
    if ranks == 1:
        return {}
    heads = model.num_heads // parallel.tensor_parallel_size
    kv_heads = max(1, model.kv_heads // parallel.tensor_parallel_size)
    mask = AttentionMask(causal=model.traits.predicts == "next_token", window=model.sliding_window)
    partition = partition_of(config, mask, batch)
    neighbours = exchange_size(parallel.context_parallel_method, ranks, heads, kv_heads)
    gathers = parallel.context_parallel_method == "all_gather"
    plan = plan_of(partition, mask, batch, cp_rank, neighbours, gathered=gathers)
    forward, backward = Counter[str](), Counter[str]()
    if gathers:
        forward["all_gather"] = backward["all_gather"] = ranks * max(plan.sizes) * kv_heads * 2
        backward["reduce_scatter"] = forward["all_gather"]
    else:
        members = plan.neighbours
        me = members.index(cp_rank)
        exchange = HeadExchange(members, me, tuple(plan.sizes[rank] for rank in members), heads, kv_heads, None)
        of_members = [end - first for first, end in map(exchange.kv_heads, range(neighbours))]
        if neighbours > 1:
            rows, all_rows = plan.sizes[cp_rank], sum(exchange.rows)
            to_heads, to_rows = rows * heads, all_rows * heads // neighbours
            keys_to_heads = rows * 2 * sum(of_members)
            forward["all_to_all"] = to_heads + keys_to_heads + to_rows
            backward["all_to_all"] = to_heads + exchange.repeats_keys * keys_to_heads
            backward["all_to_all"] += to_rows + all_rows * 2 * of_members[me]
        sent, needed = (
            sum(stop - start for hop in plan.hops[1:] for start, stop in ranges(hop))
            for ranges in (lambda hop: hop.sent, lambda hop: hop.received)
        )
        forward["send"] = sent * 2 * of_members[me]
        backward["send"] = (sent + needed) * 2 * of_members[me]
    blocks = span.stop - span.start
    head_bytes = config.training.element_bytes * batch * model.head_size
    again = model.recomputed_blocks(blocks)
    elements = {kind: forward[kind] * (blocks + again) + backward[kind] * blocks for kind in forward | backward}
    return {kind: head_bytes * number for kind, number in elements.items() if number}


def _zig_zag_communication(config: TrainConfig, span: StageSpan, cp_rank: int, evenly: bool) -> dict[str, int] | None:
    """Compute attention_communication for a causal ring whose ranks divide the sequence evenly; None for any other.

    Of 2 n blocks rank r has block r and block 2 n - 1 - r. Each of the n - 1 other ranks needs the first one, and the r
    ranks before it also need the second one.
    """
    model, parallel = config.model, config.parallel
    ranks, seq_len = parallel.context_parallel_size, model.seq_len
    is_causal = model.traits.predicts == "next_token" and model.sliding_window is None
    even = evenly or seq_len % (2 * ranks * parallel.row_multiple) == 0
    if parallel.context_parallel_method != "ring" or not is_causal or not even or ranks == 1:
        return None
    sent, needed = ranks - 1 + cp_rank, 2 * (ranks - 1) - cp_rank
    blocks = span.stop - span.start
    messages = sent * (2 * blocks + model.recomputed_blocks(blocks)) + needed * blocks
    kv_heads = max(1, model.kv_heads // parallel.tensor_parallel_size)
    row = config.training.element_bytes * config.training.microbatch_size * 2 * kv_heads * model.head_size
    return {"send": messages * row * (seq_len // (2 * ranks))}


def expert_communication(config: TrainConfig, span: StageSpan) -> dict[str, int]:
    """Compute the bytes that experts send for one microbatch of a stage, by kind, with balanced routes.

    Forward and backward together; bytes count as in stage_communication. With T tokens of this rank, K experts a token,
    and rows of H elements, a block with experts sends

        all_to_all      4 K T (1 - 1 / ep) rows between ep ranks, and 4 K T (etp - 1) rows between etp ranks; with each
                        second row 4 bytes of its probability, or of the gradient of the probability
      or with expert_dispatch="all_gather", over n = ep (and once more n = ep x etp) ranks
        all_gather      2 n T rows, and 8 n K T bytes of routes
        reduce_scatter  2 n T rows, and 4 n K T bytes of gradients of probabilities

    Where config.model.recompute is "full", tokens and routes are sent once more, and results are not. A rank sends no
    rows for its own experts.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
    """
    sent: Counter[str] = Counter()
    for of_axis in expert_communication_by_axis(config, span).values():
        sent.update(of_axis)
    return dict(sent)


def expert_communication_by_axis(config: TrainConfig, span: StageSpan) -> dict[str, dict[str, int]]:
    """Compute the same bytes as expert_communication for the group of ep ranks, and for the group of etp ranks."""
    model, parallel = config.model, config.parallel
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    blocks = range(span.start, span.stop)
    recomputed = model.recomputed_blocks(len(blocks)) if model.recompute == "full" else 0
    number = sum(model.has_experts(block) for block in blocks)
    forwards = number + sum(model.has_experts(block) for block in blocks[:recomputed])
    row = config.training.element_bytes * model.hidden_size
    tokens, selected = own_tokens(config), model.experts_per_token
    found: dict[str, dict[str, int]] = {}
    for axis, size in (("ep", ep), ("etp", etp)):
        if size == 1 or not number:
            continue
        if expert_dispatch(config) == "all_to_all":
            pairs = selected * tokens * (ep - 1) // ep if axis == "ep" else selected * tokens * (etp - 1)
            found[axis] = {"all_to_all": pairs * (row * (forwards + 3 * number) + 4 * (forwards + number))}
        else:
            ranks = ep if axis == "ep" else ep * etp
            found[axis] = {
                "all_gather": ranks * tokens * (row * (forwards + number) + 8 * selected * forwards),
                "reduce_scatter": ranks * tokens * (2 * row + 4 * selected) * number,
            }
    return found


def expert_dispatch(config: TrainConfig) -> str:
    """Return the way of tokens to their experts: parallel.expert_dispatch, or its default."""
    parallel = config.parallel
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    return parallel.expert_dispatch or cheapest_dispatch(ep, etp, config.model.experts_per_token)


def own_tokens(config: TrainConfig) -> int:
    """Compute the tokens of a microbatch that a rank brings to its experts: tensor-parallel ranks divide positions."""
    rows = -(-config.most_positions // config.parallel.tensor_parallel_size)
    return rows * config.training.microbatch_size
