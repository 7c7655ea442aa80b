"""`python -m fused_megatron`, the same as the `fused-megatron` command."""

import sys

from fused_megatron.cli import main

sys.exit(main())
