"""Settings that do not fit the model or each other are refused when it loads, and named."""

import shutil

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from guard.errors import ConfigError


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    """A model of another width, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 23, "vocab_size": 49_152}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
    shutil.copy(model_folder / "tokenizer.json", folder)
    return folder


def refused(loading, **sections):
    with pytest.raises(ConfigError) as caught, loading(**sections):
        pass
    return str(caught.value)


def test_an_overlap_of_more_than_half_a_window(loading):
    message = refused(loading, reader={"window": 128, "overlap": 65})
    assert message == "reader.overlap: found 65, expected at most 64, half of reader.window"


def test_a_window_of_more_than_the_models_positions(loading):
    message = refused(loading, reader={"window": 8193})
    assert message == "reader.window: found 8193, expected at most 8192, the model's positions"


def test_a_model_of_another_width(loading, tiny):
    message = refused(loading, reader={"model": str(tiny), "allow_unverified": True})
    assert message.startswith(f"reader.model '{tiny}': found d_model 64, expected 576 (pack ")
