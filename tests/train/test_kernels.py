"""The Triton kernels compute what plain torch does, and compile for the cards they are for. No GPU is needed: they run
in Triton's interpreter, in a process of their own, and are compiled offline."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="torch's builds for other systems come without Triton")

from tests.train.interpreter import interpreted  # noqa: E402
from train import int8_arithmetic, kernels  # noqa: E402

KIB = 1024
SHARED_KIB = {80: 163, 89: 99, 90: 227}
"""What a block of threads may have on a card of this compute capability (CUDA C++ Programming Guide)."""


BEGIN = "import torch\nfrom train import int8_arithmetic, kernels\ntorch.manual_seed(0)\n"


def test_rows_become_the_same_integers_and_scales_as_in_plain_torch() -> None:
    out = interpreted(
        BEGIN
        + """
for dtype in (torch.float32, torch.bfloat16):
    for R, D in ((7, 96), (3, 1000), (1, 64)):
        wide = torch.randn(R, D + 24).to(dtype) * torch.logspace(-20, 10, R)[:, None].to(dtype)
        x = wide[:, :D]                                   # rows with a gap between them
        x[0, : D // 2] = 0
        for column_scale in (None, torch.rand(D).to(dtype)):
            ours, theirs = kernels.quantize_rows(x, column_scale), int8_arithmetic.int8_rows(x, column_scale)
            assert ours[0].dtype == torch.int8 and ours[1].dtype == torch.float32
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), (dtype, R, D)
            assert ours[0].abs().max() == 127
            print("same")
"""
    )
    assert out.split() == ["same"] * 12


def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_stays_so() -> None:
    out = interpreted(
        BEGIN
        + """
x = torch.randn(4, 64)
x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("-inf")
integers, scale = kernels.quantize_rows(x, None)
assert not integers[0].any() and scale[0] == 0
assert scale[1].isnan() and scale[2].isinf() and scale[3].isfinite()
weight = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
out = torch.empty(4, 32)
kernels.launch_matmul(kernels.Tiles(16, 32, 32, 4, 2), integers, scale, weight, None, None, out, along_rows=True)
print((out == 0).all(1).tolist(), out.isfinite().any(1).tolist())
"""
    )
    assert out.strip() == "[True, False, False, False] [True, False, False, True]"


def test_products_are_those_of_plain_torch_along_the_weight_s_rows_and_its_columns() -> None:
    # The interpreter cuts bf16 off where a GPU rounds: one unit in its last place. fp32 is the same to the bit.
    out = interpreted(
        BEGIN
        + """
def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)

several = [
    kernels.Tiles(16, 32, 32, 4, 2, 2),                   # more rows of tiles than a band; an odd number of rounds
    kernels.Tiles(32, 16, 64, 4, 2, 1),                   # D is no multiple of the tile
]
for tiles, dtype in zip(several, (torch.float32, torch.bfloat16)):
    R, C, D = 140, 40, 96
    rows, row_scale = int8(R, D), torch.rand(R)
    scale, bias = torch.rand(C).to(dtype), torch.randn(C).to(dtype)
    for along, s, b in ((True, scale, bias), (False, None, None)):
        weight = int8(C, D) if along else int8(D, C)
        ours = torch.empty(R, C, dtype=dtype)
        kernels.launch_matmul(tiles, rows, row_scale, weight, s, b, ours, along_rows=along)
        if along:
            theirs = int8_arithmetic.int8_matmul(rows, row_scale, weight, s, b, dtype)
        else:
            theirs = int8_arithmetic.int8_matmul_transposed(rows, row_scale, weight, dtype)
        near = 0 if dtype == torch.float32 else 2 ** -7
        torch.testing.assert_close(ours, theirs, rtol=near, atol=0)
        print("same")
"""
    )
    assert out.split() == ["same"] * 4


def test_a_transposition_is_exact_at_sizes_that_no_tile_divides() -> None:
    out = interpreted(
        BEGIN
        + """
matrix = torch.randint(-128, 128, (200, 150), dtype=torch.int8)
print(torch.equal(kernels.transposed(matrix), matrix.t()))
"""
    )
    assert out.strip() == "True"


class Built:
    """A kernel as the compiler made it for a card."""

    def __init__(
        self, kernel: Any, capability: int, num_warps: int, num_stages: int, types: dict[str, str],
        constants: dict[str, Any], folder: Path,
    ) -> None:  # fmt: skip
        """`types` of the arguments in their order; all pointers and sizes but R are multiples of 16, as FLUX's are."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else types[name] for name in names},
            constexprs=constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "R"},
        )
        made = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False},
        )
        self.shared_kib = made.metadata.shared / KIB
        self.ptx: str = made.asm["ptx"]
        cubin = folder / f"{kernel.__name__}.cubin"
        cubin.write_bytes(made.asm["cubin"])
        self.resources = resources(cubin)

    def assert_fits(self, capability: int) -> None:
        """Nothing is spilled out of registers, and the shared memory is not more than the card has."""
        print(f"sm_{capability}: {self.resources}, {self.shared_kib:.0f} KiB shared")
        assert self.resources["STACK"] == 0
        assert self.resources["LOCAL"] == 0
        assert self.resources["REG"] <= 255
        assert self.shared_kib <= SHARED_KIB[capability]


