"""GGUF files: sizes and tokenizer from their metadata, tensors as float32.

The header is read here, never past the end of the file; the blocks of quantised tensors are decoded by the package
``gguf``, whose own reader takes seconds for the vocabulary alone. Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.config import ModelConfig
from refimpl.errors import InputError, MissingDependencyError, WeightsError
from refimpl.weights.cursor import Cursor
from refimpl.weights.layout import Shape

# --- the file -------------------------------------------------------------------------------------------------------

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 3 adds big-endian files, which are not read
_ALIGNMENT = 32  # bytes, where general.alignment is absent
_RANKS = range(1, 5)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> layout


@dataclass(frozen=True)
class _Tensor:
    kind: int
    shape: Shape
    offset: int  # bytes from where the data begin


class GGUFFile:
    """The metadata and tensors of a GGUF file of version 2 or 3, little-endian.

    Attributes
    ----------
    where : Path
    metadata : dict
        Numbers, strings, and lists of either.
    architecture : str
        What kind of model it says it is.
    """

    def __init__(self, path: Path) -> None:
        self.where = path
        cursor = Cursor(path)
        magic, version = bytes(cursor.take(4)), cursor.unpack("I")
        if magic != _MAGIC or version not in _VERSIONS:
            raise WeightsError(f"{path} is not a little-endian GGUF file of version 2 or 3: effref reads no other")
        tensors, fields = cursor.unpack("QQ")
        self.metadata = {_text(cursor): _value(cursor) for _ in range(fields)}
        self._tensors = {_text(cursor): _tensor(cursor) for _ in range(tensors)}
        if len(self.metadata) != fields or len(self._tensors) != tensors:
            raise WeightsError(f"{path} is damaged: a name occurs twice")
        cursor.take(-cursor.position % self._alignment())
        self._data = cursor.left
        self.architecture = str(self.metadata.get("general.architecture"))

    def names(self) -> Iterable[str]:
        """Names as stored."""
        return self._tensors.keys()

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, in NumPy's order."""
        return self._find(name).shape

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        sizes, quantization, dequantize = _package()
        tensor = self._find(name)
        try:
            kind = quantization(tensor.kind)
            values, size = sizes[kind]  # of a block, which never crosses a row
            if tensor.shape[-1] % values:
                raise WeightsError(
                    f"{self.where} is damaged: '{name}' {tensor.shape} is no whole blocks of {kind.name}"
                )
            stored = self._bytes(name, math.prod(tensor.shape) // values * size)
            with np.errstate(all="ignore"):  # what is not finite is refused later, by name
                found: np.ndarray = dequantize(stored.reshape(*tensor.shape[:-1], -1), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise WeightsError(
                f"{self.where}: '{name}' is stored in a way that gguf does not decode ({error})"
            ) from error
        return found.reshape(tensor.shape)

    def field(self, key: str, default: Any = None) -> Any:
        """A field of the model's own part of the metadata; raises WeightsError if it is missing without default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise WeightsError(f"{self.where} lacks the field '{self.architecture}.{key}'")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive field, with the fewest digits that make the stored float32: 1e-05, not 9.9999997e-06."""
        value = self.field(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise WeightsError(f"{self.where}: {self.architecture}.{key} is {value!r}; a positive number is needed")
        return float(str(np.float32(value)))

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise WeightsError(f"{self.where} lacks '{name}'")
        return self._tensors[name]

    def _bytes(self, name: str, size: int) -> np.ndarray:
        """A copy of what is stored of a tensor."""
        start = self._tensors[name].offset
        if start + size > len(self._data):
            missing = start + size - len(self._data)
            raise WeightsError(f"{self.where} is truncated: '{name}' lacks {missing} bytes; download it again")
        return np.array(self._data[start : start + size], np.uint8)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise WeightsError(f"{self.where} is damaged: general.alignment is {alignment!r}")
        return alignment


def _text(cursor: Cursor) -> str:
    try:
        return str(cursor.take(cursor.unpack("Q")), "utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{cursor.path} is damaged: a string in it is not UTF-8") from error


def _value(cursor: Cursor) -> Any:
    kind = cursor.unpack("I")
    if kind == _STRING:
        return _text(cursor)
    if kind != _ARRAY:
        return _numbers(cursor, kind, 1)[0]
    kind, count = cursor.unpack("IQ")
    return [_text(cursor) for _ in range(count)] if kind == _STRING else _numbers(cursor, kind, count)


def _numbers(cursor: Cursor, kind: int, count: int) -> list[Any]:
    if kind not in _NUMBERS:
        raise WeightsError(f"{cursor.path} is damaged: a field in it has the type {kind}")
    layout = _NUMBERS[kind]
    data = cursor.take(count * struct.calcsize(f"<{layout}"))
    return list(struct.unpack(f"<{count}{layout}", data))


def _tensor(cursor: Cursor) -> _Tensor:
    rank = cursor.unpack("I")
    if rank not in _RANKS:
        raise WeightsError(f"{cursor.path} is damaged: a tensor in it has {rank} axes")
    axes = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
    kind, offset = cursor.unpack("IQ")
    return _Tensor(kind, axes[::-1], offset)  # stored with the fastest axis first


def _package() -> tuple[Any, Any, Callable[..., np.ndarray]]:
    """Of the package: block sizes by type, the types by number, and the function that decodes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingDependencyError("reading GGUF weights needs gguf: pip install 'effref[models]'") from error
    return GGML_QUANT_SIZES, GGMLQuantizationType, dequantize


# --- the model ------------------------------------------------------------------------------------------------------

_EMBEDDING = "token_embd.weight"

# Fields with the only value that effref implements; others would load and then be computed wrongly.
_FIELDS: dict[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
}
_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # one width for all


def config_of(file: GGUFFile, name: str) -> ModelConfig:
    """The shape of the model, from the metadata.

    Raises
    ------
    WeightsError
        If the architecture is not one of those in `_ARCHITECTURES`, or a field is missing or not implemented.
    ConfigError
        If a size is not one.
    """
    if file.architecture not in _ARCHITECTURES:
        raise WeightsError(
            f"{file.where} holds a model of the architecture '{file.architecture}'; "
            f"of GGUF files effref reads {' and '.join(_ARCHITECTURES)}"
        )
    layers = len({stored.split(".")[1] for stored in file.names() if stored.startswith("blk.")})
    if file.field("block_count") != layers:
        raise WeightsError(f"{file.where} says {file.field('block_count')} layers, but has tensors of {layers}")
    config = _ARCHITECTURES[file.architecture](file, name or "custom")
    implemented = {**_FIELDS, **dict.fromkeys(_HEAD_WIDTHS, config.head_dim)}
    for key, only in implemented.items():
        if file.field(key, only) != only:
            raise WeightsError(
                f"{file.where}: {file.architecture}.{key} is {file.field(key)!r}; effref implements {only!r} only"
            )
    return config


def _llama(file: GGUFFile, name: str) -> ModelConfig:
    return ModelConfig(
        name=name,
        recipe="pre-norm",
        layers=file.field("block_count"),
        d_model=file.field("embedding_length"),
        heads=file.field("attention.head_count"),
        kv_heads=file.field("attention.head_count_kv", file.field("attention.head_count")),
        head_dim=file.field("attention.key_length", 0),
        d_ff=file.field("feed_forward_length"),
        activation="silu",
        gated=True,
        norm="rms",
        eps=file.number("attention.layer_norm_rms_epsilon"),
        bias=False,
        causal=True,
        vocab=file.shape(_EMBEDDING)[0],
        position="rotary",
        max_positions=file.field("context_length"),
        rope_base=file.number("rope.freq_base", 10_000.0),
        rope_interleaved=True,
        head=True,
        source=file.where.name,
    )


def _gpt2(file: GGUFFile, name: str) -> ModelConfig:
    return ModelConfig(
        name=name,
        recipe="pre-norm",
        layers=file.field("block_count"),
        d_model=file.field("embedding_length"),
        heads=file.field("attention.head_count"),
        d_ff=file.field("feed_forward_length"),
        activation="gelu_tanh",
        eps=file.number("attention.layer_norm_epsilon"),
        causal=True,
        vocab=file.shape(_EMBEDDING)[0],
        position="learned",
        max_positions=file.field("context_length"),
        head=True,
        source=file.where.name,
    )


_ARCHITECTURES = {"llama": _llama, "gpt2": _gpt2}

# --- the tokenizer --------------------------------------------------------------------------------------------------

_BPE = "gpt2"  # what GGUF calls byte-level BPE
_PRE_TOKENIZERS = ("gpt-2", "smollm")


def tokenizer(file: GGUFFile) -> Any:
    """The ``tokenizers.Tokenizer`` that the metadata describe.

    Byte-level BPE over the file's tokens and merges. It adds no token and recognises no control token: a text that
    holds ``<|endoftext|>`` is that text. ``token_to_id`` finds them.

    Raises
    ------
    InputError
        If the tokenizer is of another kind, or damaged.
    MissingDependencyError
        If the package ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models
    except ImportError as error:
        raise MissingDependencyError("reading text needs tokenizers: pip install 'effref[models]'") from error
    given = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "add_bos_token")}
    if given["model"] != _BPE or given["pre"] not in _PRE_TOKENIZERS or given["add_bos_token"]:
        said = ", ".join(f"{key} {value!r}" for key, value in given.items())
        raise InputError(
            f"{file.where}: effref cannot build its tokenizer ({said}); it knows {_BPE!r} with "
            f"{' or '.join(map(repr, _PRE_TOKENIZERS))} and without added tokens: give token ids as .npy"
        )
    try:
        vocabulary = {token: index for index, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(pair.split(" ")) for pair in file.metadata["tokenizer.ggml.merges"]]
        built = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{file.where}: its tokenizer is damaged ({error!r})") from error
    built.pre_tokenizer = _pre_tokenizer(given["pre"])
    built.decoder = decoders.ByteLevel()
    return built


def _pre_tokenizer(name: str) -> Any:
    """GPT-2's split into words; SmolLM keeps every digit apart (llama.cpp, src/llama-vocab.cpp)."""
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
