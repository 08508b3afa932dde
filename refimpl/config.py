"""The words that all packages share: the shape of a model and the work it is given.

Sizes are written with one letter each in comments and formulas: B batch, T length, d model width, H heads,
D head width, f feed-forward width, L layers, V vocabulary.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from refimpl.errors import ConfigError, UnsupportedError, unknown

Recipe = Literal["post-norm", "pre-norm", "conformer", "emformer"]
Stem = Literal["tokens", "frames", "stacked", "patches"]
Position = Literal["learned", "sinusoidal", "relative", "rotary", "none"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]

DTYPES: dict[str, int] = {"float16": 2, "float32": 4, "float64": 8}  # name -> bytes per element
PHASES = ("prefill", "decode")
LARGEST = 2**40  # of any size: products of several of them are still floats
MOST_LAYERS, MOST_STEPS = 10_000, 2**20  # each is gone through one by one


@dataclass(frozen=True)
class Companion:
    """A part of the whole product that no pass runs but that counts for its size, as a transducer's joiner.

    Attributes
    ----------
    name : str
    parameters : int
    calls_per_chunk : float
        How often it runs while the encoder takes one chunk.
    """

    name: str
    parameters: int
    calls_per_chunk: float


# Assumed: read English has 2 to 3 words a second, and most are one or two of a transducer's 4096 word pieces.
SYMBOLS_PER_SECOND = 3.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer.

    Attributes
    ----------
    name : str
        Preset name, folder name or ``"custom"``.
    recipe : {"post-norm", "pre-norm", "conformer", "emformer"}
        How a layer is put together; see ``refimpl.model``.
    layers, d_model, heads, d_ff : int
        L, d, H, f. `heads` divides `d_model` unless `head_dim` is given.
    kv_heads, head_dim : int
        Hkv (default H; divides H) and D (default d / H).
    activation, gated : str, bool
        Feed-forward activation; `gated` is ``silu(gate) * up`` (SwiGLU) with two input matrices.
    norm, eps : {"layer", "rms"}, float
    bias : bool
        Linear maps carry a bias.
    causal : bool
        Position i attends to positions j <= i.
    stem : {"tokens", "frames", "stacked", "patches"}
        What enters: token ids (B, T); feature frames (B, T * prod(strides), features), or for "stacked"
        (B, (T + right_context) * stack, features); image patches (B, T - 1, features), to which a class token is added.
    vocab, token_types, features, strides, stack
        Sizes of the stem. Each stride is one convolution of kernel 3; `stack` frames of d / stack channels each are put
        side by side into one position.
    position : {"learned", "sinusoidal", "relative", "rotary", "none"}
    max_positions : int
        Rows of the position table in the pretrained model; 0 where there is no limit.
    rope_base, rope_interleaved
        Rotary angles are ``p * rope_base ** (-2 i / D)``; pairs are (2i, 2i + 1) when interleaved, else (i, i + D/2).
    conv_kernel : int
        Taps of the Conformer's depthwise convolution.
    embedding_norm, final_norm, head : bool
        Norm after the stem; norm after the last layer; language head tied to the embedding.
    d_out : int
        Width of a last linear map, with bias and followed by a norm; 0 for none.
    chunk, left_context, right_context : int
        Of a streaming model, in positions: it takes `chunk` positions at a time, which see each other, the
        `left_context` positions before them and the `right_context` positions after them. 0 where all are seen at once.
    position_seconds : float
        How much of a recording a position stands for; 0 where that is not said.
    companions : tuple of Companion
        Parts of the whole product beside this model.
    source : str
        Where the numbers are from.
    """

    name: str
    recipe: Recipe
    layers: int
    d_model: int
    heads: int
    d_ff: int
    kv_heads: int = 0
    head_dim: int = 0
    activation: Activation = "gelu"
    gated: bool = False
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5
    bias: bool = True
    causal: bool = False
    stem: Stem = "tokens"
    vocab: int = 0
    token_types: int = 0
    features: int = 0
    strides: tuple[int, ...] = ()
    position: Position = "none"
    max_positions: int = 0
    rope_base: float = 10_000.0
    rope_interleaved: bool = False
    conv_kernel: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    head: bool = False
    d_out: int = 0
    stack: int = 0
    chunk: int = 0
    left_context: int = 0
    right_context: int = 0
    position_seconds: float = 0.0
    companions: tuple[Companion, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if not hasattr(self.d_model, "free_symbols"):  # SymPy symbols are not checked
            _check_config(self)
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.d_model // self.heads)
        object.__setattr__(self, "strides", tuple(self.strides))

    @property
    def d_attention(self) -> int:
        """Width of all query heads together, H D."""
        return self.heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all key (or value) heads together, Hkv D."""
        return self.kv_heads * self.head_dim

    @property
    def reads(self) -> str:
        """Tokens, frames or patches."""
        return "frames" if self.stem == "stacked" else self.stem

    @property
    def reduction(self) -> int:
        """Rows that enter the stem for each position that leaves it."""
        return self.stack if self.stem == "stacked" else math.prod(self.strides)

    @property
    def streams(self) -> bool:
        """The input is taken chunk by chunk, and keys and values of earlier chunks are kept."""
        return self.chunk > 0

    @property
    def own_cache(self) -> int:
        """The most positions of the cache that a streaming pass makes for itself and compacts whenever it is full."""
        return self.left_context + self.compacted_chunks * self.chunk

    @property
    def compacted_chunks(self) -> int:
        """Chunks that fit behind the left context once such a cache is compacted: what is moved never overlaps."""
        return -(-self.left_context // self.chunk) + 1

    @property
    def chunk_seconds(self) -> float:
        """How much of a recording a chunk stands for."""
        return self.chunk * self.position_seconds

    @property
    def generates(self) -> bool:
        """A causal language model: it can continue a text, token by token."""
        return self.causal and self.head

    def check_cache(self, causal: bool) -> None:
        """Raise ConfigError where keys and values of past positions cannot be kept."""
        if self.streams:
            return
        if not causal:
            raise ConfigError(f"{self.name} is not causal: earlier positions change with later ones, so no cache fits")
        if self.recipe == "conformer" or self.position == "relative":
            raise ConfigError(f"{self.name} has {_needs_all_positions(self)}, which need all positions: no cache")
        if self.stem != "tokens":
            raise ConfigError(f"{self.name} reads {self.stem}, not tokens: it has no decode phase")

    def check_chunks(self, seq: Any, past: Any = 0) -> None:
        """Raise ConfigError where a streaming model cannot take `seq` positions behind `past` earlier ones."""
        if hasattr(seq, "free_symbols") or hasattr(past, "free_symbols"):
            raise UnsupportedError(f"{self.name} runs in chunks, whose number takes figures, not symbols")
        if _some(past > self.left_context):
            raise ConfigError(f"kv_len is {past}; {self.name} sees no more than {self.left_context} earlier positions")
        if _some((past == 0) & (seq < self.chunk)):
            raise ConfigError(
                f"{seq} positions do not fill the first chunk: {self.name} takes {self.chunk} at a time, that is "
                f"{self.stem_length(self.chunk)} rows with the right context"
            )

    def stem_length(self, seq: Any) -> Any:
        """Rows that enter the stem so that `seq` positions leave it; of a streaming model with its right context."""
        return seq - 1 if self.stem == "patches" else (seq + self.right_context) * self.reduction

    def positions(self, rows: int) -> int:
        """Positions that leave the stem when `rows` enter, without the right context."""
        if self.stem == "patches":
            return rows + 1
        if self.stem == "stacked":
            return rows // self.stack - self.right_context
        for stride in self.strides:
            rows = -(-rows // stride)
        return rows


def _check_config(config: ModelConfig) -> None:
    for name in ("layers", "d_model", "heads", "d_ff", "kv_heads", *_needed_sizes(config)):
        _check_size(name, getattr(config, name), least=1)
    _check_most("layers", config.layers, MOST_LAYERS)
    for name in _SIZES:
        _check_size(name, getattr(config, name), least=0)
    for name in ("eps", "rope_base"):
        _check_number(name, getattr(config, name))
    if not config.head_dim and config.d_model % config.heads:
        raise ConfigError(
            f"heads={config.heads} does not divide d_model={config.d_model}: choose a divisor or give head_dim"
        )
    if config.heads % config.kv_heads:
        raise ConfigError(f"kv_heads={config.kv_heads} does not divide heads={config.heads}")
    if config.position == "relative" and config.kv_heads != config.heads:
        raise ConfigError("relative positions need kv_heads equal to heads")
    head_dim = config.head_dim or config.d_model // config.heads
    if config.position == "rotary" and head_dim % 2:
        raise ConfigError(f"rotary positions need an even head width; it is {head_dim}")
    if config.stem == "frames" and not config.strides:
        raise ConfigError("stem 'frames' is made of convolutions: give strides, one for each")
    for stride in config.strides:
        _check_size("a stride", stride, least=1)
    if config.stem == "stacked" and config.d_model % config.stack:
        raise ConfigError(f"stack={config.stack} does not divide d_model={config.d_model}: choose a divisor")
    if config.head and config.d_out:
        raise ConfigError("a model has a language head or a last linear map of width d_out, not both")
    _check_streaming(config)


_SIZES = (
    "head_dim", "vocab", "features", "conv_kernel", "max_positions", "token_types", "d_out", "stack", "chunk",
    "left_context", "right_context",
)  # fmt: skip


def _check_streaming(config: ModelConfig) -> None:
    """The Emformer takes chunks and nothing else does; its keys know no position and no order."""
    if config.recipe == "emformer":
        if (config.stem, config.position, config.causal) != ("stacked", "none", False):
            raise ConfigError("recipe 'emformer' needs stem 'stacked', position 'none' and causal false")
    elif config.chunk or config.left_context or config.right_context:
        raise ConfigError(f"chunk, left_context and right_context belong to recipe 'emformer', not '{config.recipe}'")


def _some(condition: Any) -> bool:
    """Whether a condition holds, for any element where it is an array."""
    return bool(condition.any() if hasattr(condition, "any") else condition)


def _needs_all_positions(config: ModelConfig) -> str:
    return "relative positions" if config.position == "relative" else "convolutions over time"


def _needed_sizes(config: ModelConfig) -> list[str]:
    """The optional sizes that this kind of model cannot do without."""
    needed = ["vocab" if config.stem == "tokens" else "features"]
    if config.recipe == "conformer":
        needed.append("conv_kernel")
    if config.recipe == "emformer":
        needed.append("chunk")
    if config.stem == "stacked":
        needed.append("stack")
    if config.position in ("learned", "sinusoidal"):
        needed.append("max_positions")
    return needed


def _check_size(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    _check_most(name, value)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0")


def _check_most(name: str, value: int, most: int = LARGEST) -> None:
    if value > most:
        raise ConfigError(f"{name} is {value}; it must be at most {most}")


@dataclass(frozen=True)
class Workload:
    """What a model is given to do.

    Attributes
    ----------
    seq : int, or array of int, or SymPy symbol
        T, positions that enter the first layer (after the stem) in one step.
    batch : int, or array, or symbol
        B.
    phase : {"prefill", "decode"}
        All positions at once; or `steps` steps of `seq` positions each, after `kv_len` positions that a cache holds.
    causal : bool, optional
        Overrides the model's own.
    dtype : {"float16", "float32", "float64"}
    kv_len : int, or array, or symbol
        Positions in the cache before the first step.
    steps : int
    fills_cache : bool
        A prefill writes its keys and values into a cache; decoding always does.
    """

    seq: Any = 1
    batch: Any = 1
    phase: str = "prefill"
    causal: bool | None = None
    dtype: str = "float32"
    kv_len: Any = 0
    steps: int = 1
    fills_cache: bool = False

    def __post_init__(self) -> None:
        for name, least in (("seq", 1), ("batch", 1), ("kv_len", 0), ("steps", 1)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
            if isinstance(value, int):
                _check_most(name, value, MOST_STEPS if name == "steps" else LARGEST)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.phase not in PHASES:
            raise unknown("phase", self.phase, PHASES)
        if self.phase == "decode":
            object.__setattr__(self, "fills_cache", True)
        elif self.steps != 1 or not isinstance(self.kv_len, int) or self.kv_len:
            raise ConfigError("kv_len and steps belong to phase 'decode'; a prefill starts with an empty cache")

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the model cannot do this work."""
        if config.streams:
            if self.is_causal(config):
                raise ConfigError(f"{config.name} sees whole chunks and the right context: causal must be false")
            config.check_chunks(self.seq, self.kv_len)
            if self.steps > 1 and _some(self.seq % config.chunk != 0):
                raise ConfigError(
                    f"seq is {self.seq}; only the last chunk may be shorter: give a multiple of {config.chunk}"
                )
        if self.fills_cache:
            config.check_cache(self.is_causal(config))

    def is_causal(self, config: ModelConfig) -> bool:
        """Whether position i sees only positions up to i."""
        return config.causal if self.causal is None else self.causal


@cache
def presets() -> dict[str, ModelConfig]:
    """Model shapes by name, from ``presets.toml``."""
    table = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))
    return {name: _from_table(name, entry) for name, entry in table.items()}


