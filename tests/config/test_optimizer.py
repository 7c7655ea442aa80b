"""Start here when settings of an optimizer that make no sense are accepted, or sensible ones are refused."""

from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import OptimizerConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "adam"}, "optimizer.kind='adam' must be one of: 'adamw', 'sgd', 'lion', 'muon'"),
        ({"state_dtype": "float16"}, "state_dtype='float16' must be one of: 'float32', 'bfloat16'"),
        ({"kind": "sgd", "momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        ({"kind": "muon", "momentum": -0.1}, r"momentum=-0.1 must lie in \[0, 1\)"),
        ({"momentum": 0.9}, "momentum=0.9 has no effect with optimizer.kind='adamw': .* 'sgd', 'muon'$"),
        (
            {"kind": "sgd", "beta2": 0.99},
            "beta2=0.99 has no effect with optimizer.kind='sgd': .* 'adamw', 'lion', 'muon'$",
        ),
        ({"kind": "lion", "eps": 1e-6}, "eps=1e-06 has no effect with optimizer.kind='lion'"),
        ({"kind": "lion", "nesterov": True}, "nesterov=True has no effect with optimizer.kind='lion'"),
        ({"kind": "sgd", "adjust_lr_fn": "original"}, "adjust_lr_fn=original has no effect with optimizer.kind='sgd'"),
        ({"kind": "muon", "adjust_lr_fn": "none"}, "adjust_lr_fn='none' must be one of: 'match_rms_adamw', 'original'"),
        ({"kind": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov=True needs a momentum above 0"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        OptimizerConfig(**settings)
    assert "\n" not in str(error.value)


def test_each_kind_has_its_defaults() -> None:
    sgd, muon = OptimizerConfig(kind="sgd"), OptimizerConfig(kind="muon")
    assert (sgd.momentum_used, sgd.nesterov_used) == (0.9, False)
    assert (muon.momentum_used, muon.nesterov_used) == (0.95, True)
    assert (OptimizerConfig(kind="sgd", momentum=0.5, nesterov=True).momentum_used) == 0.5
