"""Packages that only some parts need, and the command that installs one."""

OLDEST = {
    "accelerate": "1.12",
    "datasets": "3",
    "lightning": "2.5",
    "matplotlib": "3.8",
    "peft": "0.19",
    "tensorboard": "2.16",
    "tokenizers": "0.20",
    "trackio": "0.5",
    "transformers": "5",
    "triton": "3.6",
    "wandb": "0.18",
}
"""Oldest version of each optional package, as in pyproject.toml."""


def install_command(*names: str) -> str:
    """Return the command of pip that installs optional packages: pip install "tokenizers>=0.20"."""
    return "pip install " + " ".join(f'"{name}>={OLDEST[name]}"' for name in names)
