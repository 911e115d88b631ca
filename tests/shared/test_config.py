"""Options from recipes and the command line: the same types, the command line wins, nothing unknown gets through."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from shared import config
from shared.errors import UserError


@dataclass(frozen=True)
class Part:
    """A part."""

    learning_rate: float = 1e-3
    """How fast."""
    mode: Literal["soft", "hard"] = "soft"
    """Which way."""


@dataclass(frozen=True)
class Whole:
    """Something to configure."""

    data: str
    """Where it is."""
    condition: tuple[str, ...] = ("lineart",)
    """What is drawn."""
    revision: str | None = None
    """Which one."""
    steps: int | None = None
    """How many."""
    flip: bool = False
    """Whether."""
    size: tuple[int, int] = (512, 512)
    """How large."""
    optimizer: Part = field(default_factory=Part)

    def check(self) -> None:
        if self.data == "impossible":
            raise UserError("data: that cannot be")


def load(*words: str) -> Whole | None:
    return config.load(Whole, words, command="whole")


def recipe(tmp_path: Path, text: str, ending: str = "yaml") -> str:
    path = tmp_path / f"recipe.{ending}"
    path.write_text(text, encoding="utf-8")
    return str(path)


YAML = """
data: pictures of ä
condition: [canny, depth]
steps: -3
flip: true
size: [64, 96]
optimizer:
  learning-rate: 1e-5
  mode: hard
"""
TOML = """
data = "pictures of ä"
condition = ["canny", "depth"]
steps = -3
flip = true
size = [64, 96]
[optimizer]
learning_rate = 1e-5
mode = "hard"
"""
FROM_RECIPE = Whole("pictures of ä", ("canny", "depth"), None, -3, True, (64, 96), Part(1e-5, "hard"))


@pytest.mark.parametrize(("text", "ending"), [(YAML, "yaml"), (YAML, "yml"), (TOML, "toml")])
def test_yaml_and_toml_say_the_same(tmp_path: Path, text: str, ending: str) -> None:
    assert load("--recipe", recipe(tmp_path, text, ending)) == FROM_RECIPE
    assert load(f"--recipe={recipe(tmp_path, text, ending)}") == FROM_RECIPE


def test_defaults_are_the_fields_own() -> None:
    assert load("--data", "x") == Whole("x")


def test_the_command_line_wins_wherever_the_recipe_stands(tmp_path: Path) -> None:
    path = recipe(tmp_path, YAML)
    expected = Whole("y", ("a",), "r", -3, False, (64, 96), Part(0.5, "hard"))
    words = (
        "--data",
        "y",
        "--condition",
        "a",
        "--revision",
        "r",
        "--flip",
        "False",
        "--optimizer.learning-rate",
        "0.5",
    )
    assert load("--recipe", path, *words) == expected
    assert load(*words, "--recipe", path) == expected


def test_a_later_recipe_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first, second = recipe(tmp_path, "data: x\nsteps: 1", "yaml"), recipe(tmp_path, "data: y", "yml")
    assert load("--recipe", first, "--recipe", second) == Whole("y", steps=1)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("dat: x", "dat", "did you mean 'data'?"),
        ("optimizer: {learning_rat: 1}", "optimizer.learning_rat", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer: 5", "optimizer", "did you mean 'optimizer.mode'?"),
        ("data: {inner: x}", "data.inner", "did you mean 'data'?"),
        ("7: x", "7", "there is: condition, data, flip"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(UserError) as refused:
        load("--recipe", path)
    assert str(refused.value).startswith(f"{path}: unknown key '{key}': {nearest}")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("data: no", "data is a text, but False"), ("data: 0123", "data is a text, but 83"),
     ("data: x\nrevision: 1234567", "revision is a text, but 1234567"),
     ("data: x\ncondition: [a, on]", "condition is a text, but True")],
)  # fmt: skip
def test_a_text_that_yaml_would_change_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    with pytest.raises(UserError, match=f"{wrong} is none: put it in quotes"):
        load("--recipe", recipe(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["data: x\nsteps: many", "data: x\nflip: 3", "data: x\noptimizer: {mode: sofd}", "data: x\nsize: [a, b]"]
)
def test_a_value_of_the_wrong_type_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--recipe", recipe(tmp_path, text))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert any(f"--{name}" in said for name in ("steps", "flip", "optimizer.mode", "size"))


def test_an_unknown_option_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--data", "x", "--optimizer.learning-rat", "1")
    assert ended.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


def test_impossible_values_are_the_class_s_own_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="that cannot be"):
        load("--data", "impossible")


@pytest.mark.parametrize(
    ("text", "ending", "why"),
    [
        ("data: [", "yaml", "cannot be read"), ("data =", "toml", "cannot be read"),
        ("- data", "yaml", "must hold keys and values, but holds a list"), ("[]", "yaml", "holds a list"),
        ("data", "yaml", "holds a str"),
    ],
)  # fmt: skip
def test_a_broken_recipe_is_refused_by_its_name(tmp_path: Path, text: str, ending: str, why: str) -> None:
    path = recipe(tmp_path, text, ending)
    with pytest.raises(UserError, match=why) as refused:
        load("--recipe", path)
    assert str(refused.value).startswith(path)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load("--recipe", str(tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_missing_or_not_named_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no such recipe: {tmp_path}"):
        load("--recipe", str(tmp_path))
    with pytest.raises(UserError, match="--recipe needs a file"):
        load("--data", "x", "--recipe")


def test_sections_and_recipes_of_nothing_but_comments_say_nothing(tmp_path: Path) -> None:
    assert load("--data", "x", "--recipe", recipe(tmp_path, "# all\n")) == Whole("x")
    assert load("--recipe", recipe(tmp_path, "data: x\noptimizer:\n  # mode: hard\n")) == Whole("x")


def test_texts_that_look_like_options_and_empty_ones_survive(tmp_path: Path) -> None:
    assert load("--recipe", recipe(tmp_path, "data: --flip\nrevision: ''\ncondition: []")) == Whole("--flip", (), "")


@pytest.mark.parametrize("words", [("--data", "no"), ("--data", "0123", "--revision", "1e5"), ("--data", "x: [y")])
def test_what_a_dry_run_prints_reads_back_to_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    more = ("--optimizer.learning-rate", "1e-30", "--condition", "a", "b", "--flip", "True")
    assert load(*words, *more, "--dry-run") is None
    printed = capsys.readouterr().out
    assert load("--recipe", recipe(tmp_path, printed)) == load(*words, *more)


def test_a_dry_run_refuses_what_a_run_refuses() -> None:
    with pytest.raises(UserError, match="that cannot be"):
        load("--data", "impossible", "--dry-run")


def test_help_prints_every_option_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name in config.field_names(Whole):
        assert "--" + name.replace("_", "-") in said
    for sentence in ("Where it is.", "How fast.", "Something to configure.", "--recipe FILE", "--dry-run"):
        assert sentence in said


def test_differences_name_nested_options_with_both_values() -> None:
    before, after = config.to_dict(Whole("x")), config.to_dict(Whole("x", steps=5, optimizer=Part(0.5)))
    assert config.differences(before, after) == {"optimizer.learning_rate": (1e-3, 0.5), "steps": (None, 5)}
    assert config.differences(before, before) == {}
    assert config.differences({}, {"new": 1}) == {"new": (None, 1)}
