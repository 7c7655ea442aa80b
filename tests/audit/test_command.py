"""Start here when `fused-megatron audit` refuses its arguments, or does not report a missing compiler."""

from fused_megatron import cli
from fused_megatron.audit import command


def test_help(capsys):
    assert cli.main(["audit", "--help"]) == 0
    assert "--write" in capsys.readouterr().out


def test_unknown_op_and_architecture(capsys):
    assert cli.main(["audit", "--op", "layer_morn"]) == 2
    assert "op='layer_morn' must be one of: bias_dropout_add; " in capsys.readouterr().err
    assert cli.main(["audit", "--arch", "sm_90"]) == 2
    assert "arch='sm_90' must be one of: sm_80, sm_90a, sm_100a" in capsys.readouterr().err


def test_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(command, "what_is_missing", lambda: ["nvcc: install a CUDA 13 toolkit"])
    assert cli.main(["audit"]) == 1
    assert capsys.readouterr().out == "cannot be checked here: nvcc: install a CUDA 13 toolkit\n"
