"""Start here when an example of README fails, or a target of make that it names is gone."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def run_example(code: str, note: str, folder: Path) -> list[str]:
    """What an example says on each rank, by a note put before its last line."""
    # A file of each rank's own: what two processes print to one pipe can be torn.
    note = f"import pathlib; pathlib.Path(f'rank-{{dist.get_rank()}}').write_text({note})"
    (folder / "this_file.py").write_text(code.replace("dist.destroy", f"{note}\ndist.destroy"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", "this_file.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [(folder / f"rank-{rank}").read_text() for rank in range(2)]


def test_examples_run_on_two_ranks(tmp_path: Path) -> None:
    layers, model = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for said in run_example(layers, "f'{up.weight.grad.norm()} {y.shape}'", tmp_path):
        norm, shape = said.split(maxsplit=1)
        assert float(norm) > 0 and shape == "torch.Size([32, 4, 256])"
    note = "f'{model.lm_head.weight.grad.norm()} {model.lm_head.weight.shape} {state[\"lm_head.weight\"].shape}'"
    for said in run_example(model, note, tmp_path):
        norm, shapes = said.split(maxsplit=1)
        assert float(norm) > 0 and shapes == "torch.Size([500, 64]) torch.Size([1000, 64])"


def test_commands_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ +make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