def _from_table(name: str, entry: dict[str, Any]) -> ModelConfig:
    companions = tuple(Companion(**one) for one in entry.pop("companions", ()))
    return ModelConfig(name=name, companions=companions, **entry)


def preset(name: str) -> ModelConfig:
    """The preset called `name`; raises ConfigError with the nearest name otherwise."""
    if name not in presets():
        raise unknown("model", name, presets())
    return presets()[name]


def config_from_huggingface(path: Path) -> ModelConfig:
    """Read the shape from a Hugging Face ``config.json``.

    Raises
    ------
    ConfigError
        If the file is not JSON, its ``model_type`` is not one of those in `_FAMILIES`, or a field is missing.
    """
    try:
        given = json.loads(path.read_text("utf-8"))
        family = given["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a model config.json with a model_type ({error})") from error
    if not isinstance(family, str) or family not in _FAMILIES:
        raise unknown(f"model_type in {path}", str(family), _FAMILIES)
    try:
        return _FAMILIES[family](path.parent.name or "custom", given)
    except KeyError as error:
        raise ConfigError(f"{path}: the field {error} is missing") from error
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: a field has the wrong type ({error})") from error


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]


def _bert(name: str, given: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        name=name,
        recipe="post-norm",
        layers=given["num_hidden_layers"],
        d_model=given["hidden_size"],
        heads=given["num_attention_heads"],
        d_ff=given["intermediate_size"],
        activation=_activation(given.get("hidden_act", "gelu")),
        eps=given.get("layer_norm_eps", 1e-12),
        vocab=given["vocab_size"],
        token_types=given.get("type_vocab_size", 2),
        position="learned",
        max_positions=given["max_position_embeddings"],
        embedding_norm=True,
        final_norm=False,
        source="config.json",
    )


