"""The words that all packages share: the shape of a model and the work it is given.

Sizes are written with one letter each in comments and formulas: B batch, T length, d model width, H heads,
D head width, f feed-forward width, L layers, V vocabulary.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from refimpl.errors import ConfigError, unknown

Recipe = Literal["post-norm", "pre-norm", "conformer"]
Stem = Literal["tokens", "frames", "patches"]
Position = Literal["learned", "sinusoidal", "relative", "rotary", "none"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]

DTYPES: dict[str, int] = {"float16": 2, "float32": 4, "float64": 8}  # name -> bytes per element
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer.

    Attributes
    ----------
    name : str
        Preset name, folder name or ``"custom"``.
    recipe : {"post-norm", "pre-norm", "conformer"}
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
    stem : {"tokens", "frames", "patches"}
        What enters: token ids (B, T); feature frames (B, T * prod(strides), features); image patches (B, T - 1,
        features), to which a class token is added.
    vocab, token_types, features, strides
        Sizes of the stem. Each stride is one convolution of kernel 3.
    position : {"learned", "sinusoidal", "relative", "rotary", "none"}
    max_positions : int
        Rows of the position table in the pretrained model; 0 where there is no limit.
    rope_base, rope_interleaved
        Rotary angles are ``p * rope_base ** (-2 i / D)``; pairs are (2i, 2i + 1) when interleaved, else (i, i + D/2).
    conv_kernel : int
        Taps of the Conformer's depthwise convolution.
    embedding_norm, final_norm, head : bool
        Norm after the stem; norm after the last layer; language head tied to the embedding.
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
    def generates(self) -> bool:
        """A causal language model: it can continue a text, token by token."""
        return self.causal and self.head

    def check_cache(self, causal: bool) -> None:
        """Raise ConfigError where keys and values of past positions cannot be kept."""
        if not causal:
            raise ConfigError(f"{self.name} is not causal: earlier positions change with later ones, so no cache fits")
        if self.recipe == "conformer" or self.position == "relative":
            raise ConfigError(f"{self.name} has {_needs_all_positions(self)}, which need all positions: no cache")
        if self.stem != "tokens":
            raise ConfigError(f"{self.name} reads {self.stem}, not tokens: it has no decode phase")

    def stem_length(self, seq: Any) -> Any:
        """Rows that enter the stem so that `seq` positions leave it."""
        if self.stem == "patches":
            return seq - 1
        for stride in self.strides:
            seq = seq * stride
        return seq


def _check_config(config: ModelConfig) -> None:
    for name in ("layers", "d_model", "heads", "d_ff", "kv_heads", *_needed_sizes(config)):
        _check_size(name, getattr(config, name), least=1)
    for name in ("head_dim", "vocab", "features", "conv_kernel", "max_positions", "token_types"):
        _check_size(name, getattr(config, name), least=0)
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


def _needs_all_positions(config: ModelConfig) -> str:
    return "relative positions" if config.position == "relative" else "convolutions over time"


def _needed_sizes(config: ModelConfig) -> list[str]:
    """The optional sizes that this kind of model cannot do without."""
    needed = ["vocab" if config.stem == "tokens" else "features"]
    if config.recipe == "conformer":
        needed.append("conv_kernel")
    if config.position in ("learned", "sinusoidal"):
        needed.append("max_positions")
    return needed


def _check_size(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")


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
        if self.fills_cache:
            config.check_cache(self.is_causal(config))

    def is_causal(self, config: ModelConfig) -> bool:
        """Whether position i sees only positions up to i."""
        return config.causal if self.causal is None else self.causal


@cache
def presets() -> dict[str, ModelConfig]:
    """Model shapes by name, from ``presets.toml``."""
    table = tomllib.loads(resources.files("refimpl").joinpath("presets.toml").read_text("utf-8"))
    return {name: ModelConfig(name=name, **entry) for name, entry in table.items()}


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a model config.json with a model_type ({error})") from error
    if not isinstance(family, str) or family not in _FAMILIES:
        raise unknown(f"model_type in {path}", str(family), _FAMILIES)
    try:
        return _FAMILIES[family](path.parent.name or "custom", given)
    except KeyError as error:
        raise ConfigError(f"{path}: the field {error} is missing") from error
    except TypeError as error:
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


_FAMILIES = {"bert": _bert, "whisper": _whisper, "gpt2": _gpt2, "llama": _llama}

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
