"""Options: typed dataclasses that their files own, filled from a recipe (YAML or TOML) and the command line.

A recipe is read as if it stood on the command line before the user's own words, so that one parser checks both: the
same types, the same choices, and the command line wins. Every field carries its sentence as a docstring below it;
`--help` prints it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints

import tyro
import yaml

from shared import registry
from shared.errors import UserError, nearest


class Config(Protocol):
    """A frozen dataclass of options. `check` raises `UserError` for values that no single type can rule out."""

    __dataclass_fields__: ClassVar[Any]

    def check(self) -> None: ...


C = TypeVar("C", bound=Config)


def load(
    config_class: type[C],
    arguments: Sequence[str] | None = None,
    *,
    command: str,
    recorded: Mapping[str, Any] | None = None,
) -> C | None:
    """Read `config_class` from command-line `arguments` (default: the process's own), after an optional `--recipe`, and
    that after the options of an earlier run (`recorded`, as `to_dict` gives them).

    With `--dry-run` the resolved configuration is printed as YAML and None comes back. Unknown recipe keys and
    impossible values raise `UserError`, and so do folders beyond the tree that add nothing (`registry.check`); unknown
    command-line options exit with code 2 and the nearest name.
    """
    registry.check()
    words = list(sys.argv[1:] if arguments is None else arguments)
    dry_run = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    recipe = option_words(config_class, recorded or {}, "the options that were recorded")
    while (at := next((i for i, word in enumerate(words) if word.split("=")[0] == "--recipe"), None)) is not None:
        has_value = "=" in words[at]
        if not has_value and at + 1 == len(words):
            raise UserError("--recipe needs a file: --recipe my.yaml")
        path = words[at].split("=", 1)[1] if has_value else words[at + 1]
        del words[at : at + 1 if has_value else at + 2]
        recipe += recipe_arguments(config_class, Path(path))
    config: C = tyro.cli(
        config_class,
        args=recipe + words,
        prog=command,
        description=f"{(config_class.__doc__ or '').strip()}\n\n--recipe FILE reads options from YAML or TOML first "
        "(the command line wins); --dry-run prints the resolved options and stops.",
        config=(tyro.conf.FlagConversionOff,),
    )
    config.check()
    if dry_run:
        print(to_yaml(config), end="")
        return None
    return config


def recipe_arguments(config_class: type[Any], path: Path) -> list[str]:
    """The command-line words that say what the recipe at `path` says. Unknown keys raise `UserError`."""
    if not path.is_file():
        raise UserError(f"no such recipe: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if content is None:
        return []  # all of it is comments
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold keys and values, but holds a {type(content).__name__}")
    return option_words(config_class, content, str(path))


def option_words(config_class: type[Any], content: Mapping[str, Any], where: str) -> list[str]:
    """The command-line words that say what `content` says, options by name. Unknown keys raise `UserError`, which says
    that they are in `where`."""
    known = _leaf_types(config_class)
    words: list[str] = []
    for key, value in _flatten(content):
        name = key.replace("-", "_")
        if value is None and any(other.startswith(f"{name}.") for other in known):
            continue  # a section whose options are all comments
        if name not in known:
            raise UserError(f"{where}: unknown key '{key}': {nearest(name, known)}")
        values = value if isinstance(value, list) else [value]
        if _is_text(known[name]) and (wrong := [item for item in values if not isinstance(item, str | None)]):
            # YAML reads no as false and 0123 as 83: what would be passed on is not what was written.
            raise UserError(f"{where}: {key} is a text, but {wrong[0]!r} is none: put it in quotes")
        option = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [option, *(str(item) for item in value)]
        else:
            words.append(f"{option}={value}")  # one word, so that a value may begin with a dash
    return words


def field_names(config_class: type[Any]) -> list[str]:
    """Every option's full name, nested ones with dots: `optimizer.learning_rate`."""
    return list(_leaf_types(config_class))


def _leaf_types(config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in tyro_types(config_class).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= _leaf_types(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found


def _is_text(kind: Any) -> bool:
    """Whether a value of this type is a text, or several, or none."""
    return kind in (str, Path) or (
        bool(get_args(kind)) and all(_is_text(k) or k in (NoneType, ...) for k in get_args(kind))
    )


def tyro_types(config_class: type[Any]) -> dict[str, Any]:
    """The resolved type of each field (annotations are strings under `from __future__ import annotations`)."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        pairs += _flatten(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return pairs


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values: nested dataclasses as dictionaries, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def to_yaml(config: Any) -> str:
    """The configuration as a recipe that `--recipe` reads back to the same values."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every option (full name) whose value differs between two plain configurations, with both values."""
    old, new = dict(_flatten(before)), dict(_flatten(after))
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def completed(recorded: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration with the default of every option that it does not name: one recorded before the option
    existed. Of a part that is something else than options, what was recorded stays."""
    filled = {**defaults, **recorded}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(found := recorded.get(key), Mapping):
            filled[key] = completed(found, default)
    return filled
