"""`python -m preprocess`: the command line of the preprocessing stage."""

from __future__ import annotations

from preprocess.config import PreprocessConfig
from shared.config import load
from shared.errors import run_command_line


def main() -> int:
    """Read the options, then preprocess."""
    config = load(PreprocessConfig, command="python -m preprocess")
    if config is None:
        return 0
    from preprocess.pipeline import preprocess  # after --help and every refusal that needs no torch

    return preprocess(config)


if __name__ == "__main__":
    run_command_line(main)
