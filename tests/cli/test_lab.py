"""`guard lab`: the flags' defaults are those of the functions, and the flags reach them."""

import gzip
import inspect
import io

import pytest
from rich.console import Console

from guard.cli import lab, lab_stages, lab_tables
from guard.cli.options import UsageError
from guard.lab.heads.evaluate import Figure
from guard.lab.search.contrast import ConceptContrast
from guard.records import HeadKind


def defaults(command):
    return {
        k: p.default
        for k, p in inspect.signature(command).parameters.items()
        if p.default is not inspect.Parameter.empty
    }


def test_defaults_of_harvest():
    from guard.lab.harvest import harvest
    from guard.reader.weights import DEFAULT_MODEL

    known = {k: v for k, v in defaults(harvest).items() if k != "shares"}  # the command takes them one by one
    assert {k: v for k, v in defaults(lab.harvest).items() if k in known} == {
        k: v for k, v in known.items() if k != "progress"
    }
    assert defaults(lab.harvest)["model"] == DEFAULT_MODEL


def test_fit_offers_every_field_of_its_configuration():
    from dataclasses import fields

    from guard.lab.heads.fit import FitConfig

    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in defaults(lab_stages.fit).items()
    }
    fields_of = {field.name: field.default for field in fields(FitConfig)}
    del fields_of["sources"]  # --permissive and --manifests name them
    apart = {
        "activations": None,
        "permissive": False,
        "explained": None,
        "scores": None,
        "manifests": None,
        "only_choose": False,
    }
    assert {k: v for k, v in given.items() if k not in apart} == fields_of


def test_contrasts_are_shown_by_sub_domain_with_the_best_latents():
    def contrast(domain, subdomain):
        return ConceptContrast(
            hook_point="model.layers.9",
            domain=domain,
            subdomain=subdomain,
            pairs=50,
            i_cdf=0.0012345,
            l0_at={"0.1": 17, "0.5": 2},
            best_latents=[41, 7, 9, 1],
            best_p=[0.9, 0.52, 0.1, 0.0],
        )

    shown = text_of(lab_tables.contrast_table("model.layers.9", [contrast("*", "*"), contrast("violence", "insult")]))
    assert shown[0] == "model.layers.9"
    assert shown[1].split() == ["sub-domain", "pairs", "I_CDF", "L0>0.1", "L0>0.5", "best", "latents"]
    assert shown[2].split("  ")[0] == "all"
    assert shown[3].split() == [
        "violence/insult", "50", "0.00123", "17", "2", "41", "(0.90),", "7", "(0.52),", "9", "(0.10)"
    ]  # fmt: skip


def test_figures_are_shown_in_four_columns_with_each_head_s_mean():
    def figure(source, auroc, weak):
        columns = ("tfidf", "probe", "latents", "combined")
        return Figure(
            domain="violence",
            head=HeadKind.HARM,
            source=source,
            lang="en",
            positives=40,
            negatives=200,
            weak_negatives=weak,
            auroc=dict(zip(columns, auroc, strict=True)),
            auroc_interval=dict.fromkeys(columns, (0.0, 1.0)),
            lead_interval=dict.fromkeys(columns[:3], (0.0, 0.0)),
            auprc=dict.fromkeys(columns, 0.5),
            tpr_at_1_fpr=dict.fromkeys(columns, 0.5),
        )

    shown = text_of(
        lab_tables.figures_table(
            [figure("a", (0.7, 0.8, 0.85, 0.9), weak=False), figure("b", (0.5, 0.6, 0.65, 0.8), weak=True)]
        )
    )
    assert shown[1].split() == ["head", "source", "positives", "negatives", "tfidf", "probe", "latents", "combined"]
    assert shown[2].split() == ["violence.harm", "a", "40", "200", "0.700", "0.800", "0.850", "0.900"]
    assert shown[3].split() == [
        "violence.harm", "b", "(weak", "negatives)", "40", "200", "0.500", "0.600", "0.650", "0.800"
    ]  # fmt: skip
    assert shown[4].split() == ["violence.harm", "mean", "0.600", "0.700", "0.750", "0.850"]


def text_of(table):
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_a_corpus_is_files_and_folders_of_them(tmp_path):
    for name in ("b.txt", "a.txt.gz", "notes.md"):
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert lab.corpus_files([tmp_path]) == [tmp_path / "a.txt.gz", tmp_path / "b.txt"]
    assert lab.corpus_files([tmp_path / "notes.md"]) == [tmp_path / "notes.md"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: found no \.txt or \.txt\.gz file in this folder"):
        lab.corpus_files([tmp_path / "empty"])
