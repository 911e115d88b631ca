"""Conditions whose networks need weights, beside line art: they draw what upstream draws, from the same pixels.

The weights are random, in the layout of the hub's repositories; the networks are the real ones, depth's of the real
classes with a few thousand parameters.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer
from preprocess.conditions.depth import Depth, DepthOptions
from preprocess.conditions.detection import NetworkDrawer
from preprocess.conditions.lineart_anime import LineartAnime, LineartAnimeOptions
from preprocess.conditions.softedge import Softedge, SoftedgeOptions
from preprocess.images import ImageError
from shared.errors import UserError
from tests.preprocess.test_conditions import photographs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from controlnet_aux import HEDdetector, LineartAnimeDetector, PidiNetDetector
    from controlnet_aux.hed import ControlNetHED_Apache2
    from controlnet_aux.lineart_anime import UnetGenerator
    from controlnet_aux.pidi import pidinet


def tiny_depth_model(folder: Path) -> Path:
    """A Depth Anything model of the real classes in the hub's layout, tiny, random."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DepthAnythingForDepthEstimation(DepthAnythingConfig(
            backbone_config=Dinov2Config(
                hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
                out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
            ),
            reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=8,
        ))  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)  # otherwise random weights see one even plane
    model.save_pretrained(folder)
    DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """netG.pth, ControlNetHED.pth and table5_pidinet.pth: the last is nested as its authors' script left it."""
    folder = tmp_path_factory.mktemp("annotators")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = functools.partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
        torch.save(UnetGenerator(3, 1, 8, 64, norm_layer=norm).state_dict(), folder / "netG.pth")
        hed = ControlNetHED_Apache2()
        with torch.no_grad():
            hed.norm.fill_(127.0)
        torch.save(hed.state_dict(), folder / "ControlNetHED.pth")
        pidi = pidinet()
        with torch.no_grad():  # otherwise random weights draw one even grey
            for name, tensor in pidi.named_parameters():
                if "block" in name:
                    tensor.mul_(3)
        nested = {"state_dict": {f"module.{name}": tensor for name, tensor in pidi.state_dict().items()}}
        torch.save(nested, folder / "table5_pidinet.pth")
    return folder


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_depth_model(tmp_path_factory.mktemp("depth"))


KINDS = ("lineart_anime", "hed", "pidinet")


def condition_of(kind: str, weights: Path, detect_resolutions: tuple[int, ...] = (64, 128)) -> Condition[Any]:
    if kind == "lineart_anime":
        return LineartAnime(LineartAnimeOptions(str(weights), detect_resolutions))
    assert kind in ("hed", "pidinet")
    return Softedge(SoftedgeOptions(kind, str(weights), detect_resolutions))  # type: ignore[arg-type]


def network_of(drawer: Drawer) -> torch.nn.Module:
    assert isinstance(drawer, NetworkDrawer)
    return drawer.network


@pytest.fixture(scope="module")
def drawers(annotators: Path) -> dict[str, Drawer]:
    return {kind: condition_of(kind, annotators).open("cpu") for kind in KINDS}


@pytest.fixture(scope="module")
def upstreams(annotators: Path) -> dict[str, Callable[..., NDArray[np.uint8]]]:
    detectors = {"lineart_anime": LineartAnimeDetector, "hed": HEDdetector, "pidinet": PidiNetDetector}
    return {kind: detector.from_pretrained(str(annotators)) for kind, detector in detectors.items()}


