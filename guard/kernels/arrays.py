"""The encoder without torch: the CPU encoder's blocks in numpy, for readers that hand out numpy arrays."""

import numpy as np
from numpy.typing import NDArray

from guard.kernels.contract import Array, Encoded, EncodeRows, check_shape, not_finite

Floats = NDArray[np.float32]

_BLOCK_FLOATS = 1 << 18  # 1 MB of pre-activations, as the CPU encoder's


class NumpyEncoder:
    """`x` and the rows are numpy arrays; no more than `[block, K]` pre-activations are held at a time."""

    name = "numpy"

    def __call__(self, x: Array, rows: EncodeRows) -> Encoded:
        check_shape(x, rows)
        x = np.asarray(x, dtype=np.float32)
        square = _mean_square(x)  # [T, 1]
        if not np.isfinite(square * np.float32(x.shape[1])).all():
            return not_finite(x, rows)
        block = max(16, _BLOCK_FLOATS // max(1, len(rows.enc_rows)))
        parts = [_hits(x[start : start + block], start, rows) for start in range(0, len(x), block)]
        inverse = np.where(square > 0, 1 / np.sqrt(np.maximum(square, np.float32(1e-12))), np.float32(0))
        return Encoded(
            token=np.concatenate([np.empty(0, np.int64), *(token for token, _, _ in parts)]),
            row=np.concatenate([np.empty(0, np.int64), *(row for _, row, _ in parts)]),
            value=np.concatenate([np.empty(0, np.float32), *(value for _, _, value in parts)]),
            probe=x @ rows.probe_rows.T * inverse + rows.probe_bias,
            finite=True,
        )


def _mean_square(x: Floats) -> Floats:
    """`[T, 1]`; infinite or NaN where a token is not representable (guard.kernels.contract.representable)."""
    with np.errstate(over="ignore", invalid="ignore"):
        result: Floats = np.einsum("td,td->t", x, x)[:, None] / np.float32(x.shape[1])
    return result


def _hits(x: Floats, start: int, rows: EncodeRows) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Token, row and value of what fires in one block of tokens, of which the first is number `start`."""
    pre = x @ rows.enc_rows.T  # [block, K]
    pre += rows.bias
    token, row = np.nonzero(pre > rows.threshold)
    return token + start, row, pre[token, row]
