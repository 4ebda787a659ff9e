"""Every Triton kernel compiles to a cubin for an H100-class GPU; no GPU is needed for that."""

import pytest

from uniproj.kernels import backend

if backend() == "triton-interpreter":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from uniproj.kernels import (  # noqa: E402
    fastfood_triton,
    gaussian_triton,
    grouped_triton,
    hadamard_triton,
    partition_triton,
    random_triton,
    shared_triton,
    topk_triton,
)

HOPPER = GPUTarget("cuda", 90, 32)
INTEGERS = {"index", "order", "starts", "places", "table", "groups", "by_row", "by_position", "key"}
WORDS = {"tables"}
FROZEN = {"divisors", "numbers"}
TENSORS = INTEGERS | WORDS | FROZEN | {"x", "y", "out", "vectors", "weights", "matrix", "scale"}
CONSTANTS = {"BLOCK": 1024, "K": 2, "PIECES": 32, "COLUMNS": 64, "WIDE": 256, "NARROW": 16}
CONSTANTS |= {"PIECE_STEPS": 3, "GROUP_STEPS": 2, "ROWS": 32, "NORMALS": True, "BITS": 10, "BACK": True}
KERNELS = [
    fastfood_triton._permute,
    *(partition_triton._deal_out, partition_triton._gather_in, partition_triton._scaled),
    *(topk_triton._mix, topk_triton._vectors_gradient, topk_triton._weights_gradient),
    *(gaussian_triton._times, gaussian_triton._transpose_times, hadamard_triton._pass, random_triton._bits),
    *(grouped_triton._product, grouped_triton._transpose_product),
    *(shared_triton._product, shared_triton._matrix_gradient, shared_triton._scale_gradient),
]


def signature(names: list[str], dtype: str) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in CONSTANTS:
            return "constexpr"
        if name not in TENSORS:
            return "i32"
        if name in FROZEN:
            return "*fp64"
        whole = name in INTEGERS
        return "*i64" if whole else "*i16" if name in WORDS else f"*{dtype}"

    return {name: kind(name) for name in names}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.__module__.rsplit('.')[-1]}.{kernel.__name__}")
def test_kernel_compiles_for_hopper(kernel, dtype: str) -> None:
    names = list(kernel.arg_names)
    constants = {name: value for name, value in CONSTANTS.items() if name in names}
    source = ASTSource(fn=kernel, signature=signature(names, dtype), constexprs=constants)
    compiled = triton.compile(source, target=HOPPER, options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"].startswith(b"\x7fELF") and ".target sm_90" in compiled.asm["ptx"]
