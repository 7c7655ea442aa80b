"""pytest on emulated CUDA kernels: python -m fused_megatron.audit.emulated tests/ops/test_norm.py .."""

import subprocess
import sys

from fused_megatron.audit.cuda_emulation import build_emulation, emulated_environment
from fused_megatron.checks import InputError

if __name__ == "__main__":
    try:
        environment = emulated_environment(build_emulation())
    except InputError as error:
        sys.exit(f"fused-megatron: error: {error}")
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment).returncode)
