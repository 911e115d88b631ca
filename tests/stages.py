"""The two stages by the words of the command line, in this process: a fresh one would import torch again."""

from __future__ import annotations

from shared import config


def run_stage(name: str, recipe: str, *arguments: object) -> None:
    """What `examples.tiny_world.stage` does, on the CPU, without a tracker, and nothing painted while training."""
    words = ["--recipe", recipe, *(str(argument) for argument in arguments), "--device", "cpu"]
    if name == "preprocess":
        from preprocess.config import PreprocessConfig
        from preprocess.pipeline import preprocess

        options = config.load(PreprocessConfig, words, command=name)
        assert options is not None
        assert preprocess(options) == 0
    else:
        from train.config import TrainConfig
        from train.trainer import train

        words += ["--tracker", "none", "--validation.pictures-every", "0", "--validation.adherence-every", "0"]
        train_options = config.load(TrainConfig, words, command=name)
        assert train_options is not None
        assert train(train_options) == 0
