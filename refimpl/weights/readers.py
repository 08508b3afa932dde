"""Checkpoint folders to canonical tensors: safetensors with Hugging Face names, GGUF, CTranslate2's Whisper, and a
vision Transformer as ONNX.

A family of checkpoints is one declarative table, canonical name -> stored name. Three stored matrices become one where
query, key and value are kept apart. Of encoder-decoder models the encoder is read; their decoders are left out.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refimpl.config import ModelConfig, config_from_huggingface
from refimpl.errors import MissingDependencyError, WeightsError
from refimpl.weights import gguf_reader
from refimpl.weights.cursor import Cursor
from refimpl.weights.layout import Shape, shapes

INDEX = "model.safetensors.index.json"  # of a checkpoint in several files
SINGLE = "model.safetensors"
CTRANSLATE2 = "model.bin"
ONNX = "model.onnx"

# --- families -------------------------------------------------------------------------------------------------------

Stored = str | tuple[str, ...]  # one stored name, or several whose rows are joined


@dataclass(frozen=True)
class Family:
    """Where a kind of checkpoint keeps the canonical weights.

    Attributes
    ----------
    model, layer : dict
        Canonical -> stored name, of the whole model and of one layer. ``.weight`` and ``.bias`` are left out of both,
        but for tables, whose canonical name has neither.
    layer_prefix : str
        Stored prefix of layer ``{}``.
    prefixes : tuple of str
        Optional prefixes of every stored name, the longest first.
    ignored : str
        Regular expression of stored names (prefix removed) that effref has no use for.
    transposed : str
        Regular expression of stored matrices that are (in, out).
    zero_bias : str
        Regular expression of stored biases that are left out of the file because they are zero.
    fields : dict
        Fields of ``config.json`` with the only value that effref implements.
    head : str
        Stored name (prefix included) of the language head; read only where it is tied to the embedding.
    scales : dict
        Linear map of a layer -> stored vector (layer prefix removed) that multiplies its output, as LayerScale does
        (arXiv 2103.17239, eq. 4); it is multiplied into the rows of the map.
    """

    model: dict[str, Stored]
    layer: dict[str, Stored]
    layer_prefix: str
    prefixes: tuple[str, ...] = ()
    ignored: str = "$^"
    transposed: str = "$^"
    zero_bias: str = "$^"
    fields: dict[str, Any] = field(default_factory=dict)
    head: str = "lm_head.weight"
    scales: dict[str, str] = field(default_factory=dict)


BERT = Family(
    model={
        "stem.embedding": "embeddings.word_embeddings.weight",
        "stem.token_types": "embeddings.token_type_embeddings.weight",
        "stem.positions": "embeddings.position_embeddings.weight",
        "stem.norm": "embeddings.LayerNorm",
    },
    layer_prefix="encoder.layer.{}.",
    layer={
        "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feed_forward.up": "intermediate.dense",
        "feed_forward.down": "output.dense",
        "feed_forward_norm": "output.LayerNorm",
    },
    prefixes=("bert.",),
    ignored=r"embeddings\.position_ids|pooler\..*|cls\..*|classifier\..*|qa_outputs\..*",
    fields={"position_embedding_type": "absolute", "is_decoder": False},
)

WHISPER = Family(
    model={
        "stem.convolutions.0": "conv1",
        "stem.convolutions.1": "conv2",
        "stem.positions": "embed_positions.weight",
        "final_norm": "layer_norm",
    },
    layer_prefix="layers.{}.",
    layer={
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": "self_attn.out_proj",
        "attention_norm": "self_attn_layer_norm",
        "feed_forward.up": "fc1",
        "feed_forward.down": "fc2",
        "feed_forward_norm": "final_layer_norm",
    },
    prefixes=("model.encoder.", "encoder."),
    ignored=r"(model\.)?decoder\..*|proj_out\..*",
    zero_bias=r".*\.k_proj\.bias",
)

LLAMA = Family(
    model={"stem.embedding": "embed_tokens.weight", "final_norm": "norm"},
    layer_prefix="layers.{}.",
    layer={
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down": "mlp.down_proj",
        "feed_forward_norm": "post_attention_layernorm",
    },
    prefixes=("model.",),
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq",
)

GPT2 = Family(
    model={"stem.embedding": "wte.weight", "stem.positions": "wpe.weight", "final_norm": "ln_f"},
    layer_prefix="h.{}.",
    layer={
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "attention_norm": "ln_1",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
        "feed_forward_norm": "ln_2",
    },
    prefixes=("transformer.",),
    ignored=r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias",
    transposed=r".*\.c_(attn|proj|fc)\.weight",  # the layer type is called Conv1D
    fields={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
)

DINOV2 = Family(
    model={
        "stem.patches": "embeddings.patch_embeddings.projection",
        "stem.class_token": "embeddings.cls_token",
        "stem.positions": "embeddings.position_embeddings",
        "final_norm": "layernorm",
    },
    layer_prefix="encoder.layer.{}.",
    layer={
        "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output": "attention.output.dense",
        "attention_norm": "norm1",
        "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2",
        "feed_forward_norm": "norm2",
    },
    prefixes=("dinov2.",),
    ignored=r"embeddings\.mask_token|classifier\..*",
    fields={"use_swiglu_ffn": False, "qkv_bias": True},
    scales={"attention.output": "layer_scale1.lambda1", "feed_forward.down": "layer_scale2.lambda1"},
)

# The same as an ONNX file: matrices are (in, out) and called after the nodes that use them; the table of positions
# was folded into two constants, that of the class token and that of the patches.
DINOV2_ONNX = replace(
    DINOV2,
    model={**DINOV2.model, "stem.positions": ("onnx::Concat_1957", "onnx::Reshape_1962")},
    prefixes=("backbone.",),
    ignored=r"embeddings\.mask_token|decoder\..*|onnx::.*",
    transposed=r"encoder\..*\.weight",
)

WHISPER_CTRANSLATE2 = Family(
    model={
        "stem.convolutions.0": "conv1",
        "stem.convolutions.1": "conv2",
        "stem.positions": "position_encodings.encodings",
        "final_norm": "layer_norm",
    },
    layer_prefix="layer_{}.",
    layer={
        "attention.qkv": "self_attention.linear_0",
        "attention.output": "self_attention.linear_1",
        "attention_norm": "self_attention.layer_norm",
        "feed_forward.up": "ffn.linear_0",
        "feed_forward.down": "ffn.linear_1",
        "feed_forward_norm": "ffn.layer_norm",
    },
    prefixes=("encoder.",),
    ignored=r"decoder\..*|num_heads|pre_norm|activation|scale_embeddings",
)

LLAMA_GGUF = Family(
    model={"stem.embedding": "token_embd.weight", "final_norm": "output_norm"},
    layer_prefix="blk.{}.",
    layer={
        "attention.qkv": ("attn_q", "attn_k", "attn_v"),
        "attention.output": "attn_output",
        "attention_norm": "attn_norm",
        "feed_forward.up": ("ffn_gate", "ffn_up"),
        "feed_forward.down": "ffn_down",
        "feed_forward_norm": "ffn_norm",
    },
    ignored=r"output\.weight",
    head="output.weight",
)

GPT2_GGUF = Family(
    model={
        "stem.embedding": "token_embd.weight",
        "stem.positions": "position_embd.weight",
        "final_norm": "output_norm",
    },
    layer_prefix="blk.{}.",
    layer={
        "attention.qkv": "attn_qkv",
        "attention.output": "attn_output",
        "attention_norm": "attn_norm",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
        "feed_forward_norm": "ffn_norm",
    },
    ignored=r"output\.weight",
    head="output.weight",
)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "whisper": WHISPER,
    "llama": LLAMA,
    "gpt2": GPT2,
    "dinov2": DINOV2,
}  # by model_type
GGUF_FAMILIES: dict[str, Family] = {"llama": LLAMA_GGUF, "gpt2": GPT2_GGUF}  # by general.architecture

_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes
    ----------
    tensors : dict of str to array, float32
        By canonical name.
    changes : dict
        Fields of the configuration that the file overrules.
    note : str
        What to add to the description of the source.
    """

    tensors: dict[str, np.ndarray]
    changes: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def config_of(folder: Path) -> ModelConfig:
    """The shape of the model in a checkpoint folder; no tensor is read.

    Raises
    ------
    ConfigError
        If ``config.json`` is missing, damaged or of another kind of model.
    WeightsError
        If the folder holds a CTranslate2 or GGUF file that is truncated, damaged or of another kind of model.
    """
    if (folder / CTRANSLATE2).is_file():
        return _ctranslate2_config(CTranslate2File(folder / CTRANSLATE2), folder.name)
    if path := gguf_file(folder):
        return gguf_reader.config_of(gguf_reader.GGUFFile(path), folder.name)
    return config_from_huggingface(folder / "config.json")


