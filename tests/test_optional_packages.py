"""Start here when a message names a version of a package that pyproject.toml does not."""

import re
import sys
from pathlib import Path

import pytest

import fused_megatron as fm
from fused_megatron.optional_packages import OLDEST, install_command
from fused_megatron.testing import run_on_ranks

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


def misses(rank: int, world_size: int, package: str, name: str, module: str, version: str) -> None:
    """Import a module of interop anew in a process where its package cannot be imported."""
    for loaded in [package, *(each for each in sys.modules if each.startswith(f"{package}."))]:
        sys.modules[loaded] = None  # type: ignore[assignment]
    sys.modules.pop(f"fused_megatron.interop.{module}", None)
    fm.__dict__.pop(name, None)
    with pytest.raises(ImportError) as caught:
        getattr(fm, name)
    assert str(caught.value) == f'fm.{name} needs {package}: pip install "{package}>={version}"'


@pytest.mark.parametrize(
    ("package", "name", "module", "version"),
    [
        ("accelerate", "Accelerator", "accelerator", "1.12"),
        ("lightning", "LightningStrategy", "lightning_strategy", "2.5"),
        ("transformers", "TrainerCallback", "trainer_callback", "5"),
    ],
)
def test_a_missing_package_of_interop_is_one_line(package: str, name: str, module: str, version: str) -> None:
    run_on_ranks(misses, 1, package, name, module, version)
