"""A base whose modulation was taken out computes as the whole one, from rows that were made ahead."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.cache.reader import CacheError
from shared.errors import UserError
from shared.families.base import Batch, Inputs, Tensors
from shared.model_folder import ModelFolder, resolve
from tests.train.conftest import controlnet_tensors, flux, losses, samples_of, train_options
from train import modulation as modulation_file
from train import recompute
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions
from train.baseline import Baseline
from train.loader import Loader, LoaderOptions
from train.modulation import HoistedLinear, LinearsInMemory, LinearsOnDisk, Modulation, hoist
from train.objectives import FlowMatching, ObjectiveOptions
from train.painting import Painter
from train.trainer import train
from train.validation import Validation, ValidationOptions

CPU = torch.device("cpu")
GUIDANCE = 3.5
EXACT = 2e-7
"""Of the whole, in fp32."""


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return resolve(str(tiny_model), components=())


@pytest.fixture(scope="module")
def base(model: ModelFolder) -> torch.nn.Module:
    """The whole base, fp32, frozen."""
    return flux().load_base(model, torch.float32).requires_grad_(False)


def controlnet_on(model: ModelFolder) -> torch.nn.Module:
    """A ControlNet whose outputs are not zero."""
    controlnet = flux().make_controlnet(model, 1, 1, "copy", torch.float32)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if name.startswith(("controlnet_blocks.", "controlnet_single_blocks.")):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    return controlnet.train()


@contextmanager
def hoisted(base: torch.nn.Module, linears: Any = None) -> Iterator[tuple[torch.nn.Module, Modulation]]:
    """A copy of the base without its modulation, and what computes it: from the copy's own linears, or from others."""
    bare = copy.deepcopy(base)
    taken = hoist(flux(), bare)
    dtype = bare.get_parameter("x_embedder.weight").dtype
    made = Modulation(flux(), bare, linears or LinearsInMemory(taken), guidance=GUIDANCE, device=CPU, dtype=dtype)
    try:
        yield bare, made
    finally:
        made.close()


def times(position: int, B: int) -> torch.Tensor:
    return torch.rand(B, generator=torch.Generator().manual_seed(1000 + position))


def loader_on(cache: Path, **options: Any) -> Loader:
    ranks = {name: options.pop(name) for name in ("rank", "num_ranks") if name in options}
    return Loader(samples_of(cache), LoaderOptions(**options), seed=3, device=CPU, **ranks)


def batch_at(loader: Loader, position: int) -> Batch:
    return loader.make(position)