def read_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """Read the weights of a checkpoint folder as float32.

    Parameters
    ----------
    folder : Path
        Holds ``model.safetensors`` (or its index and parts) with ``config.json``, CTranslate2's ``model.bin``, one
        ``.gguf`` file, or a vision Transformer's ``model.onnx``.
    config : ModelConfig
        The shape that the tensors must have.

    Returns
    -------
    checkpoint : Checkpoint

    Raises
    ------
    WeightsError
        If there are no weights, or they are truncated, of another shape or of another model.
    MissingDependencyError
        If safetensors, gguf or onnx is needed and not installed.

    Notes
    -----
    Of a Llama, GGUF keeps the rows of query and key in the order that pairs adjacent channels in rotary positions.
    The rows stay as they are and the configuration says so (`rope_interleaved`): nothing is reordered, and a tensor
    equals what the file holds.
    """
    if (folder / CTRANSLATE2).is_file():
        file = CTranslate2File(folder / CTRANSLATE2)
        _ctranslate2_config(file, folder.name)  # refuses other models
        return Checkpoint(_canonical(WHISPER_CTRANSLATE2, config, file))
    if (folder / ONNX).is_file():
        return Checkpoint(_canonical(DINOV2_ONNX, config, ONNXFile(folder / ONNX)))
    if path := gguf_file(folder):
        gguf = gguf_reader.GGUFFile(path)
        own = gguf_reader.config_of(gguf, folder.name)  # refuses other models
        changes = {"rope_interleaved": own.rope_interleaved}
        return _with_tied_head(GGUF_FAMILIES[gguf.architecture], config, gguf, changes)
    given = _config_json(folder)
    family = FAMILIES[given["model_type"]]
    _refuse_other_fields(folder, family, given)
    return _with_tied_head(family, config, SafetensorsFiles(folder), {})


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no safetensors.

    Raises
    ------
    WeightsError
        If there are several.
    """
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return None
    found = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    if len(found) > 1:
        raise WeightsError(f"{folder} holds {', '.join(path.name for path in found)}: keep one .gguf file in a folder")
    return found[0] if found else None


# --- from stored to canonical names ---------------------------------------------------------------------------------


class Store(Protocol):
    """Named tensors in files."""

    where: Path

    def names(self) -> Iterable[str]:
        """Names as stored."""

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""


def _canonical(family: Family, config: ModelConfig, store: Store) -> dict[str, np.ndarray]:
    """Every weight of the model, joined and turned; refuses stored tensors that the model has no place for."""
    stored = {_plain(family, name): name for name in store.names()}
    sources = {name: _sources(family, name) for name in shapes(config)}
    used = {source for names in sources.values() for source in names} | set(_scales(family, config).values())
    for name in stored:
        if name not in used and not re.fullmatch(family.ignored, name):
            raise WeightsError(f"{store.where} holds '{stored[name]}', for which this kind of model has no place")
    tensors = {}
    for name, shape in shapes(config).items():
        parts = [_part(family, config, store, stored, source) for source in sources[name]]
        tensors[name] = _fitting(store.where, sources[name], parts, shape)
    for name, source in _scales(family, config).items():
        scale = _part(family, config, store, stored, source)  # (d,)
        for leaf, factor in (("weight", scale[:, None]), ("bias", scale)):
            tensors[f"{name}.{leaf}"] = tensors[f"{name}.{leaf}"] * factor
    return tensors


def _scales(family: Family, config: ModelConfig) -> dict[str, str]:
    """Canonical linear map -> the stored vector that multiplies its output."""
    return {
        f"layers.{index}.{module}": family.layer_prefix.format(index) + stored
        for index in range(config.layers)
        for module, stored in family.scales.items()
    }


def _plain(family: Family, name: str) -> str:
    """A stored name without prefix, with dots, and with today's names of the parts of a norm."""
    name = name.replace("/", ".")
    prefix = next((prefix for prefix in family.prefixes if name.startswith(prefix)), "")
    head, _, leaf = name.removeprefix(prefix).rpartition(".")
    return f"{head}.{_OLD_LEAVES.get(leaf, leaf)}" if head else leaf


