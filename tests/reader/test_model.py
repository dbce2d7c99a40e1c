"""The torch reader on the real model: what it hands out is what the whole model computes."""

import pytest
import torch

from guard.errors import ConfigError
from guard.reader.model import Stream, TorchReader, pick_dtype

POINTS = ("model.layers.0", "model.layers.3.mlp", "model.layers.5")


@pytest.fixture(scope="module")
def reader(model_folder):
    return TorchReader(model_folder, POINTS)


def test_only_the_layers_up_to_the_deepest_hook_point_are_kept(reader):
    assert reader.depth == 6
    assert len(reader._model.model.layers) == 6


def test_it_sees_the_hidden_states_of_the_whole_model(reader, model_folder):
    transformers = pytest.importorskip("transformers")
    whole = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = [0, 504, 2016, 314, 260, 3075, 28]
    with torch.inference_mode():
        states = whole.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    seen = reader.read([ids])[0]
    torch.testing.assert_close(seen["model.layers.0"], states[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["model.layers.5"], states[6][0], atol=1e-4, rtol=1e-4)


def test_a_text_reads_the_same_alone_in_a_batch_and_as_a_stream(reader):
    short, long = [0, 504, 2016], [0, *range(500, 560)]
    alone = [reader.read([short])[0], reader.read([long])[0]]
    together = reader.read([short, long])
    stream = Stream()
    steps = [reader.extend([(stream, part)])[0] for part in (long[:1], long[1:30], long[30:])]
    assert stream.length == len(long)
    for point in POINTS:
        torch.testing.assert_close(together[0][point], alone[0][point], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(together[1][point], alone[1][point], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(torch.cat([s[point] for s in steps]), alone[1][point], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("model.layers.99", r"hook point layer 99: the model has 30 layers"),
        ("model.layers.1.nothing", r"hook point 'model.layers.1.nothing': the model has no such module"),
    ],
)
def test_a_hook_point_that_the_model_lacks_is_named(model_folder, point, message):
    with pytest.raises(ConfigError, match=message):
        TorchReader(model_folder, [point])


def test_an_unknown_dtype_is_named():
    with pytest.raises(ConfigError, match="reader dtype: found 'int4', expected 'float32', 'bfloat16' or 'auto'"):
        pick_dtype("int4")


def test_streams_of_any_lengths_take_a_step_together(reader):
    texts = [[0, *range(500, 500 + length)] for length in (40, 3, 200)]
    streams = [reader.new_stream() for _ in texts]
    for stream, ids in zip(streams[:2], texts, strict=False):
        reader.extend([(stream, ids[:2])])
    together = reader.extend(list(zip(streams, (texts[0][2:], texts[1][2:], texts[2]), strict=True)))
    further = reader.extend([(stream, [600]) for stream in streams])
    for ids, seen, next_seen, begin in zip(texts, together, further, (2, 2, 0), strict=True):
        whole = reader.read([[*ids, 600]])[0]
        for point in POINTS:
            torch.testing.assert_close(seen[point], whole[point][begin:-1], atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(next_seen[point], whole[point][-1:], atol=1e-3, rtol=1e-4)


def test_a_fork_goes_its_own_way_and_leaves_the_other_as_it_was(reader):
    stream, ids = reader.new_stream(), [0, *range(500, 570)]
    reader.extend([(stream, ids)])
    fork = reader.new_stream()
    fork.take(stream, 30)
    turned = reader.extend([(fork, [900, 901])])[0]
    went_on = reader.extend([(stream, [700])])[0]
    for point in POINTS:
        torch.testing.assert_close(
            turned[point], reader.read([[*ids[:30], 900, 901]])[0][point][30:], atol=1e-3, rtol=1e-4
        )
        torch.testing.assert_close(went_on[point], reader.read([[*ids, 700]])[0][point][-1:], atol=1e-3, rtol=1e-4)
