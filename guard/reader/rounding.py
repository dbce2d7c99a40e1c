"""Weights rounded to int8 so that what a product gives changes least on inputs like those that were seen.

As in GPTQ (Frantar et al., 2022, arXiv 2210.17323): input channels are rounded one after another, and what rounding one
changes in the outputs is made up for by those that are left, as far as they were large together. It costs time once,
and none when the product is taken.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

INT8_MAX = 127
_DAMPING = 0.01  # of the mean second moment: for channels that were hardly seen
_TOGETHER = 64  # channels whose errors reach the later ones in one product


def scales(weight: Floats) -> Floats:
    """What one step of each output is worth: `weight [in, out]` -> `[out]`."""
    return np.asarray(np.maximum(np.abs(weight).max(axis=0), 1e-12) / INT8_MAX, dtype=np.float32)


def rounded(weight: Floats, moments: Floats) -> NDArray[np.int8]:
    """`weight [in, out]` in steps of `scales(weight)`, for inputs with `moments [in, in]`, the mean of `x x^T`."""
    steps = weight / scales(weight)
    channels = len(steps)
    damped = moments.astype(np.float64)
    damped += np.eye(channels) * max(_DAMPING * np.trace(damped) / channels, 1e-12)
    # Row i of this upper triangle says how later channels make up for an error of channel i.
    shares = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    whole = np.empty(steps.shape, dtype=np.int8)
    for start in range(0, channels, _TOGETHER):
        stop = min(start + _TOGETHER, channels)
        errors = np.empty((stop - start, steps.shape[1]), dtype=np.float32)
        for i in range(start, stop):
            whole[i] = np.clip(np.rint(steps[i]), -INT8_MAX, INT8_MAX)
            errors[i - start] = (steps[i] - whole[i]) / shares[i, i]
            steps[i + 1 : stop] -= np.outer(shares[i, i + 1 : stop], errors[i - start])
        steps[stop:] -= shares[start:stop, stop:].T @ errors
    return whole