def resources(cubin: Path) -> dict[str, int]:
    """Registers, stack and memory of a kernel, as NVIDIA's own tool reads them; it comes with Triton."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this build of Triton comes without cuobjdump")
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):([0-9]+)", text)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is compiled here and now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


MATMUL = {
    "rows": "*i8", "weight": "*i8", "out": "*bf16", "row_scale": "*fp32", "scale": "*bf16", "bias": "*bf16",
    "R": "i32", "C": "i32", "D": "i32", "weight_stride": "i32",
}  # fmt: skip


@pytest.mark.parametrize("along_rows", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_candidate_compiles_to_int8_tensor_core_code_without_spills(
    capability: int, along_rows: bool, tmp_path: Path
) -> None:
    for tiles in kernels.candidates((capability // 10, capability % 10)):
        constants = kernels.constants(tiles, along_rows=along_rows, scaled=along_rows, biased=along_rows, whole=True)
        built = Built(kernels.matmul_kernel, capability, tiles.num_warps, tiles.num_stages, MATMUL, constants, tmp_path)
        built.assert_fits(capability)
        assert re.search(r"(wgmma\.mma_async|mma)\.sync\S*\.s32\.s8\.s8", built.ptx)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_rounding_rows_and_transposing_compile_without_spills(capability: int, tmp_path: Path) -> None:
    types = {"x": "*bf16", "column_scale": "*bf16", "integers": "*i8", "row_scale": "*fp32", "num_columns": "i32",
             "x_stride": "i32"}  # fmt: skip
    for features in (3072, 12288, 15360):  # FLUX's linears
        block = triton.next_power_of_2(features)
        built = Built(
            kernels.quantize_rows_kernel, capability, kernels.quantizing_warps(block), 3, types,
            {"SCALED": True, "BLOCK": block}, tmp_path,
        )  # fmt: skip
        built.assert_fits(capability)
    types = {"matrix": "*i8", "out": "*i8", "N": "i32", "K": "i32"}
    built = Built(kernels.transpose_kernel, capability, 8, 3, types, {"TILE": kernels.TRANSPOSED_TILE}, tmp_path)
    built.assert_fits(capability)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA_VISIBLE_DEVICES=0, which tests else hide")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("R", "K", "N"), [(128, 3072, 3072), (333, 3072, 12288), (77, 96, 40)])
def test_on_a_gpu_every_candidate_gives_the_bits_of_plain_torch(R: int, K: int, N: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    x, scale, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in ((R, K), (N,), (N,)))
    gradient = torch.randn(R, N, generator=draw).to(dtype)
    weight = torch.randint(-127, 128, (N, K), generator=draw, dtype=torch.int8)
    rows = int8_arithmetic.int8_rows(x)
    folded = int8_arithmetic.int8_rows(gradient, scale)
    forward = int8_arithmetic.int8_matmul(*rows, weight, scale, bias, dtype)
    backward = int8_arithmetic.int8_matmul_transposed(*folded, weight, dtype)

    gpu = torch.device("cuda")
    x, scale, bias, gradient, weight = (each.to(gpu) for each in (x, scale, bias, gradient, weight))
    for ours, theirs in ((int8_arithmetic.int8_rows(x), rows), (int8_arithmetic.int8_rows(gradient, scale), folded)):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
    on_gpu, folded_on_gpu = int8_arithmetic.int8_rows(x), int8_arithmetic.int8_rows(gradient, scale)
    assert torch.equal(int8_arithmetic.int8_matmul(*on_gpu, weight, scale, bias, dtype).cpu(), forward)
    assert torch.equal(int8_arithmetic.int8_matmul_transposed(*folded_on_gpu, weight, dtype).cpu(), backward)
    assert torch.equal(kernels.transposed(weight), weight.t())
    for tiles in kernels.candidates(torch.cuda.get_device_capability()):
        y, dx = torch.empty(R, N, dtype=dtype, device=gpu), torch.empty(R, K, dtype=dtype, device=gpu)
        kernels.launch_matmul(tiles, *on_gpu, weight, scale, bias, y, along_rows=True)
        assert torch.equal(y.cpu(), forward)
        kernels.launch_matmul(tiles, *folded_on_gpu, weight, None, None, dx, along_rows=False)
        assert torch.equal(dx.cpu(), backward)
        kernels.launch_matmul(tiles, *folded_on_gpu, kernels.transposed(weight), None, None, dx, along_rows=True)
        assert torch.equal(dx.cpu(), backward)
