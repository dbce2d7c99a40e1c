"""What the tap was not made for, found at start.

A server that says it is guarded and is not would be worse than none, so each of these ends the engine's start with a
message that says what to do.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guard.errors import ConfigError
from guard.pack.loader import Pack, check_model
from guard.reader import weights
from guard.records import ModelInfo
from guard.tap.vllm.settings import KEY, NOTED, TapSettings

TESTED = ("0.32.0",)
_DRAFTERS = ("ngram", "draft_model")

_RUNNER = (  # private to vLLM, so looked for by name
    "cache_config",
    "compilation_config",
    "execute_model",
    "execute_model_state",
    "get_model",
    "input_batch",
    "input_ids",
    "load_model",
    "max_model_len",
    "max_num_tokens",
    "model_config",
    "num_spec_tokens",
    "positions",
    "requests",
    "sample_tokens",
    "shutdown",
    "speculative_config",
    "use_aux_hidden_state_outputs",
    "_setup_eagle3_aux_hidden_state_outputs",
)
_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
_LAYER = re.compile(r"\blayers\.(\d+)(.*)")


def check_engine(config: Any, runner: object, version: str, settings: TapSettings) -> None:
    """`config` is vLLM's VllmConfig. Raises ConfigError for a version, a layout or a feature that cannot be served."""
    missing = [name for name in _RUNNER if not hasattr(runner, name)]
    if config.use_v2_model_runner:
        raise _refused("vLLM's model runner V2", "V1: start with VLLM_USE_V2_MODEL_RUNNER=0 in the environment")
    if missing:
        raise _refused(f"a {type(runner).__name__} without {', '.join(missing)}", f"that of vLLM {' or '.join(TESTED)}")
    if config.model_config.runner_type != "generate":
        raise _refused(f"a model that runs as {config.model_config.runner_type!r}", "one that generates text")
    if config.kv_transfer_config is not None:
        raise _refused(
            "a KV connector (kv_transfer_config)",
            "none: tokens whose keys and values come from elsewhere have no activations here",
        )
    if config.load_config.load_format == "dummy":
        raise _refused("load_format 'dummy'", "the model's own weights")
    if not settings.allow_untested:
        for found, expected in _untested(config, version):
            raise _refused(found, f"{expected}; additional_config.{KEY}.allow_untested = true runs it all the same")


def _untested(config: Any, version: str) -> list[tuple[str, str]]:
    """What was found and what was expected, of each thing that may work and was never tried."""
    parallel, found = config.parallel_config, list[tuple[str, str]]()
    if version.partition("+")[0] not in TESTED:
        found.append((f"vLLM {version}", f"a tested version ({', '.join(TESTED)})"))
    sizes = {name: getattr(parallel, name, 1) for name in _SIZES}
    found += [(f"{name} {size}", "1") for name, size in sizes.items() if size > 1]
    if config.model_config.quantization is not None:
        found.append((f"quantization {config.model_config.quantization!r}", "weights as they are in the folder"))
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTERS:
        found.append((f"speculation by {speculative.method!r}", " or ".join(_DRAFTERS)))
    if speculative is not None and config.scheduler_config.async_scheduling:
        found.append(("speculation together with asynchronous scheduling", "--no-async-scheduling"))
    return found


def aux_layers(names: Sequence[str], layers: int) -> tuple[int, ...] | None:
    """vLLM's auxiliary numbers of hook points: the output of layer k is the input of layer k + 1.

    None where they are not whole layers in their order: then there are no such numbers. Raises ConfigError for a layer
    that a model of so many `layers` has not.
    """
    numbers = []
    for name in names:
        match = _LAYER.search(name)
        if match is not None and int(match[1]) >= layers:
            raise _refused(f"hook point {name!r} in a model of {layers} layers", f"layers 0 to {layers - 1}")
        if match is not None and not match[2]:
            numbers.append(int(match[1]) + 1)
    return tuple(numbers) if len(numbers) == len(names) and numbers == sorted(set(numbers)) else None


def note_hook_points(config: Any, names: Sequence[str], pack_hash: str) -> None:
    """Writes the hook points into the configuration, and with it into the key of compiled graphs.

    What is read is part of a graph: a pack of other hook points in the same folder must not meet the old one.
    """
    own = config.additional_config[KEY]
    config.additional_config = {**config.additional_config, KEY: {**own, NOTED: [*names, pack_hash]}}


def check_served(pack: Pack, config: Any, settings: TapSettings) -> ModelInfo:
    """Whether the served weights are those that the pack was made for. Raises ConfigError and PackError."""
    width = config.model_config.get_hidden_size()
    if width != pack.manifest.model.d_model:
        raise _refused(f"a model of d_model {width}", f"{pack.manifest.model.d_model} (pack {pack.manifest.id})")
    return check_model(pack, weights.fingerprint(_folder(config.model_config)), settings.allow_unverified)


def _folder(model_config: Any) -> Path:
    """Where the served weights lie. Raises ConfigError where there are none to look at."""
    folder = Path(model_config.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
            raise _refused(f"model {model_config.model!r} ({error})", "a local folder, to check its weights") from None
    if not (folder / "tokenizer.json").is_file() or not list(folder.glob("*.safetensors")):
        raise _refused(f"model folder {folder}", "one with tokenizer.json and *.safetensors, to check its weights")
    return folder


def _refused(found: str, expected: str) -> ConfigError:
    return ConfigError(f"guard's vLLM tap: found {found}, expected {expected}")
