"""Start here when a message names a version of a package that pyproject.toml does not."""

import re
from pathlib import Path

from fused_megatron.optional_packages import OLDEST, install_command

ROOT = Path(__file__).parents[1]


def test_versions_are_those_of_the_extras() -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = extras.split("\ndev = ")[0]
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)', extras)) == OLDEST


def test_command_is_one_that_pip_takes() -> None:
    assert install_command("tokenizers", "matplotlib") == 'pip install "tokenizers>=0.20" "matplotlib>=3.8"'


def test_no_message_names_an_extra_of_a_package_that_is_not_published() -> None:
    sources = (ROOT / "fused_megatron").rglob("*.py")
    named = [path for path in sources if re.search(r"install ['\"]?fused-megatron\[", path.read_text(encoding="utf-8"))]
    assert named == []
