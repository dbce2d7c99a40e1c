"""The pack's rows against the whole SAEs in sae-lens's own code: `python -m benchmarks.exactness SAES ACTIVATIONS`.

SAES is what `guard lab train` wrote, ACTIVATIONS what `guard lab harvest` wrote; neither is shipped.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from sae_lens import SAE

from guard.config import DEFAULT_PACK
from guard.kernels import choice
from guard.kernels.contract import EncodeRows
from guard.lab import shards
from guard.lab.suite.measure import OUTLIER_NORM, read_reports
from guard.pack.loader import load_pack


def main(saes: Path, activations: Path) -> None:
    """Prints, for each hook point: active-set disagreements, and the largest absolute error where both fire."""
    last = shards.described(activations).shard_count - 1
    names = {report.hook_point: report.name for report in read_reports(saes) or []}
    for point in load_pack(DEFAULT_PACK).hook_points:
        x = shards.load(activations, last)[point.name].float()  # [T, d_model]
        sae = SAE.load_from_disk(str(saes / names[point.name]))
        with torch.no_grad():
            full = torch.cat([sae.encode(block) for block in x.split(2048)])[:, torch.from_numpy(point.latents)]
        encoded = choice.choose("cpu")(x, EncodeRows.of(point, torch.from_numpy))
        ours = torch.zeros_like(full)
        ours[encoded.token, encoded.row] = encoded.value
        error = (full - ours).abs() * ((full > 0) & (ours > 0))
        norm = torch.linalg.vector_norm(x, dim=1)
        typical = norm < OUTLIER_NORM * norm.median()
        outsized = max(error[~typical].amax(dim=1).tolist(), default=0.0)
        Console(soft_wrap=True, highlight=False).print(
            f"{point.name}: {len(x)} tokens, {int((full > 0).sum())} hits, "
            f"{int(((full > 0) != (ours > 0)).sum())} disagree; max abs error {float(error[typical].max()):.1e}, "
            f"on the {int((~typical).sum())} tokens of outsized norm {outsized:.1e} "
            f"(values up to {float(full.max()):.0f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__)
    parser.add_argument("saes", type=Path)
    parser.add_argument("activations", type=Path)
    given = parser.parse_args()
    main(given.saes, given.activations)
