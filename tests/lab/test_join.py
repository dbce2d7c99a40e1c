"""Suites side by side: every latent says what it said, under its new number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from guard.cli.main import main
from guard.lab.explain.gather import gather
from guard.lab.stages import statistics
from guard.lab.suite.measure import SaeReport, read_reports, write_reports
from guard.lab.suite.sae import load_suite, save_rows

WIDTHS = {"first": {"h.1": 8, "h.2": 6}, "second": {"h.2": 5}}
KEPT = [1, 4]


def make(folder: Path, widths: dict[str, int], seed: int) -> Path:
    made = torch.Generator().manual_seed(seed)
    reports = []
    for point, width in widths.items():
        name = f"{point}.w{width}"
        given = {"enc_rows": torch.randn(2, 3, generator=made), "bias": torch.zeros(2), "threshold": torch.ones(2) / 2}
        save_rows(folder / name, width, torch.tensor(KEPT), **given)
        values = {key: np.arange(width) + 10.0 * seed for key in ("firing_rate", "scale", "0.5")}
        np.savez(folder / name / "stats.npz", **values)
        figures = {"fvu": seed / 10, "fvu_typical": seed / 10, "outlier_share": 0, "l0": seed, "dead_share": 0}
        told = {"architecture": "batch_topk", "width": width, "l0_target": seed, "tokens_trained": 100, "threshold": 1}
        reports.append(SaeReport(name=name, hook_point=point, **told, **figures))
    (folder / "suite.toml").write_text(f"seed = {seed}\n")
    write_reports(folder, reports)
    lines = [(r.name, f"{r.hook_point}/{n}") for r in reports for n in KEPT]
    with (folder / "explanations.jsonl").open("w") as said, (folder / "scores.jsonl").open("w") as scores:
        for sae, latent in lines:
            one = {"explanation": f"{seed} {latent}", "domains": [], "subdomains": [], "confidence": 1}
            one |= {"surface_form": False, "annotator": "a", "prompt": "explain-1"}
            said.write(json.dumps({"latent": latent, "sae": sae} | one) + "\n")
            scored = {"scores": {"simulation_segment": 0.5}, "items": 1, "firing": 1}
            scores.write(json.dumps({"latent": latent, "sae": sae} | scored) + "\n")
    return folder


@pytest.fixture
def parts(tmp_path):
    return [make(tmp_path / name, widths, seed) for seed, (name, widths) in enumerate(WIDTHS.items(), 1)]


def run(parts, out):
    return main(["lab", "join", *(str(flag) for folder in parts for flag in ("--saes", folder)), "--out", str(out)])


def test_latents_say_what_they_said_behind_those_of_the_suites_before(parts, tmp_path, capsys):
    out = tmp_path / "joined"
    assert run(parts, out) == 0
    assert "6 latents" in capsys.readouterr().out
    alone, both = load_suite(out)
    first, second = load_suite(parts[0]), load_suite(parts[1])
    assert (alone.width, both.width) == (8, 11)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(9)) * 2
    torch.testing.assert_close(alone.encode(x), first[0].encode(x))
    torch.testing.assert_close(both.encode(x), torch.cat([first[1].encode(x), second[0].encode(x)], dim=1))
    assert both.encode(x).any()
    assert statistics(both, out).scale.tolist() == [*(np.arange(6) + 10.0), *(np.arange(5) + 20.0)]


def test_explanations_and_scores_come_along(parts, tmp_path):
    assert run(parts, tmp_path / "joined") == 0
    found, dropped = gather(tmp_path / "joined", [tmp_path / "joined"], 0.2)
    assert dropped == 0
    assert [(one.latent, one.explanation) for one in found if one.sae == "h.2.joined.w11"] == [
        (1, "1 h.2/1"), (4, "1 h.2/4"), (7, "2 h.2/1"), (10, "2 h.2/4")
    ]  # fmt: skip


def test_the_report_adds_up_and_keeps_each_parts_own(parts, tmp_path):
    assert run(parts, tmp_path / "joined") == 0
    _, both = read_reports(tmp_path / "joined")
    assert (both.width, both.l0, both.l0_target, both.tokens_trained) == (11, 3, 3, 200)
    assert both.fvu_typical == 0.1  # what the better one leaves
    assert [part.name for part in both.parts] == ["h.2.w6", "h.2.w5"]


def test_what_is_read_and_what_was_trained_is_not_written_over(parts, tmp_path, capsys):
    def refused(status, message):
        assert status == 1
        assert message in capsys.readouterr().err.replace("\n", " ")

    before = {file: file.read_bytes() for part in parts for file in part.rglob("*") if file.is_file()}
    refused(run(parts, parts[0]), "first: is read and would be written to; give another folder as --out")
    refused(run([parts[0], parts[0]], tmp_path / "joined"), "--saes: found a folder twice, expected each once")
    narrow = ["lab", "narrow", "--saes", str(parts[0]), "--explained", str(parts[0]), "--scores", str(parts[0])]
    refused(main([*narrow, "--out", str(parts[0])]), "first: is read and would be written to")
    assert {file: file.read_bytes() for part in parts for file in part.rglob("*") if file.is_file()} == before

    trained = tmp_path / "trained" / "h.1.w8"
    trained.mkdir(parents=True)
    save_file({"W_enc": torch.zeros(3, 8)}, trained / "sae_weights.safetensors")
    refused(run(parts, tmp_path / "trained"), "holds the whole SAE h.1.w8; give another folder as --out")
    assert run(parts, tmp_path / "joined") == 0
    assert run(parts, tmp_path / "joined") == 0  # what it wrote itself it may replace


def test_a_latent_that_the_suite_does_not_hold_is_not_kept(parts, tmp_path, capsys):
    for latent in (2, 99, -1):  # silent, beyond the width, and no number of a latent
        file = tmp_path / "latents.jsonl"
        file.write_text(json.dumps({"hook_point": "h.1", "sae": "h.1.w8", "latent": latent}) + "\n")
        out = ["--latents", str(file), "--out", str(tmp_path / "kept")]
        assert main(["lab", "narrow", "--saes", str(parts[0]), *out]) == 1
        assert f"h.1.w8: found latent {latent} to keep, expected one that can fire" in capsys.readouterr().err


def test_a_suite_without_statistics_is_refused(parts, tmp_path, capsys):
    (parts[1] / "h.2.w5" / "stats.npz").unlink()
    assert run(parts, tmp_path / "joined") == 1
    assert "h.2.w5/stats.npz: absent; run `guard lab fit --only-choose` with --activations first" in (
        capsys.readouterr().err.replace("\n", " ")
    )
