"""The report as the command line makes it, on a small model with random weights and SAEs of random directions."""

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import save_file

from guard.cli.main import main
from guard.lab import labelled, shards
from guard.lab.report import reading, stimuli
from guard.lab.report.blocks import comparable
from guard.lab.search.candidates import Candidate, Tag
from guard.lab.suite.measure import SaeReport
from guard.reader import weights

POINTS = ("model.layers.1", "model.layers.3", "model.layers.3.mlp")
WIDTH = 48
EVIL = '<script>alert("x")</script> & $x$'
IDS = {
    "suite", "curve", "prediction", "found", "precision", "candidates", "tags", "entities", "languages", "language_candidates", "landscape",
    "known", "names",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """A suite, a harvest's description, candidates and a contrast folder, as the other commands write them."""
    folder = tmp_path_factory.mktemp("runs")
    passages = [reading.Passage(text) for item in stimuli.items()[::5] for text in (*item.en[:2], *item.zh[:1])]
    seen = reading.read(passages, model, POINTS, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    names = [write_sae(folder / "suite", seen.x[p].float(), p, l0, generator) for p in POINTS for l0 in (2, 6)]
    reports = [sae_report(name, point, l0) for name, (point, l0) in zip(names, places(), strict=True)]
    (folder / "suite" / "report.json").write_text(json.dumps(reports))
    (folder / "candidates.jsonl").write_text("".join(json.dumps(c) + "\n" for c in made_up_candidates(names[:-1])))
    (folder / "candidates.summary.json").write_text(json.dumps(made_up_summary(names)))
    write_contrast(folder / "contrast", reports)
    rows = labelled.lookalike_rows()[:5]
    (folder / "texts").mkdir()
    shards.describe(
        folder / "texts",
        shards.ShardSet(
            model=str(model),
            fingerprint=weights.fingerprint(model),
            hook_points=POINTS,
            d_model=16,
            dtype="float32",
            context=64,
            seed=0,
            tokens=60,
            sources=(labelled.digest(rows),),
            shard_count=1,
        ),
    )
    (folder / "texts" / "rows.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
    return folder


def places():
    return [(point, l0) for point in POINTS for l0 in (2, 6)]


def write_sae(suite, x, point, l0, generator):
    """Random directions, each with the threshold at which it fires on its share of the tokens."""
    name = f"{point}.batch_topk.w{WIDTH}.l{l0}"
    rows = torch.nn.functional.normalize(torch.randn(WIDTH, 16, generator=generator), dim=1)
    threshold = (x @ rows.T).quantile(1 - l0 / WIDTH, dim=0).clamp(min=1e-4)
    (suite / name).mkdir(parents=True)
    save_file(
        {
            "W_enc": rows.T.contiguous(),
            "b_enc": torch.zeros(WIDTH),
            "W_dec": rows,
            "b_dec": torch.zeros(16),
            "threshold": threshold,
        },
        suite / name / "sae_weights.safetensors",
    )
    (suite / name / "cfg.json").write_text(json.dumps({"architecture": "jumprelu", "apply_b_dec_to_input": True}))
    return name


def sae_report(name, point, l0):
    return {
        "name": name, "hook_point": point, "architecture": "batch_topk", "width": WIDTH, "l0_target": l0,
        "tokens_trained": 5000, "fvu": 0.5 - 0.05 * l0, "fvu_typical": 0.6 - 0.05 * l0, "outlier_share": 0.01, "l0": l0 + 0.5,
        "dead_share": 0.125, "threshold": 0.1,
        "ce": {"model": 3.0, "sae": 3.3, "ablated": 6.0, "recovered": 0.9} if l0 == 6 else None,
    }  # fmt: skip


def made_up_candidates(names):
    """Seven an SAE: six with one domain, one with two."""
    result = []
    for name in names:
        for latent in range(7):
            domains = ["politics", "terror"] if latent == 6 else [("violence", EVIL)[latent % 2]]
            tags = [
                {"domain": d, "subdomain": "insult" if d == "violence" else "*", "evidence": "contrast", "effect": 0.2,
                 "p": 0.001, "q": 0.02, "latent_q": 0.01}
                for d in domains
            ]  # fmt: skip
            result.append(
                {"hook_point": name.partition(".batch_topk")[0], "sae": name, "latent": latent, "tags": tags, "surface": (True, False, None)[latent % 3],
                 "why": "", "token": None, "token_share": None, "token_coverage": None, "firing_rate": 0.01}
            )  # fmt: skip
    return result


def made_up_summary(names):
    """Of a search at 10%, among the last of whose SAEs nothing was found."""
    shared = {"by_contrast": 3, "by_labels": 2, "by_both": 1, "surface": 1}
    counts = [
        {"domain": d, "subdomain": "*", "depth": depth, "latents": WIDTH * n, "found": found, **shared}
        for d, depth, n, found in (("violence", 1, 2, 6), ("violence", 3, 4, 9), ("politics", 1, 2, 2), ("politics", 3, 4, 3))
    ]  # fmt: skip
    judged = {"chosen_by": "contrast", "judged_on": "other pairs"}
    precision = [
        {"domain": "violence", "depth": 1, **judged, "chosen": 8, "untested": 0.25, "confirmed": 0.5, "expected": 0.03},
        {"domain": "*", "depth": None, **judged, "chosen": 8, "untested": 0.25, "confirmed": 0.5, "expected": 0.03},
        {"domain": "*", "depth": None, "chosen_by": "labelled", "judged_on": "pairs", "chosen": 0, "untested": None, "confirmed": None, "expected": None},
    ]  # fmt: skip
    return {
        "fdr": 0.1, "control": "by", "saes": names, "pairs": 850, "strata": {}, "halves": {"first": ["a"], "second": ["b", "c"]},
        "tokens_known": True, "counts": counts, "precision": precision,
    }  # fmt: skip


def write_contrast(folder, reports):
    folder.mkdir()
    shared = ("hook_point", "architecture", "width", "l0_target", "tokens_trained", "l0", "fvu", "fvu_typical")
    curve = [
        {key: r[key] for key in shared}
        | {"sae": r["name"], "site": "", "depth": 1, "i_cdf": 0.01 * r["l0"], "i_cdf_reversed": 0, "i_cdf_shuffled": 0,
           "i_cdf_excess": 0, "i_cdf_excess_null": 0, "l0_at": {}, "p_best": 0.5}
        for r in reports
    ]  # fmt: skip
    (folder / "curve.json").write_text(json.dumps(curve))
    prediction = {
        "latents": 8, "c": 1e-4, "iterations": 5, "folds": [], "rows": 10,
        "detections": [
            {"sae": r["name"], "auroc": 0.75, "by_domain": {}, "by_head": {}, "by_source": {}} for r in reports
        ],
        "correlations": [
            {"target": "*", "scope": "suite", "predictor": "p_best", "saes": 6, "units": 3, "rho": 0.4,
             "interval": [0.1, 0.6], "over": {"-fvu_typical": [0.3, 0.1, 0.5], "l0": [0.1, -0.2, 0.3]}}
        ],
    }  # fmt: skip
    (folder / "prediction.json").write_text(json.dumps(prediction))


def guard(capsys, *arguments):
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    found = capsys.readouterr()
    return status, found.out, found.err


def options(runs, **changed):
    given = {"saes": runs / "suite", "texts": runs / "texts", "candidates": runs / "candidates.jsonl"} | changed
    return ["lab", "report", *(part for name, value in given.items() for part in (f"--{name}", value))]


@pytest.fixture(scope="module")
def made(runs):
    """The whole report, made once."""
    out = runs / "report"
    assert main([str(a) for a in options(runs, contrast=runs / "contrast", out=out)]) == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    return page, {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in (out / "data").iterdir()}


class Page(HTMLParser):
    """Every tag with its attributes, the text of each article, and what is drawn from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.articles, self._article = [], [], {}, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        if tag == "article":
            self._article = given["id"]

    def handle_endtag(self, tag):
        if tag == "article":
            self._article = ""

    def handle_data(self, data):
        if self._article:
            self.articles[self._article] = self.articles.get(self._article, "") + " " + data


def svgs(page):
    """Every plot of the page, each of which is well-formed XML."""
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    return [ET.fromstring(plot) for plot in found]  # noqa: S314 - a page that the test made


def test_every_block_stands_on_the_page_with_its_finding_caption_and_data(made):
    page, data = made
    parsed = Page(page)
    assert set(parsed.articles) == IDS
    assert set(data) == IDS | {"provenance"}
    for name in IDS:
        text = " ".join(parsed.articles[name].split())
        assert data[name]["id"] == name
        for part in ("title", "caption", "finding"):
            assert " ".join(data[name][part].split()) in text
        for what, count in data[name]["n"].items():
            assert f"{count:,} {what}" in text
        assert data[name]["rows"]
        assert ("a", {"href": f"data/{name}.json"}) in parsed.tags


def test_the_page_needs_nothing_from_elsewhere_and_is_well_formed(made):
    page, _ = made
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "img", "object"}
    links = [a[k] for _, a in parsed.tags for k in ("href", "src", "xlink:href") if a.get(k)]
    assert all(link.startswith(("#", "data/")) for link in links)
    assert "@import" not in page
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", page))
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(parsed.ids)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    plots = svgs(page)
    assert len(plots) >= 15
    for plot in plots:
        assert plot.get("role") == "img"
        assert plot.get("aria-label")
    assert "#010101" not in page  # stand-ins for the page's own colours
    assert "#020202" not in page


def test_names_from_files_are_text_and_never_markup(made):
    page, data = made
    assert EVIL in json.dumps(data["candidates"], ensure_ascii=False).replace('\\"', '"')
    assert "<script" not in page
    titles = [t.text for plot in svgs(page) for t in plot.iter() if t.tag.endswith("title")]
    assert f"{POINTS[0]} 1: {EVIL}" in titles
    assert f"{POINTS[0]} 0: violence: insult" in titles


def test_figures_of_the_page_are_those_of_the_data(made):
    page, data = made
    articles = Page(page).articles
    assert [row["fvu"] for row in data["suite"]["rows"]] == pytest.approx([0.4, 0.2] * 3)
    assert data["suite"]["finding"].startswith("The lowest FVU is 0.300 (model.layers.1.batch_topk.w48.l6, L0 6.5)")
    assert "90.0%" in articles["suite"]
    assert "not measured" in articles["suite"]
    counts = {(r["sae"], r["domain"], r["subdomain"]): r["candidates"] for r in data["candidates"]["rows"]}
    first = f"{POINTS[0]}.batch_topk.w48.l2"
    assert counts[first, "*", "*"] == 7
    assert counts[first, "violence", "*"] == counts[first, "violence", "insult"] == 3
    assert counts[first, "politics", "*"] == counts[first, "terror", "*"] == 1
    tags = tags_of(data, first)
    assert (tags["domains"], tags["surface"], tags["not_surface"], tags["surface_unknown"]) == (
        {"1": 6, "2": 1},
        3,
        2,
        2,
    )
    # Nothing was found in the last SAE: the mean of its output is over both that stand there.
    last = f"{POINTS[2]}.batch_topk.w48.l6"
    assert counts[last, "*", "*"] == tags_of(data, last)["candidates"] == 0
    assert cells(page, "candidates", "all") == ["7.0", "7.0", "3.5"]
    assert data["tags"]["finding"].startswith("5 of 35 candidates (14%) carry several domains")
    assert data["landscape"]["n"] == {"candidates": 21, "maps": 3}
    assert data["prediction"]["finding"] == (
        "The rank correlation of p_best with detection is 0.40 [0.10, 0.60] over the suite: "
        "ahead of FVU and not clearly apart from L0."
    )


def tags_of(data, sae):
    return {row["sae"]: row for row in data["tags"]["rows"]}[sae]


def cells(page, article, first):
    """The numbers of the article's row that begins with a word."""
    (part,) = re.findall(rf'<article id="{article}">.*?</article>', page, re.DOTALL)
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)]
    return next(row for row in found if row and row[0] == first)[1:]


def test_what_was_found_and_how_much_of_it_holds(made):
    page, data = made
    assert data["found"]["finding"] == "Most are found for violence at layer 1: 6 of 96 latents."
    assert "10% are false (BY, over latents)" in data["found"]["caption"]
    assert cells(page, "found", "violence") == ["1", "96", "6", "3", "2", "1", "1"]
    assert data["precision"]["finding"] == (
        "Of 8 tags that half of the pairs chose, on the other half, 50% are confirmed (3% by chance; 25% cannot be tested "
        "there)."
    )
    assert cells(page, "precision", "violence") == ["contrast", "other pairs", "1", "8", "25%", "50%", "3%"]
    assert cells(page, "precision", "all")[:4] == ["contrast", "other pairs", "all", "8"]


def test_what_the_sentences_show_is_counted_for_every_sae(made):
    _, data = made
    items = data["entities"]["rows"]
    assert [(r["kind"], r["lang"], r["items"]) for r in items[:3]] == [("entity", "en", 40), ("concept", "en", 30), ("entity", "zh", 30)]  # fmt: skip
    assert len(items) == 18
    for row in items:
        assert row["items_found"] == len(row["found"])
        assert row["latents"] == sum(len(own) for own in row["found"].values())
        assert row["cross"] <= row["cross_of"] <= row["items_found"]
    for row in data["languages"]["rows"]:
        assert 0 <= row["jaccard"] <= 1
        assert -1 <= row["cosine"] <= 1
    assert {r["language"] for r in data["language_candidates"]["rows"]} <= {"both", "en", "zh", "few"}
    both = [r for r in data["language_candidates"]["rows"] if r["domains"] == ["politics", "terror"]]
    assert {r["queries"] for r in both} == {15}
    names = data["names"]["rows"]
    assert len(names) == 120
    assert all(0 < r["top_probability"] <= 1 and r["tokens"] >= 1 for r in names)
    assert all((r["answer_probability"] is None) == (r["kind"] == "invented") for r in names)
    assert [r["latents"] >= len(r["best"]) for r in data["known"]["rows"]] == [True] * 6


def test_the_page_says_what_it_was_made_from_and_not_where_or_when(made, runs, model):
    page, data = made
    provenance = data["provenance"]
    assert (provenance["suite"], provenance["model"], provenance["saes"]) == ("suite", "tiny", 6)
    assert (provenance["candidates"], provenance["fdr"]) == (35, 0.1)
    assert provenance["model_fingerprint"] == weights.fingerprint(model)
    assert provenance["texts_digest"][:12] in page
    assert "35 at 10% false discovery" in page
    everything = page + json.dumps(data)
    assert str(runs) not in everything
    assert str(model) not in everything


def test_the_contrast_folder_may_be_left_out(runs, tmp_path, capsys):
    status, said, err = guard(capsys, *options(runs, out=tmp_path / "report"))
    assert status == 0, err
    assert said == f"{tmp_path}/report/index.html: written; its data is in {tmp_path}/report/data\n"
    found = {f.stem for f in (tmp_path / "report" / "data").iterdir()}
    assert found == IDS - {"curve", "prediction"} | {"provenance"}


def test_the_same_files_give_the_same_page(runs, tmp_path, made):
    assert main([str(a) for a in options(runs, contrast=runs / "contrast", out=tmp_path)]) == 0
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == made[0]


def changed_candidate(runs, tmp_path, **changed):
    line = json.loads((runs / "candidates.jsonl").read_text().splitlines()[0]) | changed
    file = tmp_path / "changed.jsonl"
    file.write_text(json.dumps(line) + "\n")
    shutil.copy(runs / "candidates.summary.json", tmp_path / "changed.summary.json")
    return file


def test_files_that_are_absent_or_do_not_go_together_are_named(runs, tmp_path, capsys):
    def error(**changed):
        status, _, err = guard(capsys, *options(runs, out=tmp_path / "report", **changed))
        assert status == 1
        assert not (tmp_path / "report").exists()
        return err

    absent = tmp_path / "absent"
    assert error(candidates=absent) == (
        f"guard: error: {absent}: found no such file; make one with `guard lab candidates`\n"
    )
    assert error(saes=absent) == (
        f"guard: error: {absent}: holds no report.json; train with `guard lab train` to its end\n"
    )
    assert error(contrast=absent) == (
        f"guard: error: {absent}: holds no curve.json; make one with `guard lab contrast`\n"
    )
    assert error(candidates=changed_candidate(runs, tmp_path, sae="other")) == (
        f"guard: error: {tmp_path}/changed.jsonl: sae: found 'other', expected one of {runs}/suite/report.json\n"
    )
    name = f"{POINTS[0]}.batch_topk.w48.l2"
    assert error(candidates=changed_candidate(runs, tmp_path, latent=48)) == (
        f"guard: error: {tmp_path}/changed.jsonl: latent: found 48 of {name}, which has 48\n"
    )
    assert error(candidates=changed_candidate(runs, tmp_path, latent="x")).startswith(
        f"guard: error: {tmp_path}/changed.jsonl:1: latent: Input should be a valid integer"
    )
    assert error(candidates=changed_candidate(runs, tmp_path, tags=[])).startswith(
        f"guard: error: {tmp_path}/changed.jsonl:1: tags: List should have at least 1 item"
    )
    (tmp_path / "changed.jsonl").write_text("")
    assert error(candidates=tmp_path / "changed.jsonl") == (
        f"guard: error: {tmp_path}/changed.jsonl: holds no candidate\n"
    )
    (tmp_path / "changed.summary.json").unlink()
    assert error(candidates=tmp_path / "changed.jsonl") == (
        f"guard: error: {tmp_path}/changed.summary.json: found no such file; make one with `guard lab candidates`\n"
    )
    other = made_up_summary(["other"])
    changed_candidate(runs, tmp_path)
    (tmp_path / "changed.summary.json").write_text(json.dumps(other))
    assert error(candidates=tmp_path / "changed.jsonl") == (
        f"guard: error: {tmp_path}/changed.jsonl: made from SAE other, expected one of {runs}/suite/report.json\n"
    )


def test_another_model_than_that_of_the_texts_is_refused(runs, model_folder, tmp_path, capsys):
    status, _, err = guard(capsys, *options(runs, out=tmp_path / "report", model=model_folder))
    assert status == 1
    assert err.endswith(
        f"guard: error: {model_folder}: not the model that {runs}/texts was harvested from; name that one with --model\n"
    )


def test_a_candidates_domains_are_given_the_surest_first():
    tags = [
        ("violence", "insult", 0.04),
        ("terror", "weapons", 0.01),
        ("terror", "*", 0.01),
    ]
    candidate = Candidate(
        hook_point="h", sae="s", latent=1, surface=None, why="", token=None, token_share=None, token_coverage=None,
        firing_rate=0, tags=[
            Tag(domain=d, subdomain=s, evidence="contrast", effect=0.1, p=0.001, q=0.02, latent_q=q) for d, s, q in tags
        ],
    )  # fmt: skip
    assert candidate.domains == ["terror", "violence"]
    assert candidate.subdomains == [("terror", "weapons"), ("violence", "insult")]


def test_layers_are_compared_by_the_configurations_that_all_of_them_have():
    def report(layer, architecture, width, site=""):
        point = f"model.layers.{layer}{site}"
        name = f"{point}.{architecture}.{width}"
        return SaeReport.model_validate(
            sae_report(name, point, 4) | {"name": name, "architecture": architecture, "width": width}
        )

    everywhere = [report(layer, "batch_topk", 48) for layer in (1, 3, 5)]
    middle = [report(3, "jumprelu", 48), report(3, "batch_topk", 96)]
    assert comparable(everywhere + middle) == {r.name for r in everywhere}
    # Sites are apart. Where nothing stands at every layer, the layers of what stands at the most are compared.
    patchy = [
        report(layer, "jumprelu", width, ".mlp") for layer, width in ((1, 48), (3, 48), (3, 96), (5, 96), (3, 24))
    ]
    assert comparable(everywhere + middle + patchy) == {r.name for r in [*everywhere, *patchy[:2]]}
