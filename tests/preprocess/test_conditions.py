"""Conditions: the registry, and drawings that equal what upstream draws, one image at a time, from the same pixels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from preprocess import conditions
from preprocess.conditions.base import Condition, Drawer
from preprocess.conditions.canny import Canny, CannyOptions
from preprocess.conditions.lineart import Lineart, LineartOptions
from preprocess.conditions.precomputed import Precomputed, PrecomputedOptions
from preprocess.geometry import GeometryOptions, apply, place
from shared.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def photographs(num: int, height: int, width: int) -> NDArray[np.uint8]:
    """(num, height, width, 3): blurred noise, which has contours everywhere."""
    noise = np.random.default_rng(3).integers(0, 256, (num, height, width, 3), np.uint8)
    blurred = [cv2.normalize(cv2.GaussianBlur(image, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX) for image in noise]
    return np.stack(blurred).astype(np.uint8)


def fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        check=False,
    )


# --- the registry ---


def test_the_folder_is_the_registry() -> None:
    files = {path.stem for path in Path(conditions.__file__).parent.glob("*.py")}
    assert conditions.names() == sorted(files - {"__init__", "base", "detection", "weights"})
    assert {"canny", "depth", "lineart", "lineart_anime", "precomputed", "softedge", "tile"} <= files


@pytest.mark.parametrize("name", conditions.names())
def test_every_condition_keeps_the_contract(name: str) -> None:
    condition = conditions.get(name)
    assert condition.name == name
    assert condition.reads in ("image", "conditioning_image")
    made = condition(condition.Options())
    assert made.num_drawings >= 1
    assert isinstance(made, Condition)


def test_an_unknown_condition_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="'linart': did you mean 'lineart'"):
        conditions.get("linart")
    with pytest.raises(UserError, match=r"there is: canny, .*lineart.*precomputed"):
        conditions.get("xyz")
    for shared in ("base", "detection", "weights"):
        with pytest.raises(UserError, match="unknown condition"):
            conditions.get(shared)


def test_the_registry_and_all_conditions_import_without_heavy_packages() -> None:
    code = (
        "import sys; from preprocess import conditions; "
        "made = [conditions.get(name) for name in conditions.names()]; [c(c.Options()).num_drawings for c in made]; "
        "heavy = ('torch', 'cv2', 'controlnet_aux', 'transformers', 'huggingface_hub', 'PIL'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    assert fresh_process(code).stdout.strip() == "[]"


def test_a_drawer_refuses_what_is_no_batch_of_rgb_images() -> None:
    drawer = Canny(CannyOptions()).open("cpu")
    for wrong in (np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 1), np.uint8), np.zeros((1, 4, 4, 3), np.float32)):
        with pytest.raises(AssertionError):
            drawer(wrong)  # type: ignore[arg-type]


# --- canny ---


def test_canny_equals_opencv() -> None:
    images = photographs(3, 40, 56)
    with Canny(CannyOptions(low=20, high=60)).open("cpu") as drawer:
        drawings = drawer(images)
    assert drawings.dtype == np.uint8
    assert drawings.shape == (3, 1, 40, 56, 3)
    assert drawings.any()
    for image, drawing in zip(images, drawings, strict=True):
        for channel in range(3):
            np.testing.assert_array_equal(drawing[0, :, :, channel], cv2.Canny(image, 20, 60))


def test_canny_draws_white_on_black() -> None:
    square = np.zeros((1, 64, 64, 3), np.uint8)
    square[:, 16:48, 16:48] = 255
    drawing = Canny(CannyOptions()).open("cpu")(square)
    assert set(np.unique(drawing)) == {0, 255}
    assert drawing.mean() < 60


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (200, 100)])
def test_impossible_canny_thresholds_are_refused(low: int, high: int) -> None:
    with pytest.raises(UserError, match="0 <= low <= high"):
        Canny(CannyOptions(low, high))


# --- precomputed ---


def test_precomputed_passes_pixels_through_or_inverts_them() -> None:
    images = photographs(2, 8, 8)
    np.testing.assert_array_equal(Precomputed(PrecomputedOptions()).open("cpu")(images)[:, 0], images)
    inverted = Precomputed(PrecomputedOptions(invert=True)).open("cpu")(images)
    np.testing.assert_array_equal(inverted[:, 0], 255 - images)
    assert Precomputed.reads == "conditioning_image"


# --- lineart: random weights in the hub's layout ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from controlnet_aux.lineart import Generator

    folder = tmp_path_factory.mktemp("annotators")
    for seed, name in enumerate(("sk_model.pth", "sk_model2.pth")):
        torch.manual_seed(seed)
        model = Generator(3, 1, 3)
        with torch.no_grad():  # otherwise random weights draw one even grey
            model.model4[1].weight.mul_(4)
        torch.save(model.state_dict(), folder / name)
    return folder


@pytest.fixture(scope="module")
def upstream(weights: Path) -> Any:
    from controlnet_aux.lineart import LineartDetector

    return LineartDetector.from_pretrained(str(weights))


@pytest.fixture(scope="module")
def drawer(weights: Path) -> Iterator[Drawer]:
    with Lineart(LineartOptions(str(weights), (64, 128))).open("cpu") as opened:
        yield opened


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64)])
def test_lineart_equals_controlnet_aux_image_by_image(drawer: Drawer, upstream: Any, size: tuple[int, int]) -> None:
    images = photographs(2, *size)
    drawings = drawer(images)
    assert drawings.shape == (2, 2, *size, 3)
    for image, row in zip(images, drawings, strict=True):
        for resolution, drawing in zip((64, 128), row, strict=True):
            theirs = upstream(image, detect_resolution=resolution, image_resolution=64, output_type="np")
            assert theirs.std() > 10, "a drawing, not one even grey"
            # convolutions over a batch may differ in the last bit, which can tip one level when rounding
            assert np.abs(drawing.astype(int) - theirs).max() <= 1
            assert (drawing == theirs).mean() > 0.99


def test_lineart_coarse_uses_the_other_weights(weights: Path, upstream: Any) -> None:
    images = photographs(1, 64, 64)
    drawing = Lineart(LineartOptions(str(weights), (64,), coarse=True)).open("cpu")(images)[0, 0]
    theirs = upstream(images[0], coarse=True, detect_resolution=64, image_resolution=64, output_type="np")
    assert np.abs(drawing.astype(int) - theirs).max() <= 1
    fine = upstream(images[0], coarse=False, detect_resolution=64, image_resolution=64, output_type="np")
    assert np.abs(drawing.astype(int) - fine).max() > 1


def test_a_drawing_does_not_depend_on_the_rest_of_the_batch(drawer: Drawer) -> None:
    images = photographs(3, 64, 64)
    together, alone = drawer(images), np.concatenate([drawer(image[None]) for image in images])
    assert np.abs(together.astype(int) - alone).max() <= 1


def test_lineart_has_the_size_of_its_image_even_where_upstream_would_round(drawer: Drawer) -> None:
    assert drawer(photographs(1, 80, 112)).shape == (1, 2, 80, 112, 3)


def test_drawings_align_with_their_placed_image(drawer: Drawer) -> None:
    """Canny has no sense of left and right: drawing the mirrored crop is (nearly) mirroring the drawn crop."""
    image = photographs(1, 90, 140)[0]
    plain, mirrored = place(140, 90, "a", GeometryOptions(resolution=64, flip=True), 16)
    canny = Canny(CannyOptions(20, 60)).open("cpu")
    drawn = canny(apply(image, plain)[None])[0, 0]
    drawn_mirrored = canny(apply(image, mirrored)[None])[0, 0]
    assert (drawn[:, ::-1] == drawn_mirrored).mean() > 0.97
    assert drawer(apply(image, plain)[None]).shape[2:] == apply(image, plain).shape


def test_the_recipe_names_weights_by_their_hash_and_not_by_their_place(weights: Path, tmp_path: Path) -> None:
    recipe = Lineart(LineartOptions(str(weights), (64, 128))).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["weights_sha256"] == hashlib.sha256((weights / "sk_model.pth").read_bytes()).hexdigest()
    for name in ("sk_model.pth", "sk_model2.pth"):
        (tmp_path / name).symlink_to(weights / name)
    assert Lineart(LineartOptions(str(tmp_path), (64, 128))).recipe() == recipe
    assert Lineart(LineartOptions(str(weights), (128, 64))).recipe() != recipe
    coarse = Lineart(LineartOptions(str(weights), (64, 128), coarse=True)).recipe()
    assert coarse["weights_sha256"] == hashlib.sha256((weights / "sk_model2.pth").read_bytes()).hexdigest()


def test_other_conditions_recipes_hold_their_settings() -> None:
    assert Canny(CannyOptions(1, 2)).recipe() == {"detector": "cv2.Canny", "low": 1, "high": 2}
    assert Precomputed(PrecomputedOptions(invert=True)).recipe() == {"invert": True}


def test_opening_lineart_prints_nothing(weights: Path) -> None:
    code = (
        "from preprocess.conditions.lineart import Lineart, LineartOptions; "
        f"Lineart(LineartOptions({str(weights)!r})).open('cpu').close()"
    )
    finished = fresh_process(code)
    assert finished.returncode == 0
    assert finished.stdout == ""
    assert "Warning" not in finished.stderr


# --- lineart: refusals ---


@pytest.mark.parametrize(
    ("resolutions", "words"), [((), "is empty"), ((500,), "has 500"), ((0,), "has 0"), ((128, 128), "twice")]
)
def test_impossible_detect_resolutions_are_refused(resolutions: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Lineart(LineartOptions(detect_resolutions=resolutions))


def test_a_folder_without_weights_is_refused_with_the_missing_files(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold sk_model.pth and sk_model2.pth; copy"):
        Lineart(LineartOptions(str(tmp_path))).recipe()
    (tmp_path / "sk_model.pth").symlink_to(weights / "sk_model.pth")
    with pytest.raises(UserError, match=r"does not hold sk_model2.pth"):
        Lineart(LineartOptions(str(tmp_path))).open("cpu")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for weights in (str(tmp_path / "none"), "./none", "none"):
        with pytest.raises(UserError, match="is no folder"):
            Lineart(LineartOptions(weights)).recipe()


def test_weights_that_are_none_are_refused(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "sk_model.pth").write_bytes(b"<html>404</html>")
    (tmp_path / "sk_model2.pth").symlink_to(weights / "sk_model2.pth")
    with pytest.raises(UserError, match="cannot be loaded"):
        Lineart(LineartOptions(str(tmp_path))).open("cpu")


def test_offline_without_weights_is_refused_with_what_to_do(tmp_path: Path) -> None:
    code = (
        "from preprocess.conditions.lineart import Lineart, LineartOptions\n"
        "from shared.errors import UserError\n"
        "try:\n"
        "    Lineart(LineartOptions()).recipe()\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    said = fresh_process(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path)).stdout
    assert "lineart needs sk_model.pth and sk_model2.pth of lllyasviel/Annotators" in said
    assert "cannot be reached" in said
    assert "put them into a folder" in said


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("GatedRepoError", "is gated: accept its terms"),
        ("RepositoryNotFoundError", "does not exist or is private"),
        ("RemoteEntryNotFoundError", "does not hold them"),
        ("HfHubHTTPError", "huggingface.co refuses"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(
    failure: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself cannot exist here: its exceptions are raised in its place."""
    import huggingface_hub
    import huggingface_hub.errors

    error = getattr(huggingface_hub.errors, failure)
    raised = error.__new__(error)
    Exception.__init__(raised, "401 Client Error")

    def refuse(*_: str) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=words) as caught:
        Lineart(LineartOptions()).recipe()
    assert "sk_model.pth and sk_model2.pth" in str(caught.value)
