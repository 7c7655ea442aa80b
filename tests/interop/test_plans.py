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
    assert own.styles == {"mlp.c_fc": "colwise_gather_output"} and own.unused == ("absent.*",) and not own.asked
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


def outer_model():
    mlp = nn.ModuleDict({"c_fc": nn.Linear(2, 2), "c_proj": nn.Linear(2, 2)})
    return nn.ModuleDict({"0": nn.ModuleDict({"mlp": mlp, "extra": nn.Linear(2, 2)})})


def test_a_plan_extends_the_models_own():
    model = outer_model()
    own = find_plan(model, None)
    same = find_plan(model, {"*": "default"})
    assert same.styles == own.styles and not same.asked and same.patterns == own.patterns
    more = find_plan(model, {"extra": "colwise_gather_output", "*": "default"})
    assert more.styles == {**own.styles, "0.extra": "colwise_gather_output"} and more.asked == {"0.extra"}
    less = find_plan(model, {"*": "default", "mlp.*": "replicate"})
    assert set(less.styles.values()) == {"replicate"} and less.asked == set(less.styles)
    # A name of one part wins over the wildcard, whatever their order.
    assert find_plan(model, {"*": "default", "c_fc": "replicate"}).styles["0.mlp.c_fc"] == "replicate"
    # Where no pattern says "default", the model's own plan plays no part.
    assert find_plan(model, {"mlp.*": "default"}).styles == own.styles
    assert find_plan(model, {"extra": "default"}).styles == {}


def test_a_model_without_a_plan_has_nothing_to_extend():
    with pytest.raises(InputError, match=r"plan with 'default': the model has no plan of its own .*name its layers"):
        find_plan(nn.ModuleDict({"up": nn.Linear(2, 2)}), {"*": "default"})
