"""Products by weights that are laid out once as oneDNN reads them. torch's own lay a weight out at every call.

That costs most in float32, and where rows are few (docs/decisions/0008).
"""

import torch
from torch import Tensor


def can_lay_out(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported  # noqa: SLF001 - oneDNN may be kept from using it
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(has_bfloat16()))


def lay_out(weight: Tensor) -> Tensor:
    """`weight [out, in]` in oneDNN's own order; `to_dense()` gives it back."""
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001 - torch.compile's
    return laid_out


def product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    """`x [T, in]` -> `[T, out]`, in the dtype of the weight."""
    more = padded(len(x)) - len(x)
    if more:
        x = torch.nn.functional.pad(x, (0, 0, 0, more))
    multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - what torch.compile makes of a product
    result: Tensor = multiply(x, laid_out, bias, "none", [], "")
    return result[: len(result) - more]


def padded(rows: int) -> int:
    """The next of few sizes, a sixteenth more at most: oneDNN keeps what it makes for each, by shape of weight."""
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step
