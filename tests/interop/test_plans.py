"""Start here when a plan of `fm.parallelize` names the wrong layers, or a wrong plan is not refused."""

import pytest
import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.plans import find_plan, matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.*.mlp.up", "model.layers.3.mlp.up", True),
        ("layers.*.mlp.up", "layers.3.mlp.up", True),
        ("layers.*.up", "layers.3.mlp.up", False),
        ("mlp.up", "block.mlp.up", True),
        ("up", "block.follow_up", False),
        ("*_proj", "attn.q_proj", True),
        ("a.b.c", "b.c", False),
    ],
)
def test_a_pattern_is_the_end_of_a_name(pattern, name, expected):
    assert matches(pattern, name) == expected


def test_an_equal_name_wins_over_names_that_end_with_the_pattern():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert find_plan(model, {"0": "replicate"}).styles == {"0": "replicate"}
    assert find_plan(model, {"1.0": "replicate"}).styles == {"1.0": "replicate"}
    assert find_plan(model, {"0": "replicate", "1.0": "colwise"}).styles == {"0": "replicate", "1.0": "colwise"}


def test_faults_of_a_users_plan_are_named():
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})
    with pytest.raises(InputError, match=r"plan\['up'\]='columnwise' must be one of: 'colwise', 'rowwise'"):
        find_plan(model, {"up": "columnwise"})
    with pytest.raises(InputError, match=r"plan\['mlp.up'\] matches no module of the model \(its modules are: up\)"):
        find_plan(model, {"mlp.up": "colwise"})


def test_names_of_older_releases():
    model = nn.ModuleDict({"head": nn.Linear(2, 2)})
    assert find_plan(model, {"head": "colwise_rep"}).styles == {"head": "colwise_gather_output"}


def test_a_models_own_plan_comes_before_the_table_and_after_the_users():
    model = nn.ModuleDict({"c_fc": nn.Linear(2, 2), "c_proj": nn.Linear(2, 2)})
    outer = nn.ModuleDict({"mlp": model})
    assert find_plan(outer, None).styles == {"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}
    outer._tp_plan = {"mlp.c_fc": "colwise_gather_output", "absent.*": "rowwise"}
    own = find_plan(outer, None)
    assert own.styles == {"mlp.c_fc": "colwise_gather_output"} and own.unused == ("absent.*",) and not own.explicit
    assert find_plan(outer, {"c_proj": "replicate"}).styles == {"mlp.c_proj": "replicate"}


def test_embedding_and_head_join_a_models_own_plan():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.up, self.down = nn.Embedding(5, 2), nn.Linear(2, 4), nn.Linear(4, 2)
            self.head = nn.Linear(2, 5)
            self._tp_plan = {"up": "colwise", "down": "rowwise"}

        def get_input_embeddings(self):
            return self.tokens

        def get_output_embeddings(self):
            return self.head

    styles = find_plan(Model(), None).styles
    assert styles["tokens"] == "embedding_rowwise" and styles["head"] == "colwise_gather_output"


def test_a_known_layer_must_have_the_attributes_to_divide():
    """nanoGPT's attention has GPT-2's layer names, but other attributes."""

    class Attention(nn.Module):
        def __init__(self, **attributes):
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(4, 12), nn.Linear(4, 4)
            self.__dict__.update(attributes)

    def plan_of(**attributes):
        return find_plan(nn.ModuleDict({"attn": Attention(**attributes)}), None)

    assert plan_of(n_head=2).styles == {}
    known = plan_of(num_heads=2, split_size=4)
    assert known.styles["attn.c_attn"] == "packed_colwise_3"
    assert known.divided == (("attn", "num_heads"), ("attn", "split_size"))


def test_nothing_known():
    assert find_plan(nn.Sequential(nn.Linear(2, 2)), None).styles == {}
    assert find_plan(torch.nn.LSTM(2, 2), None).styles == {}
