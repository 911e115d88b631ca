"""Send what a run has trained, exported, to the hub: `python -m train.upload --run runs/first --repo org/name`.

What is sent is the export's folder as it lies there, so that a card can be edited by hand in between; where there is no
export yet, it is made. All files arrive in one commit, or none does. HF_ENDPOINT names another server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shared.config import load
from shared.errors import UserError, run_command_line
from shared.report import say


@dataclass(frozen=True)
class UploadConfig:
    """Send what a run has trained, exported, to the hub. Needs `hf auth login` once, or HF_TOKEN."""

    run: str
    """The run's folder, for example runs/first."""
    repo: str
    """Where to: owner/name. Made where it is not there yet."""
    step: int | None = None
    """Which checkpoint. Default: the newest undamaged one."""
    folder: str | None = None
    """What to send, where it was exported to another folder than RUN/export/step-<step>."""
    private: bool = True
    """Whether a repository that is made now is seen by its owner alone. One that is there stays as it is."""

    def check(self) -> None:
        """Refuse impossible values."""
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo):
            raise UserError(f"REPO '{self.repo}' is no hub id: give owner/name")


def upload(options: UploadConfig) -> int:
    """Send the folder in one commit and say where it is. Exit code 0.

    Raises `UserError` where there is no export and none can be made, no token, no network, or no right to write.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from train import adapters
    from train.model_card import REPO

    if get_token() is None:
        raise UserError("the hub has to know who you are: run `hf auth login`, or set HF_TOKEN")
    folder = _folder(options)
    operations = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content: str | bytes = str(path)
        if name == "README.md":
            content = path.read_bytes().replace(REPO.encode(), options.repo.encode())
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    api = HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        # The single file is the same bytes again: the hub has to have them before it can say so.
        first = {adapters.get(name).weights_file for name in adapters.names()}
        weights = [operation for operation in operations if operation.path_in_repo in first]
        api.preupload_lfs_files(options.repo, weights)
        commit = api.create_commit(
            options.repo, operations, commit_message=f"{folder.name} of {Path(options.run).name}"
        )
    except HFValidationError as error:
        raise UserError(f"REPO '{options.repo}' is no hub id: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = (error.server_message or str(error)).strip().splitlines()[0]
        if status in (401, 403):
            raise UserError(
                f"the hub does not let you write to {options.repo} ({reason}): log in (`hf auth login`) with a token "
                "that may write there, or choose another REPO"
            ) from error
        raise UserError(f"the hub refused {options.repo} ({status}: {reason}); nothing was committed") from error
    except ValueError as error:  # what the hub says of a card's metadata, and answers that are none
        raise UserError(f"{folder} cannot be sent to {options.repo}: {error}") from error
    except HfHubHTTPError.__bases__ as error:  # OSError, and what the client's own HTTP library raises
        raise UserError(
            f"the hub at {api.endpoint} cannot be reached ({str(error).splitlines()[0] if str(error) else error!r}); "
            "run the same command again: what it has already is not sent twice"
        ) from error
    say(str(commit.repo_url))
    return 0


def _folder(options: UploadConfig) -> Path:
    """What is to be sent: an exported folder that is whole. Raises `UserError`."""
    from train import adapters, checkpoints
    from train.export import CARD, ExportConfig, export, folder_of

    if options.folder is not None:
        folder = Path(options.folder)
    else:
        step = options.step
        if step is None:
            step = checkpoints.step_of(checkpoints.undamaged(Path(options.run)))
        folder = folder_of(options.run, step, None)
        if not folder.exists():
            return export(ExportConfig(run=options.run, step=step))
    kind = adapters.get("lora" if (folder / adapters.get("lora").weights_file).is_file() else "controlnet")
    needed = [name for name in (kind.config_file, kind.weights_file, CARD) if name is not None]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(f"{folder} is no export, it lacks {', '.join(missing)}: run `make export` first")
    return folder


def main() -> int:
    """Read the options, then upload."""
    config = load(UploadConfig, command="python -m train.upload")
    return 0 if config is None else upload(config)


if __name__ == "__main__":
    run_command_line(main)