def rows_of(bare: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each place of a hoisted base holds at the moment."""
    found = {}
    for name, place in flux().modulations(bare).items():
        assert isinstance(place, HoistedLinear)
        assert place.rows is not None
        found[name] = place.rows.clone()
    return found


def rows_by_the_base(base: torch.nn.Module, t: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear of the whole base gives."""
    x = flux().time_embedding(base, t, GUIDANCE, pooled)
    return {name: linear(x) for name, linear in flux().modulations(base).items()}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def random_inputs(B: int) -> tuple[torch.Tensor, Inputs]:
    """x_t and everything else of a batch of 32 px x 32 px, for the tiny base."""
    random = torch.Generator().manual_seed(B)
    x_t, condition, pooled, embeds = (
        torch.randn(shape, generator=random) for shape in ((B, 4, 64), (B, 4, 64), (B, 24), (B, 5, 32))
    )
    batch = Batch([], 32, 32, {"t5.prompt_embeds": embeds, flux().pooled: pooled})
    return x_t, flux().inputs(batch, condition, torch.float32)


def step(
    base: torch.nn.Module, controlnet: torch.nn.Module, t: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The prediction under control, and the gradients of its mean square."""
    adapter = ControlNetAdapter(flux(), base, controlnet, ControlNetOptions(guidance=GUIDANCE))
    x_t, inputs = random_inputs(len(t))
    controlnet.zero_grad()
    prediction = adapter.predict(x_t, t, inputs)
    prediction.square().mean().backward()
    return prediction.detach(), {
        name: parameter.grad.clone() for name, parameter in controlnet.named_parameters() if parameter.grad is not None
    }


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("together", "bound"), [(False, EXACT), (True, 3 * EXACT)])
def test_outputs_and_gradients_are_those_of_the_whole_base(
    base: torch.nn.Module, model: ModelFolder, together: bool, bound: float
) -> None:
    controlnet, t = controlnet_on(model), torch.tensor([0.1, 0.45, 0.99])
    expected, expected_gradients = step(base, controlnet, t)
    pooled = random_inputs(3)[1].embeds["pooled_projections"]
    with hoisted(base) as (bare, modulation):
        modulation.together = together  # as on a GPU: then the same sums are added in another order
        many = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))  # among the rows of many other batches
        texts = torch.randn(64, 3, 24, generator=torch.Generator().manual_seed(2))
        many[17], texts[17] = t, pooled
        modulation.compute(many, texts).use(17, 3)
        found, gradients = step(bare, controlnet, t)
    assert error(found, expected) <= bound
    assert gradients.keys() == expected_gradients.keys()
    whole = [torch.cat([each[name].flatten() for name in sorted(each)]) for each in (gradients, expected_gradients)]
    assert whole[1].norm() > 0
    assert together or torch.equal(*whole)
    assert error(*whole) <= bound


def test_recomputed_blocks_give_the_same_bits_on_hoisted_rows(base: torch.nn.Module, model: ModelFolder) -> None:
    controlnet, t = controlnet_on(model), torch.tensor([0.3, 0.6])
    with hoisted(base) as (bare, modulation):
        modulation.compute(t[None], random_inputs(2)[1].embeds["pooled_projections"][None]).use(0, 2)
        kept = step(bare, controlnet, t)
        recompute.apply(flux(), bare, controlnet, base_blocks=3, controlnet_blocks=1)
        again = step(bare, controlnet, t)
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_what_the_device_no_longer_holds_is_counted(base: torch.nn.Module) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with hoisted(base) as (bare, modulation):
        assert modulation.num_parameters == count(base) - count(bare) > 0.2 * count(base)
        assert modulation.num_bytes == 4 * modulation.num_parameters
        assert not [name for name in bare.state_dict() if name.startswith(tuple(flux().modulations(base)))]


def test_a_pieced_linear_gives_what_it_gives_whole(base: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    t, pooled = torch.rand(3, 2), torch.randn(3, 2, 24)
    with hoisted(base) as (_, modulation):
        whole = modulation.compute(t, pooled)
        monkeypatch.setattr(modulation_file, "_piece_rows", lambda D, dtype: 56)  # leaves a smaller one at the end
        pieced = modulation.compute(t, pooled)
        torch.testing.assert_close(pieced.host, whole.host, rtol=1e-6, atol=1e-7)


def test_in_bf16_the_model_s_own_rounding_of_t_decides_the_rows(model: ModelFolder) -> None:
    base = flux().load_base(model, torch.bfloat16).requires_grad_(False)
    t, pooled = torch.tensor([0.123456, 0.98765]), torch.randn(2, 24).bfloat16()
    with hoisted(base) as (bare, modulation):
        modulation.compute(t[None], pooled[None]).use(0, 2)
        expected = rows_by_the_base(base, t, pooled)
        for name, rows in rows_of(bare).items():
            assert rows.dtype == torch.bfloat16
            torch.testing.assert_close(rows, expected[name], rtol=2**-7, atol=1e-3)


# --- the weights ----------------------------------------------------------------------------------------------------


def test_the_model_s_files_give_what_the_base_in_memory_gives(base: torch.nn.Module, model: ModelFolder) -> None:
    t, pooled = torch.rand(2, 2), torch.randn(2, 2, 24)
    with hoisted(base) as (_, held), hoisted(base, LinearsOnDisk(model, "transformer")) as (_, stored):
        assert torch.equal(held.compute(t, pooled).host, stored.compute(t, pooled).host)


def test_weights_that_are_missing_or_of_another_model_are_refused(
    base: torch.nn.Module, model: ModelFolder, tmp_path: Path
) -> None:
    [weights] = model.weights("transformer")
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = load_file(weights)
    short = ModelFolder("short", None, tmp_path)
    for change in ("gone", "shorter"):
        changed = dict(tensors)
        if change == "gone":
            del changed["norm_out.linear.weight"]
        else:
            changed["norm_out.linear.weight"] = changed["norm_out.linear.weight"][1:]
        save_file(changed, folder / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match=r"norm_out\.linear"), hoisted(base, LinearsOnDisk(short, "transformer")):
            pass
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        LinearsOnDisk(short, "transformer")


# --- coming batches -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tiny_cache: Path) -> Path:
    return tiny_cache


def test_what_is_peeked_at_is_what_comes(cache: Path) -> None:
    loader = loader_on(cache, batch_size=2, caption_dropout=0.5)
    positions = range(2, 9)
    for position, peeked in zip(positions, loader.peek(positions, ["clip"]), strict=True):
        assert peeked.keys() == {"clip.pooled_prompt_embeds"}
        assert torch.equal(peeked["clip.pooled_prompt_embeds"], batch_at(loader, position).tensors[flux().pooled])


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_each_batch_of_each_process_gets_the_rows_of_its_own_times_and_captions(
    base: torch.nn.Module, cache: Path, rank: int, num_ranks: int
) -> None:
    loader = loader_on(cache, batch_size=3, rank=rank, num_ranks=num_ranks)
    sizes = set()
    with hoisted(base) as (bare, modulation):
        modulation.follow(loader, times, batches=4)
        for position in range(rank, 11 * num_ranks, num_ranks):  # over three groups
            batch = batch_at(loader, position)
            sizes.add(len(batch))
            modulation.use(position, len(batch))
            expected = rows_by_the_base(base, times(position, len(batch)), batch.tensors[flux().pooled])
            for name, rows in rows_of(bare).items():
                torch.testing.assert_close(rows, expected[name], rtol=1e-5, atol=1e-6)
    assert len(sizes) > 1  # the last batch of a bucket is smaller


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("first", [1, 3, 6])
def test_a_run_that_resumes_within_a_group_has_the_same_bits(
    base: torch.nn.Module, cache: Path, first: int, together: bool
) -> None:
    loader = loader_on(cache, batch_size=2)
    undisturbed = {}
    with hoisted(base) as (bare, modulation):
        modulation.together = together
        modulation.follow(loader, times, batches=4)
        for position in range(9):
            modulation.use(position, len(batch_at(loader, position)))
            undisturbed[position] = rows_of(bare)
    with hoisted(base) as (bare, modulation):
        modulation.together = together
        modulation.follow(loader, times, batches=4)
        for position in range(first, 9):
            modulation.use(position, len(batch_at(loader, position)))
            found = rows_of(bare)
            assert all(torch.equal(found[name], rows) for name, rows in undisturbed[position].items())


def test_a_resumed_run_reads_nothing_of_batches_that_are_over(
    base: torch.nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, asked = loader_on(cache, batch_size=2), []
    peek = loader.peek

    def noted(positions: Any, layers: Any) -> list[Tensors]:
        asked.extend(positions)
        return peek(positions, layers)

    monkeypatch.setattr(loader, "peek", noted)
    with hoisted(base) as (_, modulation):
        modulation.follow(loader, times, batches=4)
        modulation.use(6, len(batch_at(loader, 6)))
        modulation.use(8, len(batch_at(loader, 8)))
    assert asked[:6] == [6, 7, 8, 9, 10, 11]


def test_a_step_may_be_taken_again(base: torch.nn.Module, cache: Path) -> None:
    loader = loader_on(cache, batch_size=2)
    with hoisted(base) as (bare, modulation):
        modulation.follow(loader, times, batches=4)
        for position in (2, 5, 2, 1, 5):
            batch = batch_at(loader, position)
            modulation.use(position, len(batch))
            expected = rows_by_the_base(base, times(position, len(batch)), batch.tensors[flux().pooled])
            assert all(torch.equal(rows, expected[name]) for name, rows in rows_of(bare).items())


def test_rows_for_something_else_leave_those_of_training_as_they_are(base: torch.nn.Module, cache: Path) -> None:
    loader = loader_on(cache, batch_size=2)
    with hoisted(base) as (bare, modulation):
        modulation.follow(loader, times, batches=4)
        B = len(batch_at(loader, 1))
        modulation.use(1, B)
        before = rows_of(bare)
        modulation.compute(torch.rand(2, 3), torch.randn(2, 3, 24)).use(1, 3)
        assert {len(rows) for rows in rows_of(bare).values()} == {3}
        modulation.use(1, B)
        assert all(torch.equal(before[name], rows) for name, rows in rows_of(bare).items())


def test_the_next_group_is_computed_while_the_present_one_is_used(
    base: torch.nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, began = loader_on(cache, batch_size=2), threading.Event()
    peek = loader.peek

    def watched(positions: Any, layers: Any) -> list[Tensors]:
        if positions[0] == 4:
            began.set()
        return peek(positions, layers)

    monkeypatch.setattr(loader, "peek", watched)
    with hoisted(base) as (_, modulation):
        modulation.follow(loader, times, batches=4)
        modulation.use(0, len(batch_at(loader, 0)))
        assert began.wait(timeout=60)  # although batch 4 is not asked for


def test_a_caption_that_cannot_be_read_ends_the_run_with_its_own_error(
    base: torch.nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_on(cache, batch_size=2)

    def damaged(positions: Any, layers: Any) -> list[Tensors]:
        raise CacheError("clip/00000.tar is not what was written")

    with hoisted(base) as (_, modulation):
        modulation.follow(loader, times, batches=4)
        modulation.use(0, len(batch_at(loader, 0)))
        B = len(batch_at(loader, 8))
        monkeypatch.setattr(loader, "peek", damaged)
        with pytest.raises(CacheError, match="not what was written"):
            modulation.use(8, B)


def test_closing_gives_up_what_is_being_computed(base: torch.nn.Module, cache: Path) -> None:
    loader, reading, go_on = loader_on(cache, batch_size=2), threading.Event(), threading.Event()

    class Slow:
        def __init__(self, linears: LinearsInMemory) -> None:
            self.linears, self.slow, self.count = linears, False, 0

        def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            if self.slow:
                self.count += 1
                reading.set()
                assert go_on.wait(timeout=60)
            return self.linears.read(name)

    slow = Slow(LinearsInMemory(hoist(flux(), copy.deepcopy(base))))
    with hoisted(base, slow) as (_, modulation):
        modulation.follow(loader, times, batches=4)
        peek = loader.peek
        first = threading.Event()

        def before_the_next(positions: Any, layers: Any) -> list[Tensors]:
            slow.slow = first.is_set()
            first.set()
            return peek(positions, layers)

        loader.peek = before_the_next  # type: ignore[method-assign]
        modulation.use(0, len(batch_at(loader, 0)))
        assert reading.wait(timeout=60)
        threading.Timer(0.05, go_on.set).start()
    assert slow.count == 1  # of the second group's linears: no more were read
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("modulation")]


def test_a_run_on_a_hoisted_base_is_that_on_the_whole_one(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, use = [], Modulation.use

    def noted(self: Modulation, position: int, B: int) -> None:
        used.append(position)
        use(self, position, B)

    monkeypatch.setattr(Modulation, "use", noted)
    for name in ("yes", "no"):
        options = train_options(
            tiny_cache, tmp_path, name=name, loader={"accumulation": 2}, base={"weights": "none"},
            memory={"hoist": name, "hoist_steps": 5},
        )  # fmt: skip
        assert train(options) == 0
    assert used == list(range(12))  # of the run that asked for it
    assert losses(tmp_path / "yes") == pytest.approx(losses(tmp_path / "no"), rel=1e-5)
    weights, expected = controlnet_tensors(tmp_path / "yes"), controlnet_tensors(tmp_path / "no")
    assert all(error(weights[name], tensor) < 1e-4 for name, tensor in expected.items())


# --- the places -----------------------------------------------------------------------------------------------------


def test_rows_that_are_missing_or_another_batch_s_are_caught() -> None:
    place = HoistedLinear(6)
    with pytest.raises(AssertionError, match="not been set"):
        place(torch.zeros(2, 4))
    place.rows = torch.zeros(3, 6)
    with pytest.raises(AssertionError, match="another size"):
        place(torch.zeros(2, 4))
    assert place(torch.zeros(3, 4)) is place.rows


def test_a_base_that_is_whole_is_caught(base: torch.nn.Module) -> None:
    linears = LinearsInMemory(hoist(flux(), copy.deepcopy(base)))
    with pytest.raises(AssertionError, match="not hoisted"):
        Modulation(flux(), base, linears, guidance=GUIDANCE, device=CPU, dtype=torch.float32)


def test_compiled_blocks_take_other_rows_without_compiling_again(base: torch.nn.Module) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    t, pooled = torch.rand(4, 2), torch.randn(4, 2, 24)
    with hoisted(base) as (bare, modulation):
        rows = modulation.compute(t, pooled)
        torch._dynamo.reset()
        compiled = copy.copy(bare)
        x_t, inputs = random_inputs(2)
        for block in flux().blocks(bare):
            block.compile(backend=counting, fullgraph=True, dynamic=False)
        after_first = 0
        for slot in range(4):
            rows.use(slot, 2)
            found = flux().predict(compiled, x_t, t[slot], inputs, GUIDANCE, None)
            expected_rows = rows_by_the_base(base, t[slot], pooled[slot])
            assert all(torch.allclose(rows_of(bare)[name], expected_rows[name], atol=1e-6) for name in expected_rows)
            with torch.compiler.set_stance("force_eager"):
                expected = flux().predict(bare, x_t, t[slot], inputs, GUIDANCE, None)
            assert error(found, expected) <= EXACT
            after_first = after_first or graphs
        assert graphs == after_first > 0
    torch._dynamo.reset()


# --- held-out samples -----------------------------------------------------------------------------------------------


def test_held_out_losses_and_pictures_are_those_of_the_whole_base(
    base: torch.nn.Module, model: ModelFolder, tiny_cache: Path, tmp_path: Path
) -> None:
    controlnet, held_out = controlnet_on(model), samples_of(tiny_cache, "validation")
    options = ValidationOptions(samples=3, timesteps=2, pictures=3, picture_steps=3, batch_size=2)

    def validation_on(base: torch.nn.Module, modulation: Modulation | None) -> tuple[Validation, ControlNetAdapter]:
        baseline = Baseline(tmp_path / ("whole" if modulation is None else "hoisted"))
        made = Validation(
            held_out, flux(), model, FlowMatching(ObjectiveOptions()), options,
            seed=0, device=CPU, dtype=torch.float32, baseline=baseline, modulation=modulation,
        )  # fmt: skip
        return made, ControlNetAdapter(flux(), base, controlnet, ControlNetOptions(guidance=GUIDANCE))

    def pictures_of(validation: Validation, adapter: ControlNetAdapter) -> np.ndarray:
        painter = Painter(validation, Baseline(tmp_path / "none"), 3)
        return np.concatenate([picture.ravel() for picture in painter.paint(adapter, 3)]).astype(int)

    whole, adapter = validation_on(base, None)
    expected, pictures = whole.held_out(adapter), pictures_of(whole, adapter)
    with hoisted(base) as (bare, modulation):
        other, adapter = validation_on(bare, modulation)
        found = other.held_out(adapter)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True)
        assert other.held_out(adapter) == pytest.approx(found, rel=0, abs=0, nan_ok=True)
        differing = np.abs(pictures_of(other, adapter) - pictures)
    assert differing.max() <= 1  # a pixel may be rounded to its neighbour
