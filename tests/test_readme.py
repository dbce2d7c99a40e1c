"""README says what is true: its Python example runs, and its figures are the pack's."""

import json
import re
import tomllib
from statistics import mean

from guard.records import CheckInput
from tests.conftest import PACK, REPOSITORY
from tests.service.running import make_config, running

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150


def test_the_python_example_runs_against_a_real_sidecar(assessor, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    with running(make_config(pack=str(PACK)), assessor) as server:
        exec(compile(code.replace("127.0.0.1:50051", server.address), "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "allow"
    assert any(line.startswith("violence harm 0.") for line in printed)


def test_the_blocked_example_and_what_thins_it_out_are_as_they_say(assessor):
    text = re.search(r'`guard check "(.+?)"`', README).group(1)
    behind = re.search(r'example above, "(.+?)"', README, re.DOTALL).group(1).replace("\n  ", " ")
    alone, thinned = (assessor.check(CheckInput(given)) for given in (text, f"{text} {behind}"))
    assert (alone.action, thinned.action) == ("block", "flag")
    scores = [
        f"{head.score:.3f}"
        for verdict in (alone, thinned)
        for domain in verdict.phases[0].domains
        for head in domain.heads
        if (domain.domain, head.head) == ("violence", "harm")
    ]
    assert f"makes {thinned.phases[0].tokens_read} tokens of it" in README
    assert f"(violence.harm {' to '.join(scores)})" in README


def pack_sources():
    return tomllib.loads((PACK / "manifest.toml").read_text(encoding="utf-8"))["sources"]


def test_the_detection_table_is_the_packs_evaluation():
    evaluation = json.loads((PACK / "evaluation.json").read_text(encoding="utf-8"))
    by_head = {}
    for figure in evaluation["detection"]:
        by_head.setdefault(f"{figure['domain']}.{figure['head']}", []).append(figure["auroc"])
    for head, figures in by_head.items():
        cells = [f"{mean(f[column] for f in figures):.3f}"[1:] for column in ("tfidf", "probe", "latents", "combined")]
        assert f"| {head} | {' | '.join(cells)} |" in README
    licences = {source["name"] for source in pack_sources() if source["use"] != "judging the heads"}
    clean = [figure["auroc"] for figure in evaluation["detection"] if figure["source"] not in licences]
    means = [f"{mean(f[column] for f in clean):.3f}"[1:] for column in ("tfidf", "probe", "latents", "combined")]
    assert (
        f"on the other {len(clean)}, of which nothing was used, the means over all heads are {', '.join(means)}."
        in README
    )
    assert f"flagged: {evaluation['lookalikes']['flagged']} (" in README
