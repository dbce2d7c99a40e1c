"""The truth that the fast encoders are held against: one dense float32 product, written plainly."""

from torch import Tensor

from guard.kernels.contract import Encoded, EncodeRows, check_shape, not_finite, representable, rms_normalised


class ReferenceEncoder:
    name = "reference"

    def __call__(self, x: Tensor, rows: EncodeRows) -> Encoded:
        check_shape(x, rows)
        x = x.float()
        if not representable(x):
            return not_finite(x, rows)
        pre = x @ rows.enc_rows.T + rows.bias  # [T, K]
        token, row = (pre > rows.threshold).nonzero(as_tuple=True)  # [N], [N]
        probe = rms_normalised(x) @ rows.probe_rows.T + rows.probe_bias  # [T, P]
        return Encoded(token, row, pre[token, row], probe, finite=True)