def _dinov2(name: str, given: dict[str, Any]) -> ModelConfig:
    d_model, patch = given["hidden_size"], given.get("patch_size", 14)
    return ModelConfig(
        name=name,
        recipe="pre-norm",
        layers=given["num_hidden_layers"],
        d_model=d_model,
        heads=given["num_attention_heads"],
        d_ff=int(d_model * given.get("mlp_ratio", 4)),
        activation=_activation(given.get("hidden_act", "gelu")),
        eps=given.get("layer_norm_eps", 1e-6),
        stem="patches",
        features=given.get("num_channels", 3) * patch**2,
        position="learned",
        max_positions=1 + (given.get("image_size", 518) // patch) ** 2,
        source="config.json",
    )


def _whisper(name: str, given: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        name=name,
        recipe="pre-norm",
        layers=given["encoder_layers"],
        d_model=given["d_model"],
        heads=given["encoder_attention_heads"],
        d_ff=given["encoder_ffn_dim"],
        activation=_activation(given.get("activation_function", "gelu")),
        stem="frames",
        features=given.get("num_mel_bins", 80),
        strides=(1, 2),
        position="sinusoidal",
        max_positions=given.get("max_source_positions", 1500),
        source="config.json",
    )


def _gpt2(name: str, given: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        name=name,
        recipe="pre-norm",
        layers=given["n_layer"],
        d_model=given["n_embd"],
        heads=given["n_head"],
        d_ff=given.get("n_inner") or 4 * given["n_embd"],
        activation=_activation(given.get("activation_function", "gelu_new")),
        eps=given.get("layer_norm_epsilon", 1e-5),
        causal=True,
        vocab=given["vocab_size"],
        position="learned",
        max_positions=given["n_positions"],
        head=True,
        source="config.json",
    )


def _rope_base(given: dict[str, Any]) -> float:
    """The base of the angles, from either place where configurations keep it; scaled angles are refused."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rotary positions of type '{kind}' are not supported; only 'default' is")
    return float(rope.get("rope_theta", given.get("rope_theta", 10_000.0)))


def _llama(name: str, given: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        name=name,
        recipe="pre-norm",
        layers=given["num_hidden_layers"],
        d_model=given["hidden_size"],
        heads=given["num_attention_heads"],
        kv_heads=given.get("num_key_value_heads", given["num_attention_heads"]),
        head_dim=given.get("head_dim") or 0,
        d_ff=given["intermediate_size"],
        activation=_activation(given.get("hidden_act", "silu")),
        gated=True,
        norm="rms",
        eps=given.get("rms_norm_eps", 1e-5),
        bias=False,
        causal=True,
        vocab=given["vocab_size"],
        position="rotary",
        max_positions=given["max_position_embeddings"],
        rope_base=_rope_base(given),
        head=True,
        source="config.json",
    )


_FAMILIES = {"bert": _bert, "whisper": _whisper, "gpt2": _gpt2, "llama": _llama, "dinov2": _dinov2}

OVERRIDES = ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab")


def override(config: ModelConfig, **changes: int | None) -> ModelConfig:
    """`config` with the given sizes replaced; derived sizes follow.

    A new width or head count makes the head width d / H again; a new head count without `kv_heads` keeps the
    grouping of the original where it divides, else one key head per query head.
    """
    wanted = {name: value for name, value in changes.items() if value is not None}
    unknown_names = set(wanted) - {field.name for field in fields(ModelConfig)}
    if unknown_names:
        raise unknown("override", sorted(unknown_names)[0], OVERRIDES)
    if not wanted:
        return config
    if "d_model" in wanted or "heads" in wanted:
        wanted.setdefault("head_dim", 0)
    if "heads" in wanted and "kv_heads" not in wanted:
        grouping = config.heads // config.kv_heads
        wanted["kv_heads"] = wanted["heads"] // grouping if wanted["heads"] % grouping == 0 else 0
    return replace(config, **wanted)  # type: ignore[arg-type]
