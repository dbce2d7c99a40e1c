"""The same texts by other text classifiers and by Guard, in one run: milliseconds a text, one text at a time.

Peers run in environments of their own, which `benchmarks/peers/setup.sh` makes; one that is not there is refused.
Speed alone is compared. What each of them finds differs: words, or sentences, or what a model reads in them.
"""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.figures import Report
from benchmarks.given import assessing, furthest, on_worker, text_of
from benchmarks.peers.child import PEERS
from guard.assessor import Assessor
from guard.errors import ConfigError
from guard.kernels import choice
from guard.reader import weights
from guard.records import CheckInput

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENTS = REPOSITORY / ".build" / "peers"
LENGTHS = (16, 128)
TEXTS = 5  # of each length, in turn, so that nobody answers twice in a row for one text
TOLERANCE = 0.05  # of any score, between Guard's dtypes
BASELINE = "transformers, output_hidden_states"

Timed = Callable[[str], float]  # seconds that a text took


def run(report: Report, pack: Path, repeats: int) -> None:
    with contextlib.ExitStack() as stack:
        assessor, use = stack.enter_context(assessing(pack, "float32", "bfloat16"))
        texts = {n: [text_of(assessor.pipeline.tokenizer, n, 3 * k) for k in range(TEXTS)] for n in LENGTHS}
        cases: dict[str, Timed] = {BASELINE: _transformers(assessor), "TF-IDF, logistic regression": _tfidf()}
        for name in PEERS:
            try:
                cases[name] = stack.enter_context(_peer(name))
            except (OSError, RuntimeError) as error:
                report.refuse(name, str(error))
        cases |= _guard(report, assessor, use, texts[LENGTHS[-1]][0])
        for length, given in texts.items():
            seconds = _interleaved(cases, given, max(repeats, TEXTS))
            baseline = (f"{BASELINE}, {length} tokens", seconds[BASELINE])
            for name, spent in seconds.items():
                report.add(f"{name}, {length} tokens", spent, baseline)


def _interleaved(cases: dict[str, Timed], texts: list[str], repeats: int) -> dict[str, list[float]]:
    """As `figures.interleaved`, by each case's own clock, and with another text every round."""
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, repeats):
        text = texts[number % len(texts)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cases[name](texts[(number + 1) % len(texts)])  # another text, so that caches are warm and answers are not
            spent = cases[name](text)
            if number >= 0:
                seconds[name].append(spent)
    return seconds


@contextlib.contextmanager
def _peer(name: str) -> Iterator[Timed]:
    """Raises OSError where its environment is missing, RuntimeError where it ends before it answers."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"found no {python.relative_to(REPOSITORY)}, expected: benchmarks/peers/setup.sh {name}"
        )
    command = [str(python), str(Path(__file__).with_name("child.py")), name]
    with (
        tempfile.TemporaryFile("w+") as said,  # a pipe that nobody empties would stop a peer that says much
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as child,
    ):

        def answer(line: str = "") -> dict[str, float]:
            if line:
                child.stdin.write(line + "\n")
                child.stdin.flush()
            told = child.stdout.readline()
            if not told:
                status = child.wait()
                said.seek(0)
                last = (said.read().strip().splitlines() or ["nothing on stderr"])[-1]
                raise RuntimeError(f"ended with status {status}: {last}")
            return json.loads(told)

        answer()
        try:
            yield lambda text: answer(json.dumps(text))["seconds"]
        finally:
            child.stdin.close()
            child.wait(timeout=30)


def _timed(work: Callable[[str], object]) -> Timed:
    def measured(text: str) -> float:
        started = time.perf_counter()
        work(text)
        return time.perf_counter() - started

    return measured


def _guard(report: Report, assessor: Assessor, use: dict[str, Callable[[], None]], text: str) -> dict[str, Timed]:
    """Guard with the float32 encoder, and with bfloat16 for its reader, then for its rows as well."""
    encoders = {"float32": [("float32", "cpu")], "bfloat16": [("bfloat16", "cpu"), ("bfloat16, rows too", "cpu-bf16")]}
    cases: dict[str, Timed] = {}
    expected = None
    for dtype, choose in use.items():
        for label, backend in encoders[dtype]:
            name = f"Guard, {label}"
            try:
                encoder = choice.choose(backend)
            except ConfigError as error:
                report.notes[name] = str(error)
                continue

            def check(text: str, choose: Callable[[], None] = choose, encoder: object = encoder) -> object:
                choose()
                assessor.pipeline.now.encode = encoder
                return assessor.check(CheckInput(text))

            found = check(text)
            expected = expected or found
            difference = furthest(found, expected)
            report.notes[f"{name}: largest difference of a score from float32's"] = difference
            if difference > TOLERANCE:
                report.refuse(name, f"scores differ by {difference:.2g}, expected {TOLERANCE:g}")
            else:
                cases[name] = _timed(check)
    return cases


def _transformers(assessor: Assessor) -> Timed:
    """The reader's model as transformers runs it, on the thread that multiplies (see given.Shared)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights.resolve(weights.DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def read(text: str) -> None:
        model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True, use_cache=False)

    return _timed(lambda text: on_worker(assessor, lambda: read(text)))


def _tfidf() -> Timed:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, risky = [], []
    for path in sorted((REPOSITORY / "guard" / "lab" / "data").glob("sentences.*.jsonl")):
        lines = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        texts += lines
        risky += [path.name.split(".")[1] != "other"] * len(lines)
    classifier = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(solver="liblinear"))
    classifier.fit(texts, risky)
    return _timed(lambda text: classifier.predict_proba([text]))
