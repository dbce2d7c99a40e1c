"""`guard export`: a model folder and a pack's hook points become a folder that is read without torch."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from guard.errors import ConfigError, WeightsError
from guard.reader import exported, graph, llama, weights
from guard.reader.exported import GRAPH, MANIFEST, TOKENIZER, WEIGHTS, Export, Made
from guard.reader.graph import PRODUCTS, Plan
from guard.reader.llama import Layer, Shape
from guard.reader.tokens import TextTokenizer

_COPIED = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "config.json")
_TEXT_TOKENS = 256  # of each text that calibrates, at most
_CALIBRATION_TOKENS = 26_700  # about so many in all
_TOGETHER = 1024  # tokens whose second moments are taken in one product
_SMOOTHING = 0.5
_UNEVEN = 16.0  # a product whose largest input is so many times a token's usual largest one stays float32


@dataclass(frozen=True, slots=True)
class Source:
    """What a folder is exported for: a pack's hook points, and texts for int8, of which the first ones calibrate."""

    pack: str  # id and version
    hook_points: Sequence[str]
    texts: Sequence[str]


def export(
    model: Path,
    source: Source,
    target: Path,
    dtype: Literal["float32", "int8"],
    *,
    report: Callable[[str], None] = lambda _: None,
) -> Export:
    """Writes `target`, all or nothing, and reads it back once.

    Raises WeightsError for a model that is no plain llama, lacks a tensor, or is exported already, and ConfigError for
    a hook point that the model lacks, for `target` where something is there already, and for int8 without a text.
    """
    if target.exists():
        raise ConfigError(f"export to {target}: found it there already, expected a new folder")
    if exported.is_exported(model):
        raise WeightsError(f"{model}: found an exported reader, expected the model folder that it was made from")
    shape = llama.read_shape(_config(model), model)
    depth = llama.depth_of(source.hook_points, shape)
    tensors = llama.Tensors(model)
    layers = [llama.read_layer(tensors, number) for number in range(depth)]
    embedding = tensors("model.embed_tokens.weight")
    plan, texts = Plan(), 0
    if dtype == "int8":
        sequences = _sequences(source, TextTokenizer(model))
        texts = len(sequences)
        report(f"calibrating int8 on {texts} of the pack's texts")
        seen = _calibrate(shape, layers, embedding, source, sequences)
        for number, layer in enumerate(layers):
            layers[number], left = graph.smoothed(layer, seen.of(number), shape, _SMOOTHING)
            seen.moments.update({f"{number}.{product}": moments for product, moments in left.items()})
        plan = _plan(seen, depth)
    report(f"writing {depth} layers as {dtype}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "exported"
        folder.mkdir()
        _save(graph.build(shape, iter(layers), embedding, source.hook_points, plan), folder / GRAPH)
        for name in _COPIED:
            if (model / name).exists():
                shutil.copyfile(model / name, folder / name)
        told = Export(
            fingerprint={"weights": weights.fingerprint(model)["weights"], "tokenizer": _tokenizer(model)},
            hook_points=tuple(source.hook_points),
            dtype=dtype,
            d_model=shape.d_model,
            depth=depth,
            positions=shape.positions,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            flops_per_token=_flops(layers),
            made=_made(model, source, plan, depth, texts),
            files={file.name: exported.sha256(file) for file in sorted(folder.iterdir())},
        )
        (folder / MANIFEST).write_text(told.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _session(folder / GRAPH)
        folder.rename(target)
    return told


def _config(model: Path) -> dict[str, object]:
    import json

    file = model / "config.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: found no JSON that can be read: {error}") from None
    if not isinstance(told, dict):
        raise WeightsError(f"{file}: found {type(told).__name__}, expected a JSON object")
    return told


def _tokenizer(model: Path) -> str:
    return exported.sha256(model / TOKENIZER)


def _flops(layers: Sequence[Layer]) -> int:
    return 2 * sum(w.size for layer in layers for w in (layer.qkv, layer.o, layer.gate, layer.up, layer.down))


def _made(model: Path, source: Source, plan: Plan, depth: int, texts: int) -> Made:
    kinds = {"f32": depth * len(PRODUCTS) - len(plan.int8), "int8": len(plan.int8)}
    try:
        guard = version("sae-guard")
    except PackageNotFoundError:
        guard = "run from source, not installed"
    return Made(
        guard=guard,
        onnx=onnx.__version__,
        model=model.name,
        pack=source.pack,
        calibrated_on=texts,
        smoothing=_SMOOTHING if texts else 0.0,
        products={kind: count for kind, count in kinds.items() if count},
    )


def _save(model: onnx.ModelProto, file: Path) -> None:
    onnx.save(model, file, save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS)


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True)
class _Seen:
    """What calibration saw of each product's input, by `N.product`."""

    moments: dict[str, NDArray[np.float32]]  # mean of `x x^T`, [channels, channels]
    tokens: dict[str, NDArray[np.float32]]  # largest absolute value of each token

    def of(self, layer: int) -> dict[str, NDArray[np.float32]]:
        return {product: self.moments[f"{layer}.{product}"] for product in PRODUCTS}


