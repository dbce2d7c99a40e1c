"""`python -m benchmarks.explained_suite SAES CONTRAST SIMULATED ...`: the metric against what explanations score.

SAES is what `guard lab train` wrote, CONTRAST what `guard lab contrast` did; each SIMULATED is a run of `guard lab
simulate` over some of the SAEs' latents. An SAE's score is the mean over its latents. Prints Spearman's correlation
over the SAEs, with a bootstrap over SAEs and over each one's latents; writes docs/search/post.json.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from guard.lab.suite.measure import read_reports

RESULT = Path(__file__).parents[1] / "docs" / "search" / "post.json"
DRAWS = 2000


def main(saes: Path, contrast: Path, simulated: list[Path]) -> None:
    scores = _scores(simulated)
    reports = [report for report in read_reports(saes) or [] if report.name in scores]
    names = [report.name for report in reports]
    columns = {name: np.array(values) for name, values in _metric(contrast, names).items()}
    columns["-FVU"] = np.array([-report.fvu_typical for report in reports])
    columns["L0"] = np.array([report.l0 for report in reports])
    post = np.array([np.mean(scores[name]) for name in names])
    correlations = {name: _correlation(column, names, scores) for name, column in columns.items()}
    for name, told in correlations.items():
        sys.stdout.write(f"{name}: {told['spearman']:+.2f} [{told['low']:+.2f}, {told['high']:+.2f}]\n")
    told = [
        {"name": name, "latents": len(scores[name]), "score": float(post[i])}
        | {key: float(column[i]) for key, column in columns.items()}
        for i, name in enumerate(names)
    ]
    RESULT.write_text(json.dumps({"saes": told, "correlations": correlations}, indent=1) + "\n", encoding="utf-8")


def _scores(simulated: list[Path]) -> dict[str, list[float]]:
    """By SAE, what its latents' explanations scored."""
    found: dict[str, list[float]] = defaultdict(list)
    for folder in simulated:
        for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found[entry["sae"]].append(entry["scores"]["simulation_segment"])
    return dict(found)


def _metric(contrast: Path, names: list[str]) -> dict[str, list[float]]:
    told = json.loads((contrast / "contrast.json").read_text(encoding="utf-8"))
    concepts = told if isinstance(told, list) else told["concepts"]
    whole = {c["sae"]: c for c in concepts if c["domain"] == "*"}
    best: dict[str, list[float]] = defaultdict(list)
    for concept in concepts:
        if concept["subdomain"] != "*":
            best[concept["sae"]].append(concept["best_p"][0])
    return {
        "p_best": [float(np.mean(best[name])) for name in names],
        "I_CDF": [whole[name]["i_cdf"] for name in names],
        "L_{0,0.2}": [whole[name]["l0_at"]["0.2"] for name in names],
    }


def _correlation(column: np.ndarray, names: list[str], scores: dict[str, list[float]]) -> dict[str, float]:
    rng, drawn = np.random.default_rng(0), []
    for _ in range(DRAWS):
        chosen = rng.integers(0, len(names), len(names))
        post = [np.mean(rng.choice(scores[names[i]], len(scores[names[i]]))) for i in chosen]
        drawn.append(spearmanr(column[chosen], post).statistic)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    found = spearmanr(column, [np.mean(scores[name]) for name in names]).statistic
    return {"spearman": float(found), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
