"""Where an existing ControlNet is."""

from __future__ import annotations

from pathlib import Path

from shared.errors import UserError
from shared.model_folder import resolve


def controlnet_folder(source: str) -> Path:
    """The folder of a ControlNet: a local one, or a hub id's (its files lie at the top of the repository). Raises
    `UserError` where there is none."""
    path = Path(source).expanduser()
    folder = path if path.is_dir() else resolve(source, components=(), extra=("*.json", "*.safetensors")).path
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no ControlNet: config.json is missing")
    return folder
