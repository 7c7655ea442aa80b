"""Table of mistakes in the state of experts: (name, file, old, new, tests) of a Mutation."""

_LAYOUTS = ("tests/assembly/test_assemble.py::test_every_layout_of_experts_trains_as_one_process",)
_USER_LOOP = ("tests/data_parallel/test_shared_state.py",)
_STATE = "fused_megatron/data_parallel/shared_state.py"

MUTATIONS = (
    (
        "gradients of experts are too large by ep",
        "fused_megatron/assembly/assemble.py",
        "        self.gradients.sum_copies()\n",
        "        self.gradients.sum_copies()\n"
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
)