# --- lineart_anime, softedge ---


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_drawings_equal_controlnet_aux_image_by_image(
    kind: str, size: tuple[int, int], drawers: dict[str, Drawer], upstreams: dict[str, Any]
) -> None:
    images = photographs(2, *size)
    drawings = drawers[kind](images)
    assert drawings.shape == (2, 2, *size, 3)
    for image, row in zip(images, drawings, strict=True):
        for resolution, drawing in zip((64, 128), row, strict=True):
            theirs = upstreams[kind](image, detect_resolution=resolution, image_resolution=64, output_type="np")
            assert theirs.std() > 5, "a drawing, not one even grey"
            # convolutions over a batch may differ in the last bit, which can tip one level when cutting off
            assert np.abs(drawing.astype(int) - theirs).max() <= 1
            assert (drawing == theirs).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_does_not_depend_on_the_rest_of_the_batch(kind: str, drawers: dict[str, Drawer]) -> None:
    images = photographs(2, 64, 64)
    together = drawers[kind](images)
    alone = np.concatenate([drawers[kind](image[None]) for image in images])
    assert np.abs(together.astype(int) - alone).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_drawings_have_the_size_of_their_image_even_where_upstream_would_round(
    kind: str, drawers: dict[str, Drawer]
) -> None:
    assert drawers[kind](photographs(1, 80, 112)).shape == (1, 2, 80, 112, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_name_the_weights_by_their_hash_and_not_by_their_place(
    kind: str, annotators: Path, tmp_path: Path
) -> None:
    recipe = condition_of(kind, annotators).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    for file in annotators.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert condition_of(kind, tmp_path).recipe() == recipe
    assert condition_of(kind, annotators, (128, 64)).recipe() != recipe
    others = [condition_of(other, annotators).recipe() for other in KINDS if other != kind]
    assert recipe["weights_sha256"] not in [other["weights_sha256"] for other in others]


@pytest.mark.parametrize("kind", KINDS)
def test_another_network_s_weights_are_refused_in_one_sentence(kind: str, annotators: Path, tmp_path: Path) -> None:
    files = {"lineart_anime": "netG.pth", "hed": "ControlNetHED.pth", "pidinet": "table5_pidinet.pth"}
    shutil.copy(annotators / files["hed" if kind == "pidinet" else "pidinet"], tmp_path / files[kind])
    with pytest.raises(UserError, match=rf"weights in .*{files[kind]} cannot be loaded .*; remove the file") as caught:
        condition_of(kind, tmp_path).open("cpu")
    assert "\n" not in str(caught.value)


class Touch:
    """Unpickling this makes a file: what a checkpoint can do that is read as a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    torch.save({"state_dict": Touch(tmp_path / "touched")}, tmp_path / "table5_pidinet.pth")
    with pytest.raises(UserError, match="cannot be loaded"):
        condition_of("pidinet", tmp_path).open("cpu")
    assert not (tmp_path / "touched").exists()


def test_weights_that_are_not_finite_are_refused(annotators: Path, tmp_path: Path) -> None:
    tensors = torch.load(annotators / "ControlNetHED.pth", weights_only=True)
    tensors["block1.projection.bias"].fill_(float("nan"))
    torch.save(tensors, tmp_path / "ControlNetHED.pth")
    with pytest.raises(UserError, match=r"cannot be loaded \(block1.projection.bias has values that are not finite"):
        condition_of("hed", tmp_path).open("cpu")


def test_a_drawing_that_is_not_finite_is_an_error_and_not_a_drawing(annotators: Path) -> None:
    drawer = condition_of("hed", annotators, (64,)).open("cpu")
    with torch.no_grad():
        network_of(drawer).get_parameter("norm").fill_(float("inf"))
    with pytest.raises(ImageError, match="not finite"):
        drawer(photographs(1, 64, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("resolutions", "words"), [((), "is empty"), ((100,), "has 100"), ((64, 64), "twice")])
def test_impossible_detect_resolutions_are_refused(kind: str, resolutions: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=rf"{'softedge' if kind != 'lineart_anime' else kind}: .*{words}"):
        condition_of(kind, Path(), resolutions)


@pytest.mark.parametrize(("kind", "file"), [("lineart_anime", "netG.pth"), ("pidinet", "table5_pidinet.pth")])
def test_a_folder_without_the_file_is_refused_with_its_name(kind: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"does not hold {file}; copy it there from huggingface.co/lllyasviel"):
        condition_of(kind, tmp_path).recipe()


# --- depth ---


@pytest.mark.parametrize("size", [(64, 64), (64, 112)])
def test_depth_equals_transformers_pipeline_image_by_image(size: tuple[int, int], depth_model: Path) -> None:
    from PIL import Image
    from transformers import pipeline

    upstream = pipeline("depth-estimation", model=str(depth_model), device="cpu")
    images = photographs(3, *size)
    with Depth(DepthOptions(str(depth_model))).open("cpu") as drawer:
        drawings = drawer(images)
    assert drawings.shape == (3, 1, *size, 3)
    for image, drawing in zip(images, drawings[:, 0], strict=True):
        theirs = np.asarray(upstream(Image.fromarray(image))["depth"])
        assert theirs.std() > 20
        for channel in range(3):
            assert np.abs(drawing[..., channel].astype(int) - theirs).max() <= 1


def test_depth_differs_by_image_and_not_by_batch(depth_model: Path) -> None:
    images = photographs(3, 64, 96)
    with Depth(DepthOptions(str(depth_model))).open("cpu") as drawer:
        together, alone = drawer(images), np.concatenate([drawer(image[None]) for image in images])
    assert np.abs(together.astype(int) - alone).max() <= 1
    for i in range(3):
        assert (together[i].min(), together[i].max()) == (0, 255), "each from its farthest to its nearest"
        assert np.abs(together[i].astype(int) - together[i - 1]).mean() > 10


def test_the_larger_estimate_is_nearer_and_white(depth_model: Path) -> None:
    from transformers import AutoImageProcessor

    drawer = Depth(DepthOptions(str(depth_model))).open("cpu")
    image = photographs(1, 56, 56)
    with torch.no_grad():
        processor = AutoImageProcessor.from_pretrained(depth_model)
        pixels = processor(images=list(image), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        estimate = network_of(drawer)(pixels).predicted_depth[0].numpy()
    assert estimate.shape == (56, 56)
    drawing = drawer(image)[0, 0, ..., 0]
    assert drawing.flat[estimate.argmax()] == 255
    assert drawing.flat[estimate.argmin()] == 0


def test_where_nothing_is_nearer_than_anything_else_depth_is_black(depth_model: Path) -> None:
    drawer = Depth(DepthOptions(str(depth_model))).open("cpu")
    with torch.no_grad():
        for parameter in network_of(drawer).parameters():
            parameter.zero_()
    assert (drawer(photographs(2, 64, 64)) == 0).all()


def test_depth_s_recipe_names_its_files_by_their_hash(depth_model: Path, tmp_path: Path) -> None:
    recipe = Depth(DepthOptions(str(depth_model))).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    shutil.copytree(depth_model, tmp_path / "copy")
    assert Depth(DepthOptions(str(tmp_path / "copy"))).recipe() == recipe
    settings = json.loads((depth_model / "preprocessor_config.json").read_text())
    (tmp_path / "copy/preprocessor_config.json").write_text(json.dumps(settings | {"ensure_multiple_of": 28}))
    assert Depth(DepthOptions(str(tmp_path / "copy"))).recipe() != recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "glpn"}, "is of a 'glpn' model, where depth_anything or dpt is needed"),
        ({"depth_estimation_type": "metric"}, "is of a metric model, which measures distances"),
        (None, "is not JSON"),
    ],
)
def test_models_whose_numbers_mean_something_else_are_refused(
    change: dict[str, str] | None, words: str, depth_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(depth_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{" if change is None else json.dumps(config | change))
    for attempt in (Depth.recipe, lambda depth: depth.open("cpu")):
        with pytest.raises(UserError, match=words):
            attempt(Depth(DepthOptions(str(folder))))


def test_depth_weights_that_are_not_whole_are_refused(depth_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(depth_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["head.conv1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be loaded \(1 tensors are not there, as head.conv1.weight\)"):
        Depth(DepthOptions(str(folder))).open("cpu")
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="cannot be loaded"):
        Depth(DepthOptions(str(folder))).open("cpu")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # a pickle
    with pytest.raises(UserError, match=r"does not hold model.safetensors; copy it there from huggingface.co/depth-"):
        Depth(DepthOptions(str(folder))).recipe()
