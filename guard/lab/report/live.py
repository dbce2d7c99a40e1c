"""What the report reads on the spot, and what the suite's SAEs show of it, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guard.lab.heads.features import Floats
from guard.lab.report import stimuli
from guard.lab.report.data import ItemCount, KnownRow, LanguageCandidate, LanguageRow
from guard.lab.report.items import count_items, sentences
from guard.lab.report.known import find_knowing
from guard.lab.report.languages import candidates_by_language, compare_languages
from guard.lab.report.reading import Guess, Passage, Seen, guesses, read
from guard.lab.search.candidates import Candidate
from guard.lab.suite.sae import FullSae


@dataclass
class Found:
    """What the SAEs have shown so far."""

    items: list[ItemCount] = field(default_factory=list)
    languages: list[LanguageRow] = field(default_factory=list)
    by_language: list[LanguageCandidate] = field(default_factory=list)
    known: list[KnownRow] = field(default_factory=list)
    maps: list[tuple[str, Sequence[Candidate], Floats]] = field(default_factory=list)


class Stimuli:
    """The sentences, and which of what was read is whose."""

    def __init__(self, folder: Path, hook_points: Sequence[str], dtype: str) -> None:
        self.items, self.queries, self.names = stimuli.items(), stimuli.translated(), stimuli.named()
        parts = {
            "items_en": [Passage(text) for _, text in sentences(self.items, "en")],
            "items_zh": [Passage(text) for _, text in sentences(self.items, "zh")],
            "queries_en": [Passage(query.en) for query in self.queries],
            "queries_zh": [Passage(query.zh) for query in self.queries],
            "names": [Passage(one.prompt, one.start) for one in self.names],
        }
        self._span: dict[str, slice] = {}
        for name, passages in parts.items():
            begin = max((span.stop for span in self._span.values()), default=0)
            self._span[name] = slice(begin, begin + len(passages))
        passages = [passage for part in parts.values() for passage in part]
        self._seen: Seen = read(passages, folder, hook_points, dtype=dtype)
        self.guessed: list[Guess] = guesses(folder, self.names, dtype=dtype)

    def tokens(self, lang: str) -> float:
        return float(self._seen.tokens[self._span[f"queries_{lang}"]].mean())

    def look(self, sae: FullSae, candidates: Sequence[Candidate], into: Found) -> None:
        """Adds one SAE's rows to what was found."""
        fired, means = self._seen.fired(sae), self._seen.means(sae.hook_point)
        of = {name: fired[span] for name, span in self._span.items()}
        both = of["queries_en"], of["queries_zh"]
        en, zh = (means[self._span[f"queries_{lang}"]] for lang in ("en", "zh"))
        into.items += count_items(sae, self.items, of["items_en"], of["items_zh"])
        into.languages.append(compare_languages(sae, self.queries, both, (en, zh)))
        into.by_language += candidates_by_language(candidates, self.queries, both)
        into.known.append(find_knowing(sae, self.names, of["names"], self.guessed))

    def fires(self, sae: FullSae, latent: int) -> list[bool]:
        """Whether a latent fires on each of the names."""
        return [bool(fires) for fires in self._seen.fired(sae)[self._span["names"], latent]]
