"""What a doubling changed, between folders that `guard lab contrast --detect` wrote."""

import json

import pytest

from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab.search.compare import compare
from guard.lab.search.detect import Detection, Prediction
from tests.lab.given import point


def write(folder, points, *, latents=128):
    """The AUROC of an SAE is 0.5 more than its I_CDF."""
    folder.mkdir()
    prediction = Prediction(
        latents=latents,
        c=1e-3,
        iterations=9,
        folds=[["left"]],
        rows=7,
        detections=[Detection(sae=p.sae, auroc=0.5 + p.i_cdf, by_domain={}, by_head={}, by_source={}) for p in points],
        correlations=[],
    )
    (folder / "prediction.json").write_text(prediction.model_dump_json())
    (folder / "curve.json").write_text(json.dumps([p.model_dump() for p in points]))
    return folder


def test_pairs_are_alike_but_for_one_doubling(tmp_path):
    once = write(
        tmp_path / "once",
        [
            point(1, 8, 0.10),
            point(1, 8, 0.12, width=128),  # twice as wide
            point(1, 8, 0.13, width=256),  # twice that, and four times the first
            point(1, 16, 0.2, width=128),  # another L0
            point(3, 8, 0.2, width=128),  # another hook point
        ],
    )
    further = write(
        tmp_path / "further",
        [point(1, 8, 0.16, tokens_trained=2010, fvu_typical=0.1, p_best=0.16), point(3, 8, 0.3)],
    )
    found = compare([once, further])
    assert [(d.doubled, d.before, d.width, d.tokens_trained) for d in found.doublings] == [
        ("tokens", "model.layers.1.batch_topk.w64.l8", (64, 64), (1000, 2010)),
        ("width", "model.layers.1.batch_topk.w64.l8", (64, 128), (1000, 1000)),
        ("width", "model.layers.1.batch_topk.w128.l8", (128, 256), (1000, 1000)),
        ("width", "model.layers.3.batch_topk.w64.l8", (64, 128), (1000, 1000)),
    ]
    change = {name: m.change for name, m in found.doublings[0].measures.items()}
    assert change == pytest.approx({"fvu_typical": 0.1 - 1 / 8, "i_cdf": 0.06, "p_best": 0.06, "auroc": 0.06})
    assert [(m.doubled, m.pairs) for m in found.means] == [("tokens", 1), ("width", 3)]
    assert found.means[1].change["i_cdf"] == pytest.approx((0.02 + 0.01 - 0.1) / 3)


def test_the_command_shows_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    once = write(tmp_path / "once", [point(1, 8, 0.10)])
    further = write(tmp_path / "further", [point(1, 8, 0.12, tokens_trained=2000)])
    out = tmp_path / "new" / "doublings.json"
    assert main(["lab", "compare", "--contrast", str(once), "--contrast", str(further), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    line = next(text for text in shown.splitlines() if text.startswith("model"))
    assert line.split() == [
        "model.layers.1.batch_topk.w64.l8", "tokens", "1,000", "2,000", "0.125", "(+0.000)", "0.12000", "(+0.02000)",
        "0.120", "(+0.020)", "0.620", "(+0.020)",
    ]  # fmt: skip
    assert json.loads(out.read_text())["means"][0]["pairs"] == 1
    assert shown.endswith("doublings.json: 1 pairs of SAEs\n")


def test_what_cannot_be_compared_is_refused(tmp_path):
    once = write(tmp_path / "once", [point(1, 8, 0.1)])
    other = write(tmp_path / "other", [point(1, 8, 0.1, tokens_trained=2000)], latents=9)
    again = write(tmp_path / "again", [point(1, 8, 0.1)])
    with pytest.raises(InvalidInput) as caught:
        compare([once, other])
    assert str(caught.value) == f"{other}: judged by another latents than {once}; make one again"
    with pytest.raises(InvalidInput) as caught:
        compare([once, again])
    assert str(caught.value) == (
        f"{again}: holds model.layers.1.batch_topk.w64.l8, trained on 1,000 tokens, as {once} does"
    )
    with pytest.raises(InvalidInput, match="found no two SAEs of one hook point, architecture and L0"):
        compare([once])
    (once / "prediction.json").unlink()
    with pytest.raises(InvalidInput) as caught:
        compare([once])
    assert str(caught.value) == f"{once}: holds no prediction.json; make one with `guard lab contrast --detect`"
