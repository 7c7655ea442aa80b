"""Table of mistakes in models with experts and in their state: (name, file, old, new, tests) of a Mutation."""

_LAYOUTS = ("tests/assembly/test_assemble.py::test_every_layout_of_experts_trains_as_one_process",)
_USER_LOOP = ("tests/data_parallel/test_shared_state.py",)
_DISPATCH = ("tests/expert_parallel/test_dispatch.py",)
_LAYER = ("tests/expert_parallel/test_experts.py",)
_EXPERTS = ("tests/models/test_mixture_of_experts.py",)
_MIXTURE = "fused_megatron/models/mixture_of_experts.py"
_STATE = "fused_megatron/data_parallel/shared_state.py"

MUTATIONS = (
    (
        "gradients of experts are too large by ep",
        "fused_megatron/assembly/assemble.py",
        "        self.gradients.finish_reduced()\n",
        "        self.gradients.finish_reduced()\n"
        "        for p in self.parameters.values():\n"
        "            if self.replicas.of(p) != self.replicas.dense:\n"
        '                self.gradients[p].mul_(self.mesh.expert_sizes["ep"])\n',
        _LAYOUTS,
    ),
    (
        "gradients of experts are means over the ranks with the same experts",
        "fused_megatron/data_parallel/sharded_replica.py",
        "            torch._foreach_div_(rows, self._dp_size)\n",
        "            for p, own in self._own.items():\n"
        "                own.div_(group_size(self.replicas.of(p).group))\n",
        _USER_LOOP,
    ),
    (
        "gradients of experts are summed over the ranks with the same dense weights",
        _STATE,
        "return Replicas(dense, _replica_set(replicas, shards, copies, placements))",
        "return Replicas(dense, dense)",
        _LAYOUTS,
    ),
    (
        "the norm counts the replicas of experts",
        "fused_megatron/assembly/assemble.py",
        "shares.append(squares / each.num_copies)",
        "shares.append(squares / self.replicas.dense.num_copies)",
        _LAYOUTS,
    ),
    (
        "the norm counts whole experts on the first tensor-parallel rank only",
        "fused_megatron/sharding/gradient_norm.py",
        "rank = tp_rank if experts is None else group_rank(experts.etp_group)",
        "rank = tp_rank",
        _LAYOUTS,
    ),
    (
        "a norm in a user's loop counts the experts of one rank",
        "fused_megatron/sharding/gradient_norm.py",
        "groups = (experts.etp_group, experts.ep_group, _owners(shards, of_experts=True))",
        "groups = (experts.etp_group, _owners(shards, of_experts=True))",
        _USER_LOOP,
    ),
    (
        "every rank's experts are gathered as the first ones",
        "fused_megatron/sharding/full_tensor.py",
        "held_values(rank_parts, shard, rank // of_each_ep_rank)",
        "held_values(rank_parts, shard, 0)",
        ("tests/sharding/test_full_tensor.py",),
    ),
    (
        "the loads of experts are overwritten by their sum over ranks",
        _MIXTURE,
        "counts = routes.counts.double()",
        "counts = start_all_reduce_(routes.counts, self.tp_group).wait().double()",
        _EXPERTS,
    ),
    (
        "the balance loss has no gradient",
        _MIXTURE,
        "score_sums.view(routes.counts.shape)",
        "score_sums.detach().view(routes.counts.shape)",
        _EXPERTS,
    ),
    (
        "the router computes in bfloat16",
        "fused_megatron/models/router.py",
        "return product(*_wide(x, weight))",
        "return product(x, weight).float()",
        ("tests/models/test_router.py",),
    ),
    (
        "probabilities of experts apply twice",
        "fused_megatron/expert_parallel/token_order.py",
        "        return sorted_weights if self.filled is None else sorted_weights * self.filled",
        "        return sorted_weights * sorted_weights",
        _EXPERTS,
    ),
    (
        "tokens for the experts of two ranks are swapped",
        "fused_megatron/expert_parallel/all_to_all.py",
        "        ranks = _own_first(counts.ep, counts.ep_rank)\n",
        "        ranks = _own_first(counts.ep, counts.ep_rank)[::-1]\n",
        _EXPERTS,
    ),
    (
        "the shards of an expert are not summed",
        "fused_megatron/expert_parallel/all_to_all.py",
        "        if self._etp == 1:\n            return table\n",
        "        return table[: part.num_received]\n",
        _DISPATCH,
    ),
    (
        "every shard of an expert adds the bias",
        "fused_megatron/expert_parallel/experts.py",
        "adds_bias=group_rank(self.etp_group) == 0",
        "adds_bias=True",
        _LAYER,
    ),
    (
        "a rank keeps the error in its tokens to itself",
        "fused_megatron/expert_parallel/experts.py",
        "if ranks > 1 and slots is None:",
        "if ranks < 1:",
        _DISPATCH,
    ),
    (
        "uneven rows are read from the start of a slot",
        "fused_megatron/collectives/transport/host_ring.py",
        "begins = [sum(of_rank[: ring.rank]) for of_rank in rows]",
        "begins = [0 for of_rank in rows]",
        ("tests/collectives/test_exchanges.py",),
    ),
    (
        "gradients that return to a layer of experts are as many times too large as it has ranks",
        "fused_megatron/expert_parallel/all_to_all.py",
        "        self._arriving = [(self._send(dy, part),) for part in self._parts]\n",
        "        ranks = len(self._parts[0].sizes)\n"
        "        self._arriving = [(self._send(dy * ranks, part),) for part in self._parts]\n",
        _LAYER,
    ),
    (
        "recomputed blocks count their loads again",
        "fused_megatron/models/block.py",
        "        return returned if isinstance(returned, WithAuxiliaryLoss) else WithAuxiliaryLoss(returned, None)",
        "        if isinstance(returned, WithAuxiliaryLoss) and returned.report is not None:\n"
        "            self.mlp.router.sums.add_(returned.report)\n"
        "            returned = returned._replace(report=None)\n"
        "        return returned if isinstance(returned, WithAuxiliaryLoss) else WithAuxiliaryLoss(returned, None)",
        _EXPERTS,
    ),
    (
        "an expert with a capacity drops the first tokens",
        "fused_megatron/models/expert_capacity.py",
        "index < slots)",
        "index >= slots)",
        ("tests/models/test_expert_capacity.py",),
    ),
    (
        "a resumed run forgets the biases of its routers",
        "fused_megatron/training/train.py",
        "                resumed.boxes | trainer.buffer_boxes() | stashed,\n",
        "                resumed.boxes | stashed,\n",
        ("tests/training/test_expert_layouts.py",),
    ),
)
