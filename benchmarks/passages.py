"""Harm amid harmless words, found by passages where the whole hides it: `python -m benchmarks.passages [PACK]`.

The harmful texts are the pack's own cases, which no head was fitted on, with ever more harmless sentences around them,
half before and half behind. The harmless ones are those sentences alone, which heads are fitted on as harmless, and
look-alikes one after the other, which they are not; both in English.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from guard.assessor import Assessor
from guard.config import DEFAULT_PACK, load_config
from guard.lab.labelled import Row, lookalike_rows, written_rows
from guard.records import CheckInput

AROUND = (0, 32, 64, 128, 256, 512)  # tokens of harmless text
TEXTS = 40  # harmless ones of each length
RESULT = Path(__file__).parent / "results" / "passages.json"

Acts = tuple[bool, bool]  # whether any head that acts does so: over the whole alone, and with its passages


def main(folder: Path) -> None:
    assessor = Assessor.load(load_config(overrides={"pack": str(folder)}))
    try:
        cases = [case for case in assessor.pack.cases if case.expect == "act"]
        calm = {
            lang: _sentences([r for r in written_rows() if _everyday(r) and r.lang == lang]) for lang in ("en", "zh")
        }
        alike = {lang: _sentences([r for r in lookalike_rows() if r.lang == lang]) for lang in ("en", "zh")}
        found: dict[str, dict[str, list[Acts]]] = {}
        for tokens in track(AROUND, "lengths"):
            rng = random.Random(tokens)
            texts = {"harmful": [_amid(assessor, case.text, calm[case.lang], tokens, rng) for case in cases]}
            if tokens:
                texts["harmless"] = [_filled(assessor, calm["en"], tokens, rng) for _ in range(TEXTS)]
                texts["look-alikes"] = [_filled(assessor, alike["en"], tokens, rng) for _ in range(TEXTS)]
            for kind, those in texts.items():
                found.setdefault(kind, {})[str(tokens)] = [_acts(assessor, text) for text in those]
    finally:
        assessor.close()
    shares = {
        kind: {
            n: dict(zip(("whole", "passages"), np.mean(acts, axis=0).round(4).tolist(), strict=True))
            for n, acts in of.items()
        }
        for kind, of in found.items()
    }
    pack = {"id": assessor.pack.info.id, "version": assessor.pack.info.version, "hash": assessor.pack.info.hash}
    counts = {"harmful": len(cases), "harmless": TEXTS, "look-alikes": TEXTS}
    RESULT.write_text(json.dumps({"pack": pack, "texts": counts, "flagged": shares}, indent=1) + "\n", encoding="utf-8")
    shown = Table(title="Flagged by the whole alone -> with its passages", title_justify="left")
    for heading in ("harmless tokens around, or in all", *map(str, AROUND)):
        shown.add_column(heading)
    for kind, of in shares.items():
        cells = [f"{of[str(n)]['whole']:.0%} -> {of[str(n)]['passages']:.0%}" if str(n) in of else "" for n in AROUND]
        shown.add_row(f"{counts[kind]} {kind}", *cells)
    Console(width=140).print(shown)


def _everyday(row: Row) -> bool:
    return row.source == "own_other" and row.kind == "topical"


def _sentences(rows: Sequence[Row]) -> list[str]:
    return [row.text for row in rows]


def _filled(assessor: Assessor, sentences: Sequence[str], tokens: int, rng: random.Random) -> str:
    """Sentences drawn one after the other until there are so many tokens."""
    parts: list[str] = []
    count = 0
    while count < tokens:
        parts.append(rng.choice(sentences))
        count += len(assessor.pipeline.tokenizer.text(parts[-1]).ids)
    return " ".join(parts)


def _amid(assessor: Assessor, text: str, sentences: Sequence[str], tokens: int, rng: random.Random) -> str:
    before, behind = (_filled(assessor, sentences, tokens // 2, rng) for _ in range(2))
    return f"{before} {text} {behind}".strip()


def _acts(assessor: Assessor, text: str) -> Acts:
    pipeline = assessor.pipeline
    state = pipeline.heads.new_state()
    for unit, _ in pipeline.plan_of(pipeline.tokenize(CheckInput(text)), chat=False).reads:
        pipeline.run([unit])
        hits = pipeline.join(unit.encoded)
        if hits is None:
            raise RuntimeError("the model's activations are not finite")
        state.add(hits, np.zeros((hits.tokens, 3), dtype=np.int64))
    whole = pipeline.heads.logits([state.whole])[0]
    most = state.most(pipeline.heads.logits(state.unsettled()))
    flag_at = [head.flag_at for head in assessor.pack.manifest.heads]

    def acts(logits: np.ndarray) -> bool:
        return any(at is not None and 1 / (1 + np.exp(-z)) >= at for z, at in zip(logits, flag_at, strict=True))

    return acts(whole), acts(most)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PACK)
