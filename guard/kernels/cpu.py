"""The CPU encoder: blocks of tokens against all rows, so that a block's pre-activations stay in the core's cache.

No dense `[T, K]` is ever held: one `[block, K]` is made, cut, and thrown away, whatever the length of the text.
"""

import torch
from torch import Tensor

from guard.kernels.contract import Encoded, EncodeRows, check_shape, inverse_rms, not_finite, representable

_BLOCK_FLOATS = 1 << 18  # 1 MB of pre-activations: half of a typical core's second-level cache


class CpuEncoder:
    name = "cpu"

    def __call__(self, x: Tensor, rows: EncodeRows) -> Encoded:
        check_shape(x, rows)
        x = x.float()
        if not representable(x):
            return not_finite(x, rows)
        block = max(16, _BLOCK_FLOATS // max(1, len(rows.enc_rows)))
        tokens, found, values = [], [], []
        for start in range(0, len(x), block):
            pre = torch.addmm(rows.bias, x[start : start + block], rows.enc_rows.T)  # [block, K]
            token, row = (pre > rows.threshold).nonzero(as_tuple=True)
            tokens.append(token + start)
            found.append(row)
            values.append(pre[token, row])
        empty = torch.empty(0, dtype=torch.long)
        return Encoded(
            token=torch.cat(tokens) if tokens else empty,
            row=torch.cat(found) if found else empty,
            value=torch.cat(values) if values else torch.empty(0),
            probe=x @ rows.probe_rows.T * inverse_rms(x) + rows.probe_bias,
            finite=True,
        )
