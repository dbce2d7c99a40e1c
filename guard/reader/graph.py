"""A llama-like decoder as an ONNX graph, written node by node from its weights, for onnxruntime's fused operators.

Attention is onnxruntime's GroupQueryAttention, which turns queries and keys by their positions and keeps the cache;
residual sums and the norms behind them are one operator too. The graph ends at the deepest hook point.

int8 products multiply unsigned activations by signed weights: weights have a scale for each output, activations one for
each token. No scale depends on what else is read, so a text reads the same alone, in a batch and as a stream. What a
token's outlier channels would cost the others is handed over beforehand, as in SmoothQuant (Xiao et al., 2022, arXiv
2211.10438): each input channel is divided by a factor that its weights are multiplied by. The factors balance root mean
squares, not the largest values. The division is folded into whatever writes that channel, so it costs nothing. What is
still uneven is spread: blocks of channels are multiplied by a Hadamard matrix and the weights by its inverse, as in
QuaRot (Ashkboos et al., 2024, arXiv 2404.00456), so that one large value becomes many small ones, in the weights too.
That of `o` is folded into the values; the others are small float32 products, 5% of a llama's FLOPs at 135M and less in
a larger one. How weights are then rounded: `rounding`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from guard.reader import rounding
from guard.reader.llama import Floats, Layer, Shape, depth_of

_CONTRIB = "com.microsoft"
_ZERO = 128  # activations are unsigned
_TURNED = 64  # channels that are turned together, at most
PRODUCTS = ("qkv", "o", "gate_up", "down")


Moments = Mapping[str, Floats]  # product -> mean of `x x^T [in, in]` of the inputs that were seen


def smoothed(layer: Layer, moments: Moments, shape: Shape, strength: float) -> tuple[Layer, Moments]:
    """The same function, with activations of less spread, and inputs of `o` turned; and the moments of those inputs.

    `strength` is SmoothQuant's alpha: at .5 a channel's activations and weights get the same size in the mean square.
    An input channel of `o` is written by a value head that several query heads share, so they share its factor.
    """
    sizes = {product: np.diag(of) for product, of in moments.items()}
    after_input = _factors(sizes["qkv"], layer.qkv, strength)
    after_output = _factors(sizes["gate_up"], np.concatenate([layer.gate, layer.up], axis=1), strength)
    after_up = _factors(sizes["down"], layer.down, strength)
    grouped = (shape.kv_heads, shape.group, shape.head_dim)
    of_values = _factors(
        sizes["o"].reshape(grouped).mean(axis=1).ravel(),
        layer.o.reshape(*grouped, -1).transpose(0, 2, 1, 3).reshape(shape.kv_heads * shape.head_dim, -1),
        strength,
    )  # [kv_heads * head_dim]
    shared = np.repeat(of_values.reshape(shape.kv_heads, 1, shape.head_dim), shape.group, axis=1).ravel()
    qkv = layer.qkv * after_input[:, None]
    turn = hadamard(shape.head_dim)
    qkv[:, -len(of_values) :] = turn_inputs((qkv[:, -len(of_values) :] / of_values).T, turn).T
    factors = {"qkv": after_input, "o": shared, "gate_up": after_output, "down": after_up}
    left: dict[str, Floats] = {p: of / factors[p][:, None] / factors[p] for p, of in moments.items()}
    left["o"] = turn_moments(left["o"], turn)
    made = Layer(
        input_norm=layer.input_norm / after_input,
        output_norm=layer.output_norm / after_output,
        qkv=qkv,
        o=turn_inputs(layer.o * shared[:, None], turn),
        gate=layer.gate * after_output[:, None],
        up=layer.up * after_output[:, None] / after_up,
        down=layer.down * after_up[:, None],
    )
    return made, left


def _factors(squares: Floats, weight: Floats, strength: float) -> Floats:
    """What each channel's activations are divided by and its weights multiplied by, about 1 in the mean.

    Root mean squares, not the largest values: behind a turn they say more of what is rounded off.
    """
    of_weights = (weight**2).mean(axis=1)  # [in]
    wanted = (np.maximum(squares, 1e-16) ** strength / np.maximum(of_weights, 1e-16) ** (1 - strength)) ** 0.5
    wanted = np.clip(wanted, 1e-5, 1e5)
    return np.asarray(wanted / np.exp(np.log(wanted).mean()), dtype=np.float32)


def hadamard(channels: int) -> Floats:
    """Sylvester's matrix, its own inverse: `[n, n]`, n the largest power of 2 in `channels`, at most 64."""
    size = math.gcd(channels, _TURNED)
    turn = np.ones((1, 1))
    while len(turn) < size:
        turn = np.block([[turn, turn], [turn, -turn]])
    return np.asarray(turn / math.sqrt(size), dtype=np.float32)