def _sources(family: Family, name: str) -> tuple[str, ...]:
    """The stored names (prefix removed) that make up a canonical weight."""
    if name in family.model:
        return _several(family.model[name])
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        return tuple(f"{stored}.{leaf}" for stored in _several(family.model[module]))
    _, index, module = module.split(".", 2)
    prefix = family.layer_prefix.format(index)
    return tuple(f"{prefix}{stored}.{leaf}" for stored in _several(family.layer[module]))


def _several(stored: Stored) -> tuple[str, ...]:
    return (stored,) if isinstance(stored, str) else stored


def _part(family: Family, config: ModelConfig, store: Store, stored: Mapping[str, str], source: str) -> np.ndarray:
    """One stored tensor, its axes in canonical order."""
    if source not in stored:
        if re.fullmatch(family.zero_bias, source):
            return np.zeros(config.d_kv, np.float32)
        raise WeightsError(f"{store.where} lacks '{source}'")
    values: np.ndarray = store.read(stored[source])
    if values.ndim == 4:
        return values.reshape(len(values), -1)  # a patch: (d, channels, rows, columns) -> (d, features)
    if values.ndim == 3 and len(values) == 1:
        return np.asarray(values[0])  # a table with a batch axis
    if re.fullmatch(family.transposed, source):
        return values.T  # (in, out) -> (out, in)
    return values.transpose(0, 2, 1) if values.ndim == 3 else values  # (out, in, kernel) -> (out, kernel, in)


