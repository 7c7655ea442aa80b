"""Start here when the old name of an argument or a class no longer works, or works without a warning."""

import sys
import types

import pytest
import torch

from fused_megatron.deprecation import renamed_argument, renamed_names


@renamed_argument(old="mask", new="padding", removed_in="9.9")
def shift(x, padding=None):
    """Document me."""
    return x if padding is None else x + padding


def test_the_old_keyword_gives_the_new_argument_and_warns_at_the_line_of_the_caller():
    with pytest.warns(DeprecationWarning, match=r"mask= of shift\(\) is now called padding=.*release 9\.9") as warned:
        assert shift(1, mask=2) == 3
    assert warned[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_the_new_keyword_and_a_positional_argument_do_not_warn():
    assert shift(1) == 1
    assert shift(1, 2) == shift(1, padding=2) == 3
    assert shift.__doc__ == "Document me."


def test_both_keywords_are_refused():
    with pytest.raises(TypeError, match=r"shift\(\) got mask= and padding="):
        shift(1, mask=2, padding=3)


class Layer(torch.nn.Module):
    @renamed_argument(old="mask", new="padding")
    def forward(self, x, padding=0):
        return x + padding


def test_the_warning_skips_the_frames_of_torch():
    with pytest.warns(DeprecationWarning, match=r"mask= of Layer\.forward") as warned:
        Layer()(1, mask=2)
    assert warned[0].filename == __file__


def test_the_old_name_in_a_module_gives_the_new_one_and_warns(monkeypatch):
    module = types.ModuleType("renamed_module")
    module.New = object()
    module.__getattr__ = renamed_names("renamed_module", {"Old": "New"})
    monkeypatch.setitem(sys.modules, "renamed_module", module)
    with pytest.warns(DeprecationWarning, match=r"renamed_module\.Old is now called New") as warned:
        assert module.Old is module.New
    assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match="'renamed_module' has no attribute 'Other'"):
        module.Other  # noqa: B018
