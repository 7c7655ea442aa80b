"""Start here when a benchmark fails because another library is missing."""

import sys

import pytest

from fused_megatron.benchmarking.peers import PEERS


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, peers in PEERS.items() for name in peers])
def test_a_missing_library_is_an_import_error(op, name, monkeypatch):
    for library in ("liger_kernel", "apex", "transformer_engine", "quack"):
        monkeypatch.setitem(sys.modules, library, None)
        for module in [m for m in sys.modules if m.startswith(f"{library}.")]:
            monkeypatch.delitem(sys.modules, module)
    if name == "torch":
        assert callable(PEERS[op][name]())
    else:
        with pytest.raises(ImportError):
            PEERS[op][name]()