def _fitting(where: Path, names: tuple[str, ...], parts: list[np.ndarray], shape: Shape) -> np.ndarray:
    """The parts joined by rows, if they have the shape of the model."""
    rows = sum(part.shape[0] for part in parts if part.ndim)
    if any(part.shape[1:] != shape[1:] for part in parts) or rows != shape[0]:
        given = " + ".join(f"'{name}' {part.shape}" for name, part in zip(names, parts, strict=True))
        raise WeightsError(f"{where}: {given} does not make the shape {shape} that the model needs")
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _with_tied_head(family: Family, config: ModelConfig, store: Store, changes: dict[str, Any]) -> Checkpoint:
    """The weights; a language head that differs from the embedding table is left out, and that is said."""
    tensors = _canonical(family, config, store)
    if not config.head or family.head not in store.names():
        return Checkpoint(tensors, changes)
    if np.array_equal(store.read(family.head), tensors["stem.embedding"]):
        return Checkpoint(tensors, changes)
    note = ", without its language head, which is not tied to the embedding"
    return Checkpoint(tensors, {**changes, "head": False}, note)


# --- config.json ----------------------------------------------------------------------------------------------------


def _config_json(folder: Path) -> dict[str, Any]:
    config_from_huggingface(folder / "config.json")  # refuses what is not a model's config.json
    given: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return given


