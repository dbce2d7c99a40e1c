"""`python -m tests.kernels.compiling`: compiles the kernel for a Hopper card, which needs no card.

The interpreter takes programs that the compiler does not; this is what finds them. Says OK, or why not.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from guard.kernels import fused

POINTERS = {
    "gain": "*fp32", "bias": "*fp32", "threshold": "*fp32", "rise": "*fp32", "index": "*i32", "blocks": "*i32", "status": "*i32",
    "hit_cell": "*i32", "hit_value": "*fp32", "probe": "*fp32",
    "slot": "*i32", "sums": "*i64", "counts": "*i32", "probe_sums": "*fp64", "seen": "*i64", "spoiled": "*i32",
}  # fmt: skip
ALIGNED = {"x", "rows", *POINTERS, "x_hook", "x_token", "rows_column"}
OF_HITS, OF_POOL = {"hit_cell", "hit_value", "probe"}, {"slot", "sums", "counts", "probe_sums", "seen", "spoiled"}


def compiled(config, x="bf16", rows="bf16", *, hits=True, pool=True, d_model=576, arch=90):
    scaled = rows in {"i8", "fp8e4nv"}
    widen = x == "fp32" or (x != rows and not scaled)
    constant = {"D": d_model, "HITS": hits, "POOL": pool, "SCALED": scaled, "WIDEN": widen, "PRECISION": "ieee"}
    constant |= config.kwargs
    constant |= {} if scaled else {"gain": None}
    constant |= dict.fromkeys((OF_HITS if not hits else set()) | (OF_POOL if not pool else set()))
    names = fused.kernel.arg_names
    types = {"x": f"*{x}", "rows": f"*{rows}", **POINTERS}
    source = ASTSource(
        fused.kernel,
        {name: "constexpr" if name in constant else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constant.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED - constant.keys()},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


if __name__ == "__main__":
    halves = compiled(fused.PREFILL[-1])
    if "wgmma.mma_async" not in halves.asm["ptx"]:
        sys.exit("prefill in bf16: found no product on tensor cores")
    compiled(fused.DECODE[0], "fp16", "fp32", pool=False)
    compiled(fused.DECODE[0], hits=False)
    for eight in ("i8", "fp8e4nv"):
        compiled(fused.PREFILL[-1], rows=eight, hits=False)
        compiled(fused.DECODE[0], rows=eight, hits=False)
    sys.stdout.write("OK\n")
