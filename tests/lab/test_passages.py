"""The lab pools passages as the product does: what thresholds are calibrated on is what is scored."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guard.errors import InvalidInput
from guard.kernels.contract import rms_normalised
from guard.lab import shards
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import Design, FitConfig, Linear
from guard.lab.heads.passages import Passages, pool_passages
from guard.lab.labelled import Row
from guard.pack.manifest import PoolingSection
from guard.scoring.phase import PhaseState
from guard.scoring.pooling import Gate, Hits, Pool
from tests.lab.given import POINTS, synthetic_shards
from tests.lab.test_features import an_sae

LENGTHS = [3, 16, 17, 24, 30, 47, 9, 110]  # tokens of the texts of both shards
SIZE = 16


@pytest.fixture
def texts(tmp_path):
    synthetic_shards(tmp_path, count=2)
    for index, lengths in enumerate((LENGTHS[:4], LENGTHS[4:])):
        shard = {name: x[: sum(lengths)] for name, x in shards.load(tmp_path, index).items()}
        first = 4 * index
        piece = torch.repeat_interleave(torch.arange(first, first + 4), torch.tensor(lengths))
        shards.write(tmp_path, index, shard | {"piece": piece.int()})
    return tmp_path


def as_scored(texts, sae, scale, rows, text):
    """Passages of one text as `guard.scoring` makes them: first token, tokens, sums and directions."""
    shard = shards.load(texts, text // 4)
    x = shard[sae.hook_point][shard["piece"] == text].float()
    acts = sae.encode(x)[:, rows]
    token, row = (part.numpy() for part in acts.nonzero(as_tuple=True))
    hits = Hits(token, row, acts[token, row].double().numpy(), rms_normalised(x).double().numpy())
    gate = Gate(sae.threshold[rows].double().numpy(), scale[rows].astype(np.float64))
    seen = {}

    def logits(pools):
        seen.update({(pool.begin, pool.tokens): pool for pool in pools if pool.tokens <= SIZE})
        return np.zeros((len(pools), 1))

    pooling = PoolingSection(exponent=1.0)
    state = PhaseState(lambda begin: Pool.empty(gate, x.shape[1], pooling, begin), SIZE, np.zeros(1), logits)
    state.add(hits, np.zeros((len(x), 3), dtype=np.int64))
    state.severest()
    return [seen[key] for key in sorted(seen)] if len(x) > SIZE else []


def test_passages_are_those_that_are_scored(texts):
    suite = [an_sae(point) for point in POINTS]
    scales = [np.full(sae.width, 2.0, dtype=np.float32) for sae in suite]
    rows = [np.array([1, 4, 7]), np.array([0, 2, 3, 20])]
    found = pool_passages(suite, scales, rows, texts, SIZE)
    assert found.tokens.max() == SIZE
    assert set(found.text) == {i for i, length in enumerate(LENGTHS) if length > SIZE}
    for text in set(found.text):
        mine = found.text == text
        column, direction = 0, 0
        for sae, scale, some in zip(suite, scales, rows, strict=True):
            expected = as_scored(texts, sae, scale, some, int(text))
            assert found.tokens[mine].tolist() == [pool.tokens for pool in expected]
            strength = np.stack([pool.sums / pool.tokens for pool in expected])
            mean = np.stack([pool.probe_sums / pool.tokens for pool in expected])
            assert found.strength[mine, column : column + len(some)] == pytest.approx(strength, abs=1e-5)
            assert found.mean[mine, direction : direction + mean.shape[1]] == pytest.approx(mean, abs=1e-4)
            column, direction = column + len(some), direction + mean.shape[1]


def test_a_text_is_told_by_the_severest_of_its_passages_each_held_back_as_one_of_many():
    texts = SimpleNamespace(passage_text=np.array([0, 0, 2, 3, 3, 3, 3]), config=FitConfig(passage_caution=0.5))
    whole = np.array([1.0, 5.0, np.nan, 2.0])
    told = Design.severest(texts, whole, np.array([1.2, 4.0, np.nan, 2.1, 1.0, 2.2, 0.0]))
    assert told == pytest.approx([4.0 - 0.5 * np.log(2), 5.0, np.nan, 2.0], nan_ok=True)
    with pytest.raises(InvalidInput, match="found logits of 0 passages, expected 7"):
        Design.severest(texts, whole, np.zeros(0))


def test_a_heads_passages_are_read_as_its_wholes_are(texts):
    """A passage that is as long as its text would be has the logit of the text."""
    suite = [an_sae(point) for point in POINTS]
    scales = [np.full(sae.width, 2.0, dtype=np.float32) for sae in suite]
    rows = [np.array([1, 4, 7]), np.array([0, 2, 3, 20])]
    found = pool_passages(suite, scales, rows, texts, SIZE)
    allowed = np.zeros(2 * suite[0].width, dtype=bool)
    allowed[[1, 4, 7, 24, 26, 27, 44]] = True
    strength = found.strength.copy()
    row = {"text": "", "lang": "en", "source": "a", "label_domains": (), "scope": (), "kind": "benign"}
    made_up = [Row(id=str(i), **row) for i in range(len(found.text))]
    itself = replace(found, text=np.arange(len(found.text)), strength=found.strength.copy())
    config = FitConfig(prior_tokens=8)
    design = Design(made_up, PooledTexts(found.tokens, found.mean, strength), config, allowed, itself)
    rng = np.random.default_rng(0)
    chosen = np.array([4, 24, 44])
    head = Linear(chosen, rng.normal(size=3), rng.normal(size=design.dense.shape[1]), 0.5)
    some = np.array([0, 3, 5])
    passages = head.passage_logits(design, some)
    assert passages[some] == pytest.approx(head.logits(design, some), abs=1e-5)
    assert np.isnan(np.delete(passages, some)).all()


def test_no_text_is_longer_than_a_passage(texts):
    suite = [an_sae(point) for point in POINTS]
    scales = [np.full(sae.width, 2.0, dtype=np.float32) for sae in suite]
    none = pool_passages(suite, scales, [np.array([1]), np.array([2, 3])], texts, 128)
    some = pool_passages(suite, scales, [np.array([1]), np.array([2, 3])], texts, SIZE)
    assert len(none.text) == 0
    assert len(Passages.joined([none, some]).text) == len(some.text)
    assert Passages.joined([none, none]).strength.shape == (0, 3)
