"""Shapes of models: presets, config.json files, overrides, workloads and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refimpl.config import SYMBOLS_PER_SECOND, ModelConfig, Workload, config_from_huggingface, override, preset, presets
from refimpl.errors import ConfigError, EffrefError
from refimpl.weights import load_model, resolve_config

SMALL: dict[str, Any] = {"name": "small", "recipe": "pre-norm", "layers": 2, "d_model": 12, "heads": 4, "d_ff": 8}
SMALL["vocab"] = 5
STREAM: dict[str, Any] = {
    "recipe": "emformer", "stem": "stacked", "features": 3, "stack": 2, "chunk": 4, "head_dim": 2, "d_model": 8,
}  # fmt: skip


# --- ModelConfig ------------------------------------------------------------------------------------------------


def test_derived_sizes_follow() -> None:
    config = ModelConfig(**SMALL)
    assert (config.kv_heads, config.head_dim, config.d_attention, config.d_kv) == (4, 3, 12, 12)
    config = ModelConfig(**SMALL, kv_heads=2, head_dim=5)
    assert (config.d_attention, config.d_kv) == (20, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"d_ff": 2**40 + 1}, "at most 1099511627776"),
        ({"layers": 10**10}, "layers is 10000000000; it must be at most 10000"),
        ({"d_model": -1}, "d_model is -1"),
        ({"d_ff": 0}, "d_ff is 0"),
        ({"heads": 5}, "heads=5 does not divide d_model=12"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"position": "relative", "kv_heads": 2}, "kv_heads equal to heads"),
        ({"position": "rotary"}, "even head width; it is 3"),
        ({"vocab": 0}, "vocab is 0"),
        ({"chunk": 4}, "belong to recipe 'emformer', not 'pre-norm'"),
        ({"right_context": 1}, "belong to recipe 'emformer', not 'pre-norm'"),
        ({"stem": "stacked", "features": 3}, "stack is 0"),
        ({"stem": "stacked", "features": 3, "stack": 5}, "stack=5 does not divide d_model=12"),
        ({"stem": "frames", "features": 3}, "give strides"),
        ({"stem": "frames", "features": 3, "strides": (2, 0)}, "a stride is 0"),
        ({"d_out": -1}, "d_out is -1"),
        ({"d_out": 7, "head": True}, "not both"),
        ({"recipe": "emformer"}, "chunk is 0"),
        ({"recipe": "emformer", "chunk": 4, "left_context": -1}, "left_context is -1"),
        ({"recipe": "emformer", "chunk": 4}, "needs stem 'stacked', position 'none' and causal false"),
        ({**STREAM, "causal": True}, "needs stem 'stacked', position 'none' and causal false"),
        ({**STREAM, "position": "rotary"}, "needs stem 'stacked', position 'none' and causal false"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelConfig(**{**SMALL, **changes})


def test_stem_length_is_what_enters_the_stem() -> None:
    assert preset("conformer-m").stem_length(10) == 40
    assert preset("whisper-tiny-en").stem_length(1500) == 3000
    assert preset("deit-s").stem_length(197) == 196
    assert preset("gpt2").stem_length(7) == 7
    assert preset("emformer-rnnt-base").stem_length(4) == (4 + 1) * 4


@pytest.mark.parametrize("name", presets())
def test_positions_are_what_leaves_the_stem(name: str) -> None:
    config = preset(name)
    assert config.positions(config.stem_length(9)) == 9
    assert (config.reads == config.stem) == (config.stem != "stacked")


def test_positions_round_up_behind_strides_and_down_behind_stacks() -> None:
    assert preset("conformer-m").positions(9) == 3
    assert preset("emformer-rnnt-base").positions(23) == 5 - 1


# --- presets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_presets_name_their_source(name: str) -> None:
    assert preset(name).source
    assert preset(name).name == name


def test_a_streaming_preset_says_how_long_a_chunk_is_and_what_goes_with_it() -> None:
    config = preset("emformer-rnnt-base")
    assert (config.streams, preset("conformer-m").streams) == (True, False)
    assert config.chunk_seconds == pytest.approx(0.160)
    symbols = SYMBOLS_PER_SECOND * config.chunk_seconds
    assert {one.name: one.calls_per_chunk for one in config.companions} == pytest.approx(
        {"predictor": symbols, "joiner": config.chunk + symbols}
    )


def test_preset_suggests_a_name() -> None:
    with pytest.raises(ConfigError, match="unknown model 'gpt3': did you mean 'gpt2'"):
        preset("gpt3")


# --- names and paths --------------------------------------------------------------------------------------------


def test_resolve_config_takes_names_shapes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(BERT))
    assert resolve_config("gpt2") == preset("gpt2")
    assert resolve_config(preset("gpt2")) == preset("gpt2")
    assert resolve_config(path) == resolve_config(str(path)) == resolve_config(path.parent)
    assert resolve_config(path).name == "tiny"
    model = load_model(path, seed=2)
    assert (model.pretrained, model.source) == (False, "seeded random weights, seed 2")


@pytest.mark.parametrize("name", ["./absent", "absent/config.json", "~/absent-folder", "absent.json", "~absent/x"])
def test_resolve_config_names_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file or folder: .*absent"):
        resolve_config(name)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "é"])
def test_resolve_config_refuses_strange_names(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        resolve_config(name)


def test_resolve_config_suggests_names_and_aliases() -> None:
    with pytest.raises(ConfigError, match="unknown model 'wisper': did you mean 'whisper'"):
        resolve_config("wisper")


def test_load_model_refuses_unknown_choices() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'float8'"):
        load_model(ModelConfig(**SMALL), dtype="float8")
    with pytest.raises(ConfigError, match="unknown weights 'randm': did you mean 'random'"):
        load_model(ModelConfig(**SMALL), weights="randm")


def test_resolve_config_loads_no_heavy_package() -> None:
    code = (
        "import sys; from refimpl.weights import resolve_config; resolve_config('conformer-m'); "
        "heavy = {'numba', 'cupy', 'safetensors', 'tokenizers', 'scipy.io', 'scipy.signal'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- config.json ------------------------------------------------------------------------------------------------

BERT: dict[str, Any] = {
    "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 4,
    "intermediate_size": 24, "vocab_size": 9, "max_position_embeddings": 16, "layer_norm_eps": 1e-12,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 9, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 5e5,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 12, "n_head": 4, "vocab_size": 9, "n_positions": 16,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "model_type": "whisper", "encoder_layers": 2, "d_model": 12, "encoder_attention_heads": 4, "encoder_ffn_dim": 24,
}  # fmt: skip


def read(folder: Path, given: object) -> ModelConfig:
    (folder / "config.json").write_text(given if isinstance(given, str) else json.dumps(given))
    return config_from_huggingface(folder / "config.json")


def test_config_of_bert(tmp_path: Path) -> None:
    config = read(tmp_path, BERT)
    assert (config.recipe, config.layers, config.d_model, config.heads, config.d_ff) == ("post-norm", 2, 12, 4, 24)
    assert (config.eps, config.vocab, config.max_positions, config.token_types) == (1e-12, 9, 16, 2)
    assert (config.causal, config.embedding_norm, config.final_norm) == (False, True, False)


def test_config_of_llama(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.kv_heads, config.head_dim, config.rope_base, config.eps) == (2, 4, 5e5, 1e-6)
    assert (config.gated, config.norm, config.bias, config.causal, config.position) == (
        True, "rms", False, True, "rotary",
    )  # fmt: skip
    assert not config.rope_interleaved  # files with these names pair halves


def test_config_of_gpt2(tmp_path: Path) -> None:
    config = read(tmp_path, GPT2)
    assert (config.d_ff, config.activation, config.causal, config.head) == (48, "gelu_tanh", True, True)


def test_config_of_whisper(tmp_path: Path) -> None:
    config = read(tmp_path, WHISPER)
    assert (config.stem, config.features, config.strides, config.max_positions) == ("frames", 80, (1, 2), 1500)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "not a model config.json"),
        ("{", "not a model config.json"),
        ("[" * 100_000, "not a model config.json"),
        ([1], "not a model config.json"),
        ({"hidden_size": 8}, "model_type"),
        ({**BERT, "model_type": "brt"}, "did you mean 'bert'"),
        ({**BERT, "hidden_act": "tanh"}, "unknown activation 'tanh'"),
        ({**BERT, "num_attention_heads": 5}, "heads=5 does not divide"),
        ({**BERT, "layer_norm_eps": "x"}, "eps is 'x'; it must be a number above 0"),
        ({**LLAMA, "rope_theta": float("nan")}, "rope_base is nan; it must be a number above 0"),
        ({**LLAMA, "rope_theta": "x"}, "a field has the wrong type"),
        ({**LLAMA, "rope_scaling": 5}, "a field has the wrong type"),
        ({k: v for k, v in BERT.items() if k != "hidden_size"}, "'hidden_size' is missing"),
        ({k: v for k, v in LLAMA.items() if k != "intermediate_size"}, "'intermediate_size' is missing"),
    ],
)
def test_unusable_config_files_are_refused(given: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, given)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_config(tmp_path)


# --- override ---------------------------------------------------------------------------------------------------


def test_override_of_nothing_changes_nothing() -> None:
    config = preset("smollm2-135m")
    assert override(config, layers=None) is config


def test_override_keeps_the_grouping_of_heads() -> None:
    config = override(preset("smollm2-135m"), heads=18, d_model=1152)
    assert (config.heads, config.kv_heads, config.head_dim) == (18, 6, 64)


def test_override_of_the_width_changes_the_head_width() -> None:
    assert override(preset("conformer-m"), d_model=512).head_dim == 128
    assert override(preset("conformer-m"), layers=3).head_dim == 64


def test_override_refuses_unknown_and_impossible_sizes() -> None:
    with pytest.raises(ConfigError, match="unknown override 'layer': did you mean 'layers'"):
        override(preset("gpt2"), layer=3)
    with pytest.raises(ConfigError, match="heads=7 does not divide d_model=768"):
        override(preset("gpt2"), heads=7)


# --- Workload ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq": 0}, "seq is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 10**30}, "at most 1099511627776"),
        ({"phase": "decode", "steps": 2**40}, "steps is 1099511627776; it must be at most 1048576"),
        ({"dtype": "float8"}, "unknown dtype 'float8': did you mean 'float"),
        ({"phase": "prefil"}, "did you mean 'prefill'"),
    ],
)
def test_impossible_workloads_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(EffrefError, match=said):
        Workload(**{"seq": 8, **changes})


def test_a_workload_may_overrule_the_mask() -> None:
    assert Workload(8).is_causal(preset("gpt2"))
    assert not Workload(8, causal=False).is_causal(preset("gpt2"))
    assert Workload(8, causal=True).is_causal(preset("minilm-l6"))
