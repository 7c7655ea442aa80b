"""Mistakes of the planner: predictions, bounds of the search, and what is learnt from measured steps."""

_SEARCH = ("tests/planning/search/test_best_layouts.py",)
_BOUNDS = ("tests/planning/search/test_pipeline_bounds.py", *_SEARCH)

MUTATIONS = (
    (
        "the bound of all pipelines lets a rank wait although its W comes last",
        "fused_megatron/planning/search/pipeline_bounds.py",
        "            if not pipeline.splits:\n",
        "            if True:\n",
        _BOUNDS,
    ),
    (
        "a pipeline with more on one rank counts as never slower",
        "fused_megatron/planning/search/pipeline_bounds.py",
        "longer = all(any(",
        "longer = any(any(",
        _BOUNDS,
    ),
    (
        "pipelines that recompute whole blocks are forgotten",
        "fused_megatron/planning/search/best_layouts.py",
        '        if more and node.is_open != "full":\n',
        '        if more and node.is_open == "none":\n',
        _SEARCH,
    ),
    (
        "the bound of memory counts the largest stage of a rank for each microbatch",
        "fused_megatron/planning/search/floors.py",
        "needed = (live[rank] - 1) * min(",
        "needed = live[rank] * max(",
        _SEARCH,
    ),
    (
        "the measured time of a block changes its forward alone",
        "fused_megatron/planning/prediction/block_time.py",
        "return forward * self.factor, backward * self.factor,",
        "return forward * self.factor, backward,",
        ("tests/planning/prediction/test_measured_blocks.py",),
    ),
    (
        "steps from which blocks were learnt count as held out",
        "fused_megatron/planning/prediction/validation.py",
        "    rows |= {row for block in cluster.blocks for row in block.rows}\n",
        "",
        ("tests/planning/prediction/test_measured_blocks.py",),
    ),
    (
        "a plain block sends what a recomputed one sends, if others are recomputed",
        "fused_megatron/planning/prediction/block_time.py",
        "        if (model.recompute, model.recompute_blocks) == (recompute, None):\n",
        "        if True:\n",
        (*_SEARCH, "tests/planning/prediction/test_block_time.py"),
    ),
    (
        "the formula of memory forgets the loss of the last stage",
        "fused_megatron/planning/working_memory.py",
        "        kept = before + (self._loss if last else 0)\n",
        "        kept = before\n",
        ("tests/planning/test_rank_memory.py",),
    ),
)
