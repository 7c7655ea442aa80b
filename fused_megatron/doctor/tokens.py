"""Facts about token files: named datasets and prepared text, read and compared with their checksums."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fused_megatron.checks import InputError, check
from fused_megatron.data.build_once import default_cache_folder
from fused_megatron.data.token_digest import SUFFIX, damaged_blocks, read_digest
from fused_megatron.doctor.facts import TokenFile

# Time for the cache, which may be large and which the user did not name.
CACHE_PATIENCE_S = 2.0


def find_tokens(named: Sequence[str] = (), patience_s: float = CACHE_PATIENCE_S) -> tuple[TokenFile, ...]:
    """Read the named datasets in full, and the prepared text of the default cache for a limited time.

    Args:
        named: prefixes of datasets; a file of a dataset will do.
        patience_s: seconds for the cache.

    Raises:
        InputError: a named dataset does not exist.
    """
    found = [_read(_prefix(name), float("inf")) for name in named]
    deadline = time.monotonic() + patience_s
    return (*found, *(_read(prefix, deadline, in_cache=True) for prefix in _prepared()))


def _prefix(name: str) -> str:
    prefix = name.removesuffix(".bin").removesuffix(".idx").removesuffix(SUFFIX)
    check(Path(f"{prefix}.bin").exists(), f"--data {name}: no such dataset ({prefix}.bin)")
    return prefix


def _prepared() -> Iterable[str]:
    try:
        digests = sorted(default_cache_folder().glob(f"text-*/*{SUFFIX}"))
    except (InputError, OSError):
        return []
    return [str(path).removesuffix(SUFFIX) for path in digests]


def _read(prefix: str, deadline: float, in_cache: bool = False) -> TokenFile:
    try:
        digest = read_digest(prefix)
        if digest is None:
            return TokenFile(prefix, Path(f"{prefix}.bin").stat().st_size, has_digest=False, in_cache=in_cache)
        problem = next(
            damaged_blocks(prefix, digest, range(len(digest.blocks)), lambda: time.monotonic() < deadline), None
        )
    except (InputError, OSError) as error:
        return TokenFile(prefix, 0, problem=str(error), in_cache=in_cache)
    return TokenFile(prefix, digest.num_bytes, problem=problem, is_read=time.monotonic() < deadline, in_cache=in_cache)