def _calibrate(
    shape: Shape,
    layers: Sequence[Layer],
    embedding: NDArray[np.float32],
    source: Source,
    sequences: Sequence[NDArray[np.int64]],
) -> _Seen:
    """Reads `sequences` with the float32 graph. Moments are taken before anything is smoothed: that is linear."""
    names = [f"{number}.{product}" for number in range(len(layers)) for product in PRODUCTS]
    moments: dict[str, NDArray[np.float32]] = {}
    tokens: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    waiting: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    read = sum(ids.size for ids in sequences)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / GRAPH
        _save(graph.build(shape, iter(layers), embedding, source.hook_points, Plan(), watch=True), file)
        session = _session(file)
        empty = np.zeros((1, shape.kv_heads, 0, shape.head_dim), dtype=np.float32)
        past = {f"past.{n}.{part}": empty for n in range(len(layers)) for part in ("key", "value")}
        for number, ids in enumerate(sequences, start=1):
            total = ids.shape[1]
            given = {"ids": ids, "last": np.array([total - 1], np.int32), "total": np.array(total, np.int32), **past}
            for name, values in zip(names, session.run([f"{n}.in" for n in names], given), strict=True):
                tokens[name].append(np.abs(values[0]).max(axis=1))
                waiting[name].append(values[0])  # [T, channels]
            if sum(map(len, waiting[names[0]])) >= _TOGETHER or number == len(sequences):
                for name, parts in waiting.items():
                    x = np.concatenate(parts)
                    moments[name] = moments.get(name, np.float32(0)) + x.T @ x / np.float32(read)
                    parts.clear()
    return _Seen(moments, {name: np.concatenate(parts) for name, parts in tokens.items()})


def _sequences(source: Source, tokenizer: TextTokenizer) -> list[NDArray[np.int64]]:
    """The first texts as they are read, `[1, T]` each behind a sink token, to about as many tokens as are wanted."""
    if not source.texts:
        raise ConfigError(f"export as int8: found no text in pack {source.pack}, expected texts to calibrate on")
    sequences: list[NDArray[np.int64]] = []
    room = _CALIBRATION_TOKENS
    for text in source.texts:
        ids = [tokenizer.sink_id, *tokenizer.text(text).ids[: _TEXT_TOKENS - 1]]
        sequences.append(np.array([ids], dtype=np.int64))
        room -= len(ids)
        if room <= 0:
            break
    return sequences


def _plan(seen: _Seen, depth: int) -> Plan:
    """int8 with a scale a token, and float32 where a few tokens dwarf the others: what they write rules the stream."""
    moments = {}
    for number in range(depth):
        for product in PRODUCTS:
            sizes = seen.tokens[f"{number}.{product}"]
            if sizes.max() <= _UNEVEN * np.median(sizes):
                moments[number, product] = seen.moments[f"{number}.{product}"]
    return Plan(moments, half_embedding=True)