def _refuse_other_fields(folder: Path, family: Family, given: Mapping[str, Any]) -> None:
    """Refuse what would load and then be computed wrongly."""
    for name, only in family.fields.items():
        if given.get(name, only) != only:
            raise WeightsError(f"{folder}/config.json: {name} is {given[name]!r}; effref implements {only!r} only")


# --- ONNX -----------------------------------------------------------------------------------------------------------


class ONNXFile:
    """The constants of an ONNX graph; one without a name of its own is called after the product that reads it."""

    def __init__(self, path: Path) -> None:
        try:
            import onnx
        except ImportError as error:
            raise MissingDependencyError("reading ONNX needs onnx: pip install 'effref[models]'") from error
        from google.protobuf.message import DecodeError

        self.where = path
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except (DecodeError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as ONNX ({error}): download it again") from error
        of_products = {
            node.input[1]: node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            for node in graph.node
            if node.op_type == "MatMul"
        }
        self._tensors = {of_products.get(one.name, one.name): one for one in graph.initializer}
        self._array = onnx.numpy_helper.to_array

    def names(self) -> Iterable[str]:
        """Names of the constants."""
        return self._tensors.keys()

    def read(self, name: str) -> np.ndarray:
        """One constant as float32."""
        return np.asarray(self._array(self._tensors[name]), np.float32)


# --- safetensors ----------------------------------------------------------------------------------------------------


class SafetensorsFiles:
    """The tensors of ``model.safetensors``, or of the parts that its index names."""

    def __init__(self, folder: Path) -> None:
        self.where = folder
        self._files = {name: path for path in _parts(folder) for name in _open(path).keys()}  # noqa: SIM118

    def names(self) -> Iterable[str]:
        """Names as stored."""
        return self._files.keys()

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        path = self._files[name]
        file = _open(path)
        kind = file.get_slice(name).get_dtype()
        if kind == "BF16":
            return _widen_bfloat16(_raw_bfloat16(path, name))
        if kind not in ("F16", "F32", "F64"):
            raise WeightsError(f"{path}: '{name}' is stored as {kind}; effref reads F16, BF16, F32 and F64")
        return np.asarray(file.get_tensor(name), np.float32)


def _parts(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
            return sorted(folder / Path(name).name for name in names)  # never outside of the folder
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise WeightsError(f"{folder / INDEX} is damaged ({error})") from error
    if not (folder / SINGLE).is_file():
        raise WeightsError(
            f"{folder} holds no {SINGLE}, {CTRANSLATE2}, {ONNX} or .gguf file; pickled weights are not read"
        )
    return [folder / SINGLE]


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependencyError("reading weights needs safetensors: pip install 'effref[models]'") from error
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors ({error}): download it again") from error


def _raw_bfloat16(path: Path, name: str) -> np.ndarray:
    """The bits of a bfloat16 tensor, which NumPy has no type for; the file was checked when it was opened."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(size))[name]
        start, stop = entry["data_offsets"]
        file.seek(8 + size + start)
        return np.frombuffer(file.read(stop - start), "<u2").reshape(entry["shape"])


def _widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# --- CTranslate2 ----------------------------------------------------------------------------------------------------

_CT2_VERSION = 6
_CT2_SPEC = "WhisperSpec"
_CT2_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: "<u2"}
_CT2_BFLOAT16 = 5
_CT2_FLOATS = (0, 4, _CT2_BFLOAT16)


@dataclass(frozen=True)
class _Variable:
    kind: int
    shape: Shape
    data: memoryview


class CTranslate2File:
    """The variables of a CTranslate2 ``model.bin`` of a Whisper model."""

    def __init__(self, path: Path) -> None:
        self.where = path
        cursor = Cursor(path)
        version = cursor.unpack("I")
        spec = _text(cursor) if version == _CT2_VERSION else ""
        if spec != _CT2_SPEC:
            raise WeightsError(
                f"{path} is not a CTranslate2 file of version {_CT2_VERSION} with a {_CT2_SPEC} "
                f"(version {version}, '{spec[:40]}'): effref reads no other"
            )
        _revision, count = cursor.unpack("II")
        self._variables = {_text(cursor): _variable(cursor) for _ in range(count)}
        for _ in range(cursor.unpack("I")):
            _text(cursor), _text(cursor)  # aliases: of decoder weights only

    def names(self) -> Iterable[str]:
        """Names as stored."""
        return self._variables.keys()

    def shape(self, name: str) -> Shape:
        """The shape of a variable."""
        return self._find(name).shape

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        variable = self._find(name)
        if variable.kind not in _CT2_FLOATS:
            raise WeightsError(f"{self.where}: '{name}' is stored as integers; effref reads float weights only")
        values = _array(variable)
        return _widen_bfloat16(values) if variable.kind == _CT2_BFLOAT16 else values.astype(np.float32)

    def integer(self, name: str) -> int:
        """A variable that holds one number."""
        return int(_array(self._find(name)).reshape(-1)[0])

    def _find(self, name: str) -> _Variable:
        if name not in self._variables:
            raise WeightsError(f"{self.where} lacks '{name}'")
        return self._variables[name]


def _text(cursor: Cursor) -> str:
    """A string: length with the closing zero byte, then the bytes."""
    value = bytes(cursor.take(cursor.unpack("H"))).rstrip(b"\0").decode("ascii", "replace")
    if not (value.isascii() and value.isprintable()):
        raise WeightsError(f"{cursor.path} is damaged: a name in it is not text")
    return value


def _variable(cursor: Cursor) -> _Variable:
    rank = cursor.unpack("B")
    shape = struct.unpack(f"<{rank}I", cursor.take(4 * rank))
    kind, size = cursor.unpack("BI")
    if kind not in _CT2_TYPES or size != math.prod(shape) * np.dtype(_CT2_TYPES[kind]).itemsize:
        raise WeightsError(f"{cursor.path} is damaged: a variable of type {kind}, shape {shape} has {size} bytes")
    return _Variable(kind, shape, cursor.take(size))


def _array(variable: _Variable) -> np.ndarray:
    return np.frombuffer(variable.data, _CT2_TYPES[variable.kind]).reshape(variable.shape)


def _ctranslate2_config(file: CTranslate2File, name: str) -> ModelConfig:
    """The shape of the encoder, from the shapes of its variables."""
    layers = {name.split("/")[1] for name in file.names() if name.startswith("encoder/layer_") and name.count("/") > 2}
    positions, _ = _shape(file, "encoder/position_encodings/encodings", 2)
    d_model, features, _ = _shape(file, "encoder/conv1/weight", 3)
    d_ff, _ = _shape(file, "encoder/layer_0/ffn/linear_0/weight", 2)
    return ModelConfig(
        name=name or "custom",
        recipe="pre-norm",
        layers=len(layers),
        d_model=d_model,
        heads=file.integer("encoder/num_heads"),
        d_ff=d_ff,
        stem="frames",
        features=features,
        strides=(1, 2),
        position="sinusoidal",
        max_positions=positions,
        source=CTRANSLATE2,
    )


def _shape(file: CTranslate2File, name: str, rank: int) -> Shape:
    shape = file.shape(name)
    if len(shape) != rank:
        raise WeightsError(f"{file.where}: '{name}' has shape {shape}; {rank} axes are needed")
    return shape
