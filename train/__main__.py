"""`python -m train`: the command line of the training stage."""

from __future__ import annotations

from shared.config import load
from shared.errors import run_command_line
from train.config import TrainConfig


def main() -> int:
    """Read the options, then train."""
    config = load(TrainConfig, command="python -m train")
    if config is None:
        return 0
    from train.trainer import train  # after --help and every refusal that needs no torch model

    return train(config)


if __name__ == "__main__":
    run_command_line(main)
