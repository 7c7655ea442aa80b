"""Times of the parts of a model on one rank: a block, the embedding, the head, for one microbatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES, Placements, zero_stage
from fused_megatron.models import StageSpan
from fused_megatron.planning.parameter_counts import (
    attention_features,
    block_parameters,
    expansion_features,
    stage_parameters,
    vocabulary_elements,
)
from fused_megatron.planning.prediction.action_work import ActionWork, Work
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.end_of_step import exposed_s, replica_ring
from fused_megatron.planning.prediction.engine import Engine
from fused_megatron.planning.prediction.message_work import handled_messages
from fused_megatron.planning.prediction.product_time import linear_s, product_s
from fused_megatron.planning.prediction.transfer_time import Ring, ring_of
from fused_megatron.planning.rank_communication import attention_communication, expert_communication_by_axis

_EXPERT_COLLECTIVES = 6
"""Collectives of a block with experts over ep ranks, and as many over etp ranks: three forward, three backward."""
_RING_WORK = 2.0
"""Work of attention on a CPU in a ring, whose hops are tiles of scores in memory, over one fused kernel."""
_CHUNKS = 8
"""Chunks into which products are cut whose collectives run beside them; the first chunk hides nothing."""


class StageTimes:
    """Work of the stages of a run.

    Attributes:
        factor: measured over predicted time of the blocks; 1 where the cluster has none measured of this shape.

    Args:
        config, cluster, engine: of the run.
        shared: work of blocks without what replicas send; runs share it that differ in dp, pp, ZeRO and recomputation.
    """

    def __init__(
        self,
        config: TrainConfig,
        cluster: Cluster,
        engine: Engine,
        shared: dict[tuple[bool, str], tuple[Work, Work, Work]] | None = None,
    ) -> None:
        self.config, self.cluster, self.engine = config, cluster, engine
        model, parallel = config.model, config.parallel
        self.size = config.training.element_bytes
        self.tp = parallel.tensor_parallel_size
        self.tokens = config.training.microbatch_size * config.most_positions
        self.own_tokens = self.tokens // self.tp if parallel.sequence_parallel else self.tokens
        self.tp_ring = Ring(cluster, self.tp)
        self.hidden = model.hidden_size
        measured = cluster.measured_block(config)
        self.factor = 1.0 if measured is None else measured.factor
        self._shared = {} if shared is None else shared
        self._blocks: dict[tuple[bool, bool], ActionWork] = {}
        self._ends: dict[tuple[bool, bool], ActionWork] = {}

    def of_stage(self, span: StageSpan) -> ActionWork:
        """Return the work of one microbatch in a stage."""
        total = ActionWork(Work(), Work(), Work())
        for number, work in self._parts(span):
            total += work * number
        return total

    def seconds_of_stage(self, span: StageSpan) -> tuple[float, float, float]:
        """Return the seconds of F, B and W of one microbatch in a stage, without their causes: a search asks often."""
        forward_device = forward_host = backward_device = backward_host = weights = 0.0
        for number, work in self._parts(span):
            device, host, device_back, host_back, of_weights = work.totals
            forward_device += number * device
            forward_host += number * host
            backward_device += number * device_back
            backward_host += number * host_back
            weights += number * of_weights
        if self.cluster.device == "cpu":
            forward, backward = forward_device + forward_host, backward_device + backward_host
        else:
            forward, backward = max(forward_device, forward_host), max(backward_device, backward_host)
        return forward, backward, min(weights, backward)

    def _parts(self, span: StageSpan) -> Iterator[tuple[int, ActionWork]]:
        """Yield the parts of a stage, each with its number."""
        model = self.config.model
        again = span.start + model.recomputed_blocks(span.stop - span.start)
        for first, stop, recomputed in ((span.start, again, True), (again, span.stop, False)):
            num_experts = len(model.expert_blocks_of(first, stop))
            for number, has_experts in ((num_experts, True), (stop - first - num_experts, False)):
                if number:
                    yield number, self.block(has_experts, recomputed)
        if span.first:
            yield 1, self.embedding
        if span.last:
            yield 1, self.head
        ends = span.first, span.last
        if any(ends) and self._placements.gradients:
            if ends not in self._ends:
                self._ends[ends] = self._sent_by_ends(span)
            yield 1, self._ends[ends]
        if self.config.parallel.scatters_messages:
            yield 1, self._gathered_messages(span)
        if self.cluster.device == "cpu" and not (span.first and span.last):
            yield 1, handled_messages(self.config, self.cluster, self.engine, span)

    def block(self, has_experts: bool, recomputed: bool) -> ActionWork:
        """Return the work of one microbatch in a block."""
        key = (has_experts, recomputed)
        if key not in self._blocks:
            kind = self.config.model.recompute if recomputed else "none"
            if (has_experts, kind) not in self._shared:
                self._shared[has_experts, kind] = self._block(has_experts, kind)
            forward, backward, weights = self._shared[has_experts, kind]
            self._blocks[key] = ActionWork(*self._with_gathers(forward, backward, *key), weights)
        return self._blocks[key]

    def _block(self, has_experts: bool, recompute: str) -> tuple[Work, Work, Work]:
        """Return the work of forward, of backward, and of its products of weights, without what replicas send."""
        linear = [*self._attention_linears(), *self._mlp(has_experts)]
        attention = self.attention
        elements = self._elements(has_experts)
        syncs = 2 - (has_experts and not self.config.model.shared_ffn_size)
        ops = self.engine.parallel_ops * (self.tp - 1) ** 2
        added_forward, added_backward = self._added_ops()
        extra = self._extra_ops(has_experts)
        launch = 1e-6 * self.cluster.launch_us
        outputs, inputs, weights = zip(*(linear_s(self.cluster, self.size, *shape) for shape in linear), strict=True)
        forward = Work(
            products=sum(outputs) + attention.products,
            memory_bound=self._moved(elements) + attention.memory_bound,
            # All products but the first, of queries, keys and values, are cut into chunks.
            tensor_parallel=self._exposed_syncs(syncs, sum(outputs[1:])),
            host=launch * (self.engine.forward_ops + ops + extra + added_forward),
        )
        backward = Work(
            products=sum(inputs) + sum(weights) + attention.products * self._attention_backward,
            memory_bound=self._moved(1.75 * elements) + 1.6 * attention.memory_bound,
            tensor_parallel=self._exposed_syncs(syncs, sum(weights)) + self._gathers_again(syncs),
            host=launch * (self.engine.backward_ops + ops + 2 * extra + added_backward),
        )
        if recompute != "none":
            backward += forward if recompute == "full" else attention
        forward, backward = self._with_context(forward, backward, attention, recompute)
        forward, backward = self._with_experts(forward, backward, has_experts, recompute)
        return forward * self.factor, backward * self.factor, Work(products=sum(weights)) * self.factor

    def _added_ops(self) -> tuple[float, float]:
        """Return the ops that the layout adds to a block's forward, and to its backward."""
        parallel, engine = self.config.parallel, self.engine
        ranks = parallel.context_parallel_size
        turns = 0 if ranks == 1 else ranks if parallel.context_parallel_method == "ring" else 2
        context = engine.context_ops * turns
        shards = 0.0 if self.tp == 1 else engine.sequence_ops if parallel.sequence_parallel else engine.shard_ops
        return context + shards, 1.3 * context + shards

    def _extra_ops(self, has_experts: bool) -> float:
        """Return the ops of softmax if the engine's fused kernel does not fit, and of experts one after the other."""
        model, parallel = self.config.model, self.config.parallel
        matrices = self.config.training.microbatch_size * model.num_heads // self.tp
        ops = self.engine.separate_softmax_ops * float(matrices % self.engine.softmax_multiple > 0)
        if has_experts:
            local = (model.num_experts or 0) // parallel.expert_parallel_size
            ops += self.engine.expert_ops * local * (2 if parallel.expert_tensor_parallel_size > 1 else 1)
        return ops

    def _attention_linears(self) -> Iterator[tuple[int, int, int, int]]:
        query_key_value, query = attention_features(self.config.model, self.tp)
        yield 1, self.tokens, query_key_value, self.hidden
        yield 1, self.tokens, self.hidden, query

    def _mlp(self, has_experts: bool) -> Iterator[tuple[int, int, int, int]]:
        """Yield (count, m, n, k) of the products of a feed-forward."""
        model, parallel = self.config.model, self.config.parallel
        width = model.shared_ffn_size if has_experts else model.ffn_size
        if width:
            yield 1, self.tokens, expansion_features(model, width, self.tp), self.hidden
            yield 1, self.tokens, self.hidden, width // self.tp
        if has_experts:
            ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
            experts = model.num_experts or 1
            own = self.tokens / self.tp
            yield 1, int(own), experts, self.hidden
            local = experts // ep
            rows = max(1, round(own * model.experts_per_token * ep * etp / experts))
            yield local, rows, expansion_features(model, model.expert_ffn_size, etp), self.hidden
            yield local, rows, self.hidden, model.expert_ffn_size // etp

    def _elements(self, has_experts: bool) -> float:
        """Return the elements that memory-bound kernels read and write in forward, without scores."""
        model, parallel = self.config.model, self.config.parallel
        gated = not model.activation.startswith("gelu")
        query_key_value, _ = attention_features(model, self.tp)
        elements = self.engine.activation_passes * self.own_tokens * self.hidden
        elements += 2 * self.tokens * query_key_value * (model.position == "rotary")
        width = model.shared_ffn_size if has_experts else model.ffn_size
        elements += self.tokens * width / self.tp * (3 if gated else 2)
        if has_experts:
            pairs = self.tokens / self.tp * model.experts_per_token
            elements += pairs * model.expert_ffn_size * (3 if gated else 2)
            elements += pairs * parallel.expert_tensor_parallel_size * 4 * self.hidden
        return elements

    @cached_property
    def attention(self) -> Work:
        """Work of attention between its projections in forward, without `factor`."""
        model, parallel = self.config.model, self.config.parallel
        heads, samples = model.num_heads / self.tp, self.config.training.microbatch_size
        rows, seq_len = self.tokens // samples, model.seq_len
        if not self.engine.fused_attention:
            products = self._product(samples * heads, rows, seq_len, model.head_size)
            products += self._product(samples * heads, rows, model.head_size, seq_len)
            scores = samples * heads * rows * seq_len
            return Work(products=products, memory_bound=self._moved(self.engine.score_passes * scores))
        pairs = seq_len * seq_len / parallel.context_parallel_size
        if model.sliding_window is not None and model.sliding_window < seq_len:
            pairs *= 1 - (1 - model.sliding_window / seq_len) ** 2
        pairs *= 0.5 if model.traits.predicts == "next_token" else 1.0
        flops = 4 * samples * heads * pairs * model.head_size
        rate = 1e12 * self.cluster.peak_tflops * self.cluster.attention_efficiency
        return Work(products=flops / rate + 1e-6 * self.cluster.product_us)

    @property
    def _attention_backward(self) -> float:
        """Work of attention's backward over forward: a fused kernel computes the scores again."""
        return 2.5 if self.engine.fused_attention else 2.0

    def _product(self, count: float, m: float, n: float, k: float) -> float:
        """Return the seconds of `count` products [m, k] x [k, n] in one kernel."""
        return product_s(self.cluster, self.size, count, m, n, k)

    def _moved(self, elements: float) -> float:
        return self.size * elements / (1e9 * self.cluster.memory_gb_per_s)

    def _sync(self) -> float:
        """Return the seconds of one all-reduce of an activation, or of a reduce-scatter and an all-gather."""
        activation = self.size * self.tokens * self.hidden
        if self.config.parallel.sequence_parallel:
            return 2 * self.tp_ring.gather_s(activation)
        return self.tp_ring.all_reduce_s(activation)

    def _exposed_syncs(self, number: int, products_s: float) -> float:
        """Return the seconds that collectives of activations add to products, of which one chunk hides the next."""
        transfers_s = number * self._sync()
        if not self.engine.overlaps_products or self.config.parallel.whole_products:
            return transfers_s
        return self.exposed(transfers_s, (1 - 1 / _CHUNKS) * products_s)

    def _gathers_again(self, number: int) -> float:
        """Return the seconds in which backward gathers the operands that sequence parallelism did not keep.

        On a GPU the products of the weights hide these gathers.
        """
        if self.cluster.device == "cuda" or not self.config.parallel.sequence_parallel:
            return 0.0
        return number * self.tp_ring.gather_s(self.size * self.tokens * self.hidden)

    def _with_context(self, forward: Work, backward: Work, attention: Work, recompute: str) -> tuple[Work, Work]:
        """Add the transfers of context parallelism, which run beside attention."""
        ranks = self.config.parallel.context_parallel_size
        if ranks == 1:
            return forward, backward
        ring = ring_of(self.cluster, ranks, self.tp)
        sent = attention_communication(self._recomputing(recompute), StageSpan(0, 3, 0, 1), evenly=True)
        seconds = sum(
            ring.gather_s(num_bytes) if kind != "send" else self._sent_around_s(ring, num_bytes)
            for kind, num_bytes in sent.items()
        )
        if self.cluster.device == "cpu" and "send" not in sent:
            seconds += 3 * ring.gather_s(1)  # forward gathers once, backward twice
        if self.cluster.device == "cpu" and "send" in sent:
            more = attention * (_RING_WORK - 1)
            forward, backward = forward + more, backward + more * self._attention_backward
        in_forward = seconds / 3 if "send" in sent else seconds / 2
        in_backward = seconds - in_forward
        hidden = attention.products * (1 - 1 / ranks) if "send" in sent else 0.0
        forward += Work(context_parallel=self.exposed(in_forward, hidden))
        backward += Work(context_parallel=self.exposed(in_backward, hidden * self._attention_backward))
        return forward, backward

    def _sent_around_s(self, ring: Ring, num_bytes: float) -> float:
        """Return the seconds of a ring's messages; on a CPU gloo sends them, once a hop forward and twice backward."""
        if self.cluster.device == "cuda":
            return num_bytes / (1e9 * ring.gb_per_s)
        messages = 3 * (ring.size - 1)
        handled = 1e-6 * self.cluster.launch_us * self.engine.host_message_ops
        return messages * (ring.message_s(num_bytes / messages) + handled)

    def _recomputing(self, recompute: str) -> TrainConfig:
        """Return the config with this recomputation of all blocks: a run may recompute only some of them."""
        model = self.config.model
        if (model.recompute, model.recompute_blocks) == (recompute, None):
            return self.config
        return replace(self.config, model=replace(model, recompute=recompute, recompute_blocks=None))

    def _with_experts(self, forward: Work, backward: Work, has_experts: bool, recompute: str) -> tuple[Work, Work]:
        if not has_experts:
            return forward, backward
        etp = self.config.parallel.expert_tensor_parallel_size
        # The etp ranks of a group of experts are neighbours; its ep ranks lie etp ranks apart.
        rings = {
            "ep": ring_of(self.cluster, self.config.parallel.expert_parallel_size, etp),
            "etp": ring_of(self.cluster, etp),
        }
        first = self.config.model.expert_blocks[0]
        sent = expert_communication_by_axis(self._recomputing(recompute), StageSpan(1, 3, first, first + 1))
        seconds = 0.0
        for axis, of_axis in sent.items():
            ring = rings[axis]
            for kind, num_bytes in of_axis.items():
                took = ring.exchange_s(num_bytes) if kind == "all_to_all" else ring.gather_s(num_bytes)
                seconds += took - ring.latency_s
            seconds += _EXPERT_COLLECTIVES * ring.latency_s
        return forward + Work(expert_parallel=seconds / 2), backward + Work(expert_parallel=seconds / 2)

    def _with_gathers(self, forward: Work, backward: Work, has_experts: bool, recomputed: bool) -> tuple[Work, Work]:
        """Add what ZeRO sends in every microbatch, which hides under the computation of a block.

        Stages 2 and 3 reduce gradients; stage 3 gathers weights for forward and again for backward.
        """
        if not self._placements.gradients:
            return forward, backward
        number = block_parameters(self.config.model, self.config.parallel, has_experts).total
        gather = self._gather_s(number)
        host = 1e-6 * self.cluster.launch_us * self.engine.unshard_ops * self._gathers_blocks
        again = 2 + (recomputed and self.config.model.recompute == "full")
        sent = self.exposed(gather + self._reduce_s(number), backward.on_device)
        forward += Work(data_parallel=self.exposed(gather, forward.on_device), host=host)
        backward += Work(data_parallel=sent, host=again * host)
        return forward, backward

    def _gathered_messages(self, span: StageSpan) -> ActionWork:
        """Return the gathers of messages whose parts tensor-parallel ranks have received.

        As if no neighbour were on the same rank, since stages of the same form share their times.
        """
        gathered = Work(tensor_parallel=self.tp_ring.gather_s(self.size * self.tokens * self.hidden))
        return ActionWork(gathered * (not span.first), gathered * (not span.last), Work())

    def _sent_by_ends(self, span: StageSpan) -> ActionWork:
        """Return what ZeRO sends in every microbatch for the vocabulary tables, positions and the last norm.

        Each use of a table gathers it once: the loss computes its gradient in forward. A table that is the embedding
        and the head is reduced once.
        """
        model, parallel = self.config.model, self.config.parallel
        number = stage_parameters(model, replace(span, stop=span.start), parallel).total
        table, uses = vocabulary_elements(model, self.tp), span.first + span.last
        others = number - table * (1 if model.tied_embeddings else uses)
        ends = [work for work, is_here in ((self.embedding, span.first), (self.head, span.last)) if is_here]
        in_forward, in_backward = (
            sum(work.on_device for work in works)
            for works in ([end.forward for end in ends], [end.backward for end in ends])
        )
        gathered, again = self._gather_s(uses * table + others), self._gather_s(others)
        # Each end gathers its table, and positions or the last norm.
        host = 1e-6 * self.cluster.launch_us * self.engine.unshard_ops * 2 * uses * self._gathers_blocks
        return ActionWork(
            Work(data_parallel=self.exposed(gathered, in_forward), host=host),
            Work(data_parallel=self.exposed(again + self._reduce_s(number), in_backward)),
            Work(),
        )

    @cached_property
    def _replica_ring(self) -> Ring:
        return replica_ring(self.cluster, self.config.parallel)

    @cached_property
    def _placements(self) -> Placements:
        return ZERO_STAGES[zero_stage(self.config.parallel.zero_stage, self._replica_ring.size)]

    def _gather_s(self, num_parameters: int) -> float:
        """Return the seconds of a gather of weights in a microbatch, with every ZeRO stage."""
        return self._replica_ring.gather_s(self.size * num_parameters) if self._gathers_blocks else 0.0

    @property
    def _gathers_blocks(self) -> bool:
        """Whether every microbatch gathers the weights of each block."""
        return self._placements.weights and self.config.parallel.zero_gather == "block"

    def _reduce_s(self, num_parameters: int) -> float:
        return self._replica_ring.gather_s(self.engine.gradient_bytes * num_parameters)

    def exposed(self, transfer_s: float, computation_s: float) -> float:
        """Return the seconds that a transfer beside a computation adds to it."""
        return exposed_s(self.cluster, transfer_s, computation_s)

    @cached_property
    def embedding(self) -> ActionWork:
        """Work of one microbatch in the embedding."""
        elements = 3.0 * self.tokens * self.hidden
        launch = 1e-6 * self.cluster.launch_us
        forward = Work(
            memory_bound=self._moved(elements),
            tensor_parallel=self._sync(),
            host=self.engine.embedding_ops * launch,
        )
        backward = Work(memory_bound=self._moved(elements), host=self.engine.embedding_ops * launch)
        return ActionWork(forward, backward, Work())

    @cached_property
    def head(self) -> ActionWork:
        """Work of one microbatch in the head and the loss."""
        columns = vocabulary_elements(self.config.model, self.tp) // self.hidden
        output, inputs, weights = linear_s(self.cluster, self.size, 1, self.tokens, columns, self.hidden)
        launch = 1e-6 * self.cluster.launch_us
        logits = self._moved(self.engine.logit_passes / 2 * self.tokens * columns)
        forward = Work(products=output, memory_bound=logits, host=self.engine.head_ops * launch)
        backward = Work(
            products=inputs + weights,
            memory_bound=logits,
            tensor_parallel=self._sync(),
            host=self.engine.head_ops * launch,
        )
        if self.engine.loss_gradients_first:
            # Backward adds the kept float32 gradient to the gradients of the step.
            added = Work(memory_bound=self._moved(3 * 4 / self.size * columns * self.hidden))
            return ActionWork(forward + backward, added, Work())
        return ActionWork(forward, backward, Work(products=weights))
