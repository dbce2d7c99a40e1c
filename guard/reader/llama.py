"""A llama-like model's folder: what its config says of its layers, and their weights by name."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from guard.errors import ConfigError, WeightsError

Floats = NDArray[np.float32]

_POINT = re.compile(r"model\.layers\.(\d+)(\.mlp|\.mlp\.down_proj|\.self_attn|\.self_attn\.o_proj)?")


@dataclass(frozen=True)
class Shape:
    """What a llama model's config says of its layers."""

    d_model: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    epsilon: float
    theta: float
    positions: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def read_shape(config: Mapping[str, Any], folder: Path) -> Shape:
    """Raises WeightsError for a model that is no plain llama: it names the key, what was found and what is expected."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = {
        "model_type": (config.get("model_type"), "llama"),
        "hidden_act": (config.get("hidden_act"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for key, (found, expected) in plain.items():
        if found != expected:
            raise WeightsError(f"{folder / 'config.json'}: {key}: found {found!r}, expected {expected!r} to export")
    try:
        heads = int(config["num_attention_heads"])
        return Shape(
            d_model=int(config["hidden_size"]),
            depth=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            width=int(config["intermediate_size"]),
            epsilon=float(config["rms_norm_eps"]),
            theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
            positions=int(config["max_position_embeddings"]),
        )
    except KeyError as error:
        raise WeightsError(f"{folder / 'config.json'}: {error.args[0]}: found nothing, expected a number") from None


def depth_of(points: Sequence[str], shape: Shape) -> int:
    """Layers that `points` need. Raises ConfigError for a point that the graph does not hand out."""
    layers = []
    for point in points:
        match = _POINT.fullmatch(point)
        if match is None:
            raise ConfigError(
                f"hook point {point!r}: expected model.layers.N, or its .mlp or .self_attn: an exported reader hands "
                f"out no other"
            )
        layers.append(int(match[1]))
        if layers[-1] >= shape.depth:
            raise ConfigError(f"hook point layer {layers[-1]}: the model has {shape.depth} layers")
    return max(layers) + 1


class Tensors:
    """The folder's weights by name, as float32, whichever file holds them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "numpy") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def __call__(self, name: str) -> Floats:
        """Raises WeightsError for a tensor that is absent, or of a dtype that numpy does not have."""
        if name not in self._files:
            raise WeightsError(f"{self._folder}: missing tensors: {name}")
        with safe_open(self._files[name], "numpy") as opened:
            dtype = opened.get_slice(name).get_dtype()
            if dtype == "BF16":
                return _from_bfloat16(self._files[name], name)
            return np.asarray(opened.get_tensor(name), dtype=np.float32)


def _from_bfloat16(file: Path, name: str) -> Floats:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        told = json.loads(stream.read(size))[name]
        begin, end = told["data_offsets"]
        stream.seek(8 + size + begin)
        halves = np.frombuffer(stream.read(end - begin), dtype="<u2").astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(told["shape"])


@dataclass(frozen=True)
class Layer:
    """One layer's weights; products are `x [T, in] @ weight [in, out]`."""

    input_norm: Floats
    output_norm: Floats
    qkv: Floats
    o: Floats
    gate: Floats
    up: Floats
    down: Floats


def read_layer(tensors: Tensors, number: int) -> Layer:
    def get(name: str) -> Floats:
        return tensors(f"model.layers.{number}.{name}.weight")

    return Layer(
        input_norm=get("input_layernorm"),
        output_norm=get("post_attention_layernorm"),
        qkv=np.concatenate([get(f"self_attn.{part}_proj") for part in "qkv"]).T,
        o=get("self_attn.o_proj").T,
        gate=get("mlp.gate_proj").T,
        up=get("mlp.up_proj").T,
        down=get("mlp.down_proj").T,
    )