def turn_inputs(weight: Floats, turn: Floats) -> Floats:
    """`weight [in, out]` for inputs whose blocks were multiplied by `turn`, which is its own inverse."""
    blocks = weight.reshape(-1, len(turn), weight.shape[1])  # [in / n, n, out]
    return np.ascontiguousarray((turn @ blocks).reshape(weight.shape))


def turn_moments(moments: Floats, turn: Floats) -> Floats:
    """`moments [in, in]` of inputs whose blocks were multiplied by `turn`."""
    return turn_inputs(turn_inputs(moments, turn).T, turn)


@dataclass(frozen=True)
class Plan:
    """How the products of each layer are taken: in float32, or in int8 where the moments of their inputs are given."""

    int8: Mapping[tuple[int, str], Floats] = field(default_factory=dict)  # layer and product -> `[in, in]`
    half_embedding: bool = False


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, values: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def product(self, x: str, weights: Mapping[str, Floats], moments: Floats | None, *, turn: bool = True) -> list[str]:
        """`x` times each of `weights`; they share what is done to `x`. `turn` unless both are turned before."""
        if moments is None:
            return [self.add("MatMul", [x, self.weight(f"{n}.weight", w)], [n]) for n, w in weights.items()]
        first = next(iter(weights))
        if turn:
            x, weights, moments = self._turned(first, x, weights, moments)
        axes = self.weight(f"{first}.axes", np.array([-1]))
        absolute = self.add("Abs", [x], [f"{first}.abs"])
        largest = self.add("ReduceMax", [absolute, axes], [f"{first}.largest"], keepdims=1)
        least = self.weight(f"{first}.least", np.array([1e-20], dtype=np.float32))  # of a token that is all zeros
        size = self.add("Max", [largest, least], [f"{first}.size"])  # [B, T, 1]
        level = self.add("Div", [x, size], [f"{first}.level"])  # from -1 to 1
        scale = self.weight(f"{first}.scale", np.array(1 / rounding.INT8_MAX, dtype=np.float32))
        zero = self.weight(f"{first}.zero", np.array(_ZERO, dtype=np.uint8))
        quantised = self.add("QuantizeLinear", [level, scale, zero], [f"{first}.quantised"])
        whole = rounding.rounded(np.concatenate(list(weights.values()), axis=1), moments)
        parts = np.split(whole, np.cumsum([weight.shape[1] for weight in weights.values()])[:-1], axis=1)
        given = (quantised, scale, zero)
        return [
            self._int8(name, part, rounding.scales(weight), given, size)
            for (name, weight), part in zip(weights.items(), parts, strict=True)
        ]

    def _turned(
        self, first: str, x: str, weights: Mapping[str, Floats], moments: Floats
    ) -> tuple[str, Mapping[str, Floats], Floats]:
        """`x` with the channels of each block turned into sums of them, weights that undo it, and its moments."""
        channels = len(weights[first])
        turn = hadamard(channels)  # [block, block]
        size = len(turn)
        apart = self.weight(f"{first}.apart", np.array([0, 0, channels // size, size]))
        whole = self.weight(f"{first}.whole", np.array([0, 0, channels]))
        blocks = self.add("Reshape", [x, apart], [f"{first}.blocks"])
        turned = self.add("MatMul", [blocks, self.weight(f"{first}.turn", turn)], [f"{first}.turned_blocks"])
        turned = self.add("Reshape", [turned, whole], [f"{first}.turned"])
        undone = {name: turn_inputs(weight, turn) for name, weight in weights.items()}
        return turned, undone, turn_moments(moments, turn)

    def _int8(self, name: str, weight: NDArray[np.int8], scale: Floats, x: tuple[str, str, str], size: str) -> str:
        """`x` is quantised values, scale and zero of tokens that were divided by `size`."""
        weights = self.weight(f"{name}.weight", np.ascontiguousarray(weight))
        scales = self.weight(f"{name}.weight_scale", scale)
        made = self.add("MatMulIntegerToFloat", [x[0], weights, x[1], scales, x[2]], [f"{name}.of_level"], _CONTRIB)
        return self.add("Mul", [made, size], [name])


def build(
    shape: Shape,
    layers: Iterator[Layer],
    embedding: Floats,
    points: Sequence[str],
    plan: Plan,
    *,
    watch: bool = False,
) -> onnx.ModelProto:
    """The graph of as many `layers` as `points` need.

    Inputs: `ids [B, T]` int64, `last [B]` int32 (index of each sequence's last token, cache counted), `total []` int32
    (length with the cache), and for each layer `past.N.key`, `past.N.value` `[B, kv_heads, P, head_dim]`.
    Outputs are named after the hook points, `[B, T, d_model]`, and `present.N.key`, `present.N.value`. `watch` adds
    what each product is given, `N.qkv.in` and so on.
    """
    graph = _Graph()
    depth = depth_of(points, shape)
    table = graph.weight("embedding", embedding.astype(np.float16) if plan.half_embedding else embedding)
    stream = graph.add("Gather", [table, "ids"], ["embedded.half" if plan.half_embedding else "embedded"])
    if plan.half_embedding:
        stream = graph.add("Cast", [stream], ["embedded"], to=TensorProto.FLOAT)
    cos, sin = _rotations(graph, shape)
    seen: dict[str, str] = {}
    added = ""  # what the residual stream does not hold yet
    for number, layer in zip(range(depth), layers, strict=False):
        name = str(number)

        normed, stream = _norm(graph, stream, added, f"{name}.input", layer.input_norm, shape)
        if number:
            seen[f"model.layers.{number - 1}"] = stream
        (qkv,) = graph.product(normed, {f"{name}.qkv": layer.qkv}, plan.int8.get((number, "qkv")))
        attended = graph.add(
            "GroupQueryAttention",
            [qkv, "", "", f"past.{name}.key", f"past.{name}.value", "last", "total", cos, sin],
            [f"{name}.attended", f"present.{name}.key", f"present.{name}.value"],
            _CONTRIB,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=1 / math.sqrt(shape.head_dim),
        )
        (added,) = graph.product(attended, {f"{name}.o": layer.o}, plan.int8.get((number, "o")), turn=False)
        seen[f"model.layers.{number}.self_attn"] = seen[f"model.layers.{number}.self_attn.o_proj"] = added
        between, stream = _norm(graph, stream, added, f"{name}.output", layer.output_norm, shape)
        wide = {f"{name}.gate": layer.gate, f"{name}.up": layer.up}
        gate, up = graph.product(between, wide, plan.int8.get((number, "gate_up")))
        gate = graph.add("QuickGelu", [gate], [f"{name}.silu"], _CONTRIB, alpha=1.0)
        gated = graph.add("Mul", [gate, up], [f"{name}.gated"])
        (added,) = graph.product(gated, {f"{name}.down": layer.down}, plan.int8.get((number, "down")))
        seen[f"model.layers.{number}.mlp"] = seen[f"model.layers.{number}.mlp.down_proj"] = added
        if watch:
            for product, given in zip(PRODUCTS, (normed, attended, between, gated), strict=True):
                graph.add("Identity", [given], [f"{name}.{product}.in"])
    seen[f"model.layers.{depth - 1}"] = graph.add("Add", [stream, added], ["end"])
    for point in points:
        graph.add("Identity", [seen[point]], [point])
    return _model(graph, shape, depth, points, watch=watch)


def _norm(graph: _Graph, stream: str, added: str, name: str, gamma: Floats, shape: Shape) -> tuple[str, str]:
    """The norm of the stream with `added` in it, and that sum."""
    weight = graph.weight(f"{name}.norm", gamma)
    if not added:
        normed = graph.add(
            "SimplifiedLayerNormalization", [stream, weight], [f"{name}.normed"], axis=-1, epsilon=shape.epsilon
        )
        return normed, stream
    outputs = [f"{name}.normed", "", "", f"{name}.stream"]
    graph.add("SkipSimplifiedLayerNormalization", [stream, added, weight], outputs, _CONTRIB, epsilon=shape.epsilon)
    return outputs[0], outputs[3]


def _rotations(graph: _Graph, shape: Shape) -> tuple[str, str]:
    frequencies = shape.theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)  # [head_dim / 2]
    angles = np.outer(np.arange(shape.positions), frequencies)
    return (
        graph.weight("cos", np.cos(angles).astype(np.float32)),
        graph.weight("sin", np.sin(angles).astype(np.float32)),
    )


def _model(graph: _Graph, shape: Shape, depth: int, points: Sequence[str], *, watch: bool) -> onnx.ModelProto:
    def given(name: str, kind: int, dims: Sequence[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(dims))

    real = TensorProto.FLOAT
    inputs = [
        given("ids", TensorProto.INT64, ["B", "T"]),
        given("last", TensorProto.INT32, ["B"]),
        given("total", TensorProto.INT32, []),
    ]
    outputs = [given(point, real, ["B", "T", shape.d_model]) for point in points]
    for number in range(depth):
        for part in ("key", "value"):
            inputs.append(given(f"past.{number}.{part}", real, ["B", shape.kv_heads, "P", shape.head_dim]))
            outputs.append(given(f"present.{number}.{part}", real, ["B", shape.kv_heads, "N", shape.head_dim]))
        if watch:
            outputs += [given(f"{number}.{product}.in", real, ["B", "T", "C"]) for product in PRODUCTS]
    made = helper.make_graph(graph.nodes, "reader", inputs, outputs, graph.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="guard")
