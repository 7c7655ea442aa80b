"""Start here when `make mutants` can no longer make a mistake: its text moved, or its test has another name."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_specification = importlib.util.spec_from_file_location("run", Path(__file__).with_name("run.py"))
assert _specification is not None and _specification.loader is not None
run = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(run)


@pytest.mark.parametrize("mutation", run.mutations(), ids=lambda mutation: mutation.name.replace(" ", "_"))
def test_text_and_tests_are_there(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1 and mutation.old != mutation.new
    ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in source


def test_names_are_unique():
    names = [mutation.name for mutation in run.mutations()]
    assert len(set(names)) == len(names)


def test_verdicts(tmp_path):
    """One mistake that a test sees, one that no test sees, and one whose test does not exist."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "code.py").write_text("one = 1\n")
    (tmp_path / "test_code.py").write_text(
        "import code_under_test\n\n\ndef test_one():\n    assert code_under_test.one\n"
    )
    (tmp_path / "code.py").rename(tmp_path / "code_under_test.py")
    mutation = type(run.mutations()[0])("name", "code_under_test.py", "1", "0", ("test_code.py",))
    assert run.try_in(tmp_path, mutation) == "seen"
    assert run.try_in(tmp_path, mutation._replace(new="2")) == "unseen"
    assert run.try_in(tmp_path, mutation._replace(tests=("test_gone.py",))) == "broken"
    assert (tmp_path / "code_under_test.py").read_text() == "one = 1\n"
