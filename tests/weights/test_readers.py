"""Checkpoint folders: every family's names, orders and axes, and files that are damaged or of another model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.config import override, preset
from refimpl.errors import ConfigError, EffrefError, WeightsError
from refimpl.weights import load_model, pretrained, readers, resolve_config
from refimpl.weights.layout import shapes

safetensors = pytest.importorskip("safetensors.numpy")

Tensors = dict[str, np.ndarray]
D, F = 8, 16  # d, f of all models here; 2 heads, 2 layers


RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    """Numbers that differ from call to call, so that no two tensors can be taken for each other."""
    return RNG.standard_normal(shape).astype(np.float32)


def linear(name: str, d_out: int, d_in: int, bias: bool = True) -> Tensors:
    made = {f"{name}.weight": values(d_out, d_in)}
    return {**made, f"{name}.bias": values(d_out)} if bias else made


def norm(name: str) -> Tensors:
    return {f"{name}.weight": values(D), f"{name}.bias": values(D)}


def bert() -> tuple[dict[str, Any], Tensors]:
    config = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": D, "num_attention_heads": 2}
    config |= {"intermediate_size": F, "vocab_size": 11, "max_position_embeddings": 7, "type_vocab_size": 2}
    tensors = {
        "embeddings.word_embeddings.weight": values(11, D),
        "embeddings.position_embeddings.weight": values(7, D),
        "embeddings.token_type_embeddings.weight": values(2, D),
        "embeddings.position_ids": np.arange(7)[None],
        **norm("embeddings.LayerNorm"),
        **linear("pooler.dense", D, D),
    }
    for i in range(2):
        at = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            tensors |= linear(f"{at}attention.self.{part}", D, D)
        tensors |= linear(f"{at}attention.output.dense", D, D) | norm(f"{at}attention.output.LayerNorm")
        tensors |= linear(f"{at}intermediate.dense", F, D) | linear(f"{at}output.dense", D, F)
        tensors |= norm(f"{at}output.LayerNorm")
    return config, tensors


def llama() -> tuple[dict[str, Any], Tensors]:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": D, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "intermediate_size": F, "vocab_size": 11, "max_position_embeddings": 64}
    tensors = {"model.embed_tokens.weight": values(11, D), "model.norm.weight": values(D)}
    for i in range(2):
        at = f"model.layers.{i}."
        for part, rows in (("q", D), ("k", D // 2), ("v", D // 2), ("o", D)):
            tensors |= linear(f"{at}self_attn.{part}_proj", rows, D, bias=False)
        tensors |= linear(f"{at}mlp.gate_proj", F, D, False) | linear(f"{at}mlp.up_proj", F, D, False)
        tensors |= linear(f"{at}mlp.down_proj", D, F, False)
        tensors |= {f"{at}{part}.weight": values(D) for part in ("input_layernorm", "post_attention_layernorm")}
    return config, tensors


def gpt2() -> tuple[dict[str, Any], Tensors]:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": D, "n_head": 2, "n_inner": F, "vocab_size": 11}
    config |= {"n_positions": 7}
    tensors = {"wte.weight": values(11, D), "wpe.weight": values(7, D), **norm("ln_f")}
    for i in range(2):
        at = f"h.{i}."
        tensors |= norm(f"{at}ln_1") | norm(f"{at}ln_2") | {f"{at}attn.bias": np.ones((1, 1, 7, 7), np.uint8)}
        for part, d_in, d_out in (("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D), ("mlp.c_fc", D, F)):
            tensors |= {f"{at}{part}.weight": values(d_in, d_out), f"{at}{part}.bias": values(d_out)}
        tensors |= {f"{at}mlp.c_proj.weight": values(F, D), f"{at}mlp.c_proj.bias": values(D)}
    return config, tensors


def whisper() -> tuple[dict[str, Any], Tensors]:
    config = {"model_type": "whisper", "encoder_layers": 2, "d_model": D, "encoder_attention_heads": 2}
    config |= {"encoder_ffn_dim": F, "num_mel_bins": 5, "max_source_positions": 6}
    at = "model.encoder."
    tensors = {
        f"{at}conv1.weight": values(D, 5, 3), f"{at}conv1.bias": values(D),
        f"{at}conv2.weight": values(D, D, 3), f"{at}conv2.bias": values(D),
        f"{at}embed_positions.weight": values(6, D), **norm(f"{at}layer_norm"),
        "model.decoder.embed_tokens.weight": values(11, D), "proj_out.weight": values(11, D),
    }  # fmt: skip
    for i in range(2):
        at = f"model.encoder.layers.{i}."
        for part in ("q", "k", "v", "out"):
            tensors |= linear(f"{at}self_attn.{part}_proj", D, D, bias=part != "k")
        tensors |= norm(f"{at}self_attn_layer_norm") | norm(f"{at}final_layer_norm")
        tensors |= linear(f"{at}fc1", F, D) | linear(f"{at}fc2", D, F)
    return config, tensors


def dinov2() -> tuple[dict[str, Any], Tensors]:
    config = {"model_type": "dinov2", "num_hidden_layers": 2, "hidden_size": D, "num_attention_heads": 2}
    config |= {"mlp_ratio": F // D, "patch_size": 2, "image_size": 6}
    tensors = {
        "embeddings.cls_token": values(1, 1, D), "embeddings.mask_token": values(1, D),
        "embeddings.position_embeddings": values(1, 10, D),
        "embeddings.patch_embeddings.projection.weight": values(D, 3, 2, 2),
        "embeddings.patch_embeddings.projection.bias": values(D), **norm("layernorm"),
    }  # fmt: skip
    for i in range(2):
        at = f"encoder.layer.{i}."
        tensors |= norm(f"{at}norm1") | norm(f"{at}norm2") | linear(f"{at}attention.output.dense", D, D)
        for part in ("query", "key", "value"):
            tensors |= linear(f"{at}attention.attention.{part}", D, D)
        tensors |= linear(f"{at}mlp.fc1", F, D) | linear(f"{at}mlp.fc2", D, F)
        tensors |= {f"{at}layer_scale{n}.lambda1": values(D) for n in (1, 2)}
    return config, tensors


FAMILIES = {"dinov2": dinov2, "bert": bert, "llama": llama, "gpt2": gpt2, "whisper": whisper}
Made = tuple[Path, Tensors]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Made]:
    """Writes a folder of a family, changed by the caller, and returns it with its tensors."""

    def write(family: str, change: Callable[[dict[str, Any], Tensors], None] | None = None) -> Made:
        config, tensors = FAMILIES[family]()
        if change:
            change(config, tensors)
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.save_file(tensors, folder / "model.safetensors")
        return folder, tensors

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_read_checkpoint_gives_every_weight(family: str, checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint(family)
    model = load_model(str(folder))
    assert model.pretrained
    assert model.source == f"checkpoint {folder}"
    assert model.assets == folder
    assert resolve_config(folder) == model.config
    found = readers.read_checkpoint(folder, model.config).tensors
    assert {name: tensor.shape for name, tensor in found.items()} == shapes(model.config)
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in found.values())


# family: canonical name -> stored name, of what is taken as it is
UNCHANGED = {
    "dinov2": {
        "stem.patches.bias": "embeddings.patch_embeddings.projection.bias",
        "layers.1.attention_norm.weight": "encoder.layer.1.norm1.weight",
        "layers.1.feed_forward_norm.bias": "encoder.layer.1.norm2.bias",
        "layers.1.feed_forward.up.weight": "encoder.layer.1.mlp.fc1.weight",
        "final_norm.bias": "layernorm.bias",
    },
    "bert": {
        "stem.token_types": "embeddings.token_type_embeddings.weight",
        "stem.norm.bias": "embeddings.LayerNorm.bias",
        "layers.1.attention.output.weight": "encoder.layer.1.attention.output.dense.weight",
        "layers.1.attention_norm.weight": "encoder.layer.1.attention.output.LayerNorm.weight",
        "layers.1.feed_forward.up.bias": "encoder.layer.1.intermediate.dense.bias",
        "layers.1.feed_forward.down.weight": "encoder.layer.1.output.dense.weight",
        "layers.1.feed_forward_norm.weight": "encoder.layer.1.output.LayerNorm.weight",
    },
    "llama": {
        "stem.embedding": "model.embed_tokens.weight",
        "layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
        "layers.0.feed_forward_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "layers.0.attention.output.weight": "model.layers.0.self_attn.o_proj.weight",
        "layers.0.feed_forward.down.weight": "model.layers.0.mlp.down_proj.weight",
        "final_norm.weight": "model.norm.weight",
    },
    "gpt2": {
        "stem.positions": "wpe.weight",
        "layers.1.attention_norm.weight": "h.1.ln_1.weight",
        "layers.1.feed_forward_norm.bias": "h.1.ln_2.bias",
        "layers.1.attention.output.bias": "h.1.attn.c_proj.bias",
        "layers.1.feed_forward.up.bias": "h.1.mlp.c_fc.bias",
        "final_norm.bias": "ln_f.bias",
    },
    "whisper": {
        "stem.positions": "model.encoder.embed_positions.weight",
        "stem.convolutions.0.bias": "model.encoder.conv1.bias",
        "layers.1.attention_norm.weight": "model.encoder.layers.1.self_attn_layer_norm.weight",
        "layers.1.feed_forward_norm.weight": "model.encoder.layers.1.final_layer_norm.weight",
        "layers.1.attention.output.weight": "model.encoder.layers.1.self_attn.out_proj.weight",
        "layers.1.feed_forward.up.weight": "model.encoder.layers.1.fc1.weight",
        "layers.1.feed_forward.down.bias": "model.encoder.layers.1.fc2.bias",
        "final_norm.bias": "model.encoder.layer_norm.bias",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_read_checkpoint_takes_each_weight_from_its_place(family: str, checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint(family)
    found = readers.read_checkpoint(folder, resolve_config(folder)).tensors
    wrong = [name for name, source in UNCHANGED[family].items() if not np.array_equal(found[name], stored[source])]
    assert wrong == []


def test_bert_joins_queries_keys_and_values(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("bert")
    layer = load_model(folder).weights.layers[1]
    for leaf in ("weight", "bias"):
        parts = [stored[f"encoder.layer.1.attention.self.{part}.{leaf}"] for part in ("query", "key", "value")]
        assert np.array_equal(getattr(layer.attention.qkv, leaf), np.concatenate(parts))


def test_bert_reads_prefixed_and_old_names(checkpoint: Callable[..., Made]) -> None:
    def rename(_: dict[str, Any], tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(name)
        tensors["cls.predictions.bias"] = values(11)

    folder, stored = checkpoint("bert", rename)
    stem = load_model(folder).weights.stem
    assert np.array_equal(stem.norm.weight, stored["bert.embeddings.LayerNorm.gamma"])
    assert np.array_equal(stem.positions, stored["bert.embeddings.position_embeddings.weight"])


def test_llama_puts_the_gate_before_the_other_input_matrix(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("llama")
    model = load_model(folder)
    up = model.weights.layers[0].feed_forward.up.weight
    assert np.array_equal(up[:F], stored["model.layers.0.mlp.gate_proj.weight"])
    assert np.array_equal(up[F:], stored["model.layers.0.mlp.up_proj.weight"])
    assert model.weights.layers[0].attention.qkv.weight.shape == (2 * D, D)
    assert not model.config.rope_interleaved
    assert model.config.head


def test_llama_with_a_tied_head_in_the_file_keeps_its_head(checkpoint: Callable[..., Made]) -> None:
    def tie(_: dict[str, Any], tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    assert load_model(checkpoint("llama", tie)[0]).config.head


def test_llama_with_a_head_of_its_own_gives_hidden_states(checkpoint: Callable[..., Made]) -> None:
    def untie(_: dict[str, Any], tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    model = load_model(checkpoint("llama", untie)[0])
    assert not model.config.head
    assert "without its language head" in model.source


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0}},
    ],
)
def test_llama_with_other_rotary_positions_is_refused(fields: dict[str, Any], checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("llama", lambda config, _: config.update(fields))
    with pytest.raises(EffrefError, match=r"config\.json.*rope|rotary"):
        load_model(folder)


def test_dinov2_tables_lose_their_batch_axis_and_patches_lie_in_rows(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("dinov2")
    stem = load_model(folder).weights.stem
    assert np.array_equal(stem.positions, stored["embeddings.position_embeddings"][0])
    assert np.array_equal(stem.class_token, stored["embeddings.cls_token"][0])
    green = stored["embeddings.patch_embeddings.projection.weight"][3, 1]
    assert np.array_equal(stem.patches.weight[3, 4:8], green.ravel())


def test_layer_scale_is_multiplied_into_the_output_maps(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("dinov2")
    layer, at = load_model(folder).weights.layers[1], "encoder.layer.1."
    for found, source, scale in (
        (layer.attention.output, f"{at}attention.output.dense", stored[f"{at}layer_scale1.lambda1"]),
        (layer.feed_forward.down, f"{at}mlp.fc2", stored[f"{at}layer_scale2.lambda1"]),
    ):
        assert np.array_equal(found.weight, np.diag(scale) @ stored[f"{source}.weight"])
        assert np.array_equal(found.bias, scale * stored[f"{source}.bias"])


def test_a_dinov2_with_another_feed_forward_is_refused(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("dinov2", lambda config, _: config.update(use_swiglu_ffn=True))
    with pytest.raises(WeightsError, match="use_swiglu_ffn is True"):
        load_model(folder)


def test_gpt2_is_transposed(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("gpt2")
    layer = load_model(folder).weights.layers[1]
    assert np.array_equal(layer.attention.qkv.weight, stored["h.1.attn.c_attn.weight"].T)
    assert np.array_equal(layer.attention.output.weight, stored["h.1.attn.c_proj.weight"].T)  # square: not by shape
    assert np.array_equal(layer.feed_forward.down.weight, stored["h.1.mlp.c_proj.weight"].T)


def test_whisper_turns_convolutions_and_has_no_key_bias(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("whisper")
    weights = load_model(folder).weights
    assert np.array_equal(weights.stem.convolutions[1].weight, stored["model.encoder.conv2.weight"].transpose(0, 2, 1))
    bias = weights.layers[0].attention.qkv.bias
    assert not bias[D : 2 * D].any()
    assert np.array_equal(bias[2 * D :], stored["model.encoder.layers.0.self_attn.v_proj.bias"])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_load_model_casts(dtype: str, checkpoint: Callable[..., Made]) -> None:
    model = load_model(checkpoint("bert")[0], dtype=dtype)
    assert model.weights.layers[0].attention.qkv.weight.dtype == dtype


def test_load_model_refuses_values_too_large_for_float16(checkpoint: Callable[..., Made]) -> None:
    def enlarge(_: dict[str, Any], tensors: Tensors) -> None:
        tensors["embeddings.LayerNorm.weight"] = np.full(D, 1e6, np.float32)

    with pytest.raises(WeightsError, match=r"stem\.norm\.weight.*1e\+06.*float16"):
        load_model(checkpoint("bert", enlarge)[0], dtype="float16")


def test_float16_is_widened(checkpoint: Callable[..., Made]) -> None:
    def halve(_: dict[str, Any], tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(np.float16)

    folder, stored = checkpoint("gpt2", halve)
    embedding = load_model(folder).weights.stem.embedding
    assert embedding.dtype == np.float32
    assert np.array_equal(embedding, stored["wte.weight"].astype(np.float32))


def test_bfloat16_is_widened(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("llama")
    entries, data = {}, b""
    for name, tensor in stored.items():
        bits = (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        entries[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(bits)]}
        data += bits
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    embedding = load_model(folder).weights.stem.embedding
    truncated = stored["model.embed_tokens.weight"].view(np.uint32) & 0xFFFF0000
    assert np.array_equal(embedding.view(np.uint32), truncated)


def test_a_checkpoint_in_parts_is_read_by_its_index(checkpoint: Callable[..., Made]) -> None:
    folder, stored = checkpoint("gpt2")
    whole = load_model(folder).weights
    (folder / "model.safetensors").unlink()
    names = list(stored)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, held in parts.items():
        safetensors.save_file({name: stored[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / readers.INDEX).write_text(json.dumps(index))
    assert np.array_equal(
        load_model(folder).weights.layers[1].attention.qkv.weight, whole.layers[1].attention.qkv.weight
    )
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_damaged_index_is_refused(text: str, checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("gpt2")
    (folder / readers.INDEX).write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 3000, -1])
def test_a_truncated_file_is_refused(keep: int, checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read as safetensors"):
        load_model(folder)


def test_a_missing_tensor_is_named(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert", lambda _, tensors: tensors.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(WeightsError, match=r"lacks 'encoder\.layer\.1\.output\.dense\.bias'"):
        load_model(folder)


def test_a_tensor_without_a_place_is_named(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("llama", lambda _, t: t.update({"model.layers.0.self_attn.q_norm.weight": values(4)}))
    with pytest.raises(WeightsError, match=r"holds 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        load_model(folder)


def test_a_wrong_shape_is_named(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert", lambda _, t: t.update({"encoder.layer.0.intermediate.dense.weight": values(D, F)}))
    with pytest.raises(WeightsError, match=r"intermediate\.dense\.weight' \(8, 16\) does not make the shape \(16, 8\)"):
        load_model(folder)


def test_integer_weights_are_refused(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("gpt2", lambda _, t: t.update({"wte.weight": np.ones((11, D), np.int8)}))
    with pytest.raises(WeightsError, match=r"'wte\.weight' is stored as I8"):
        load_model(folder)


def test_nan_weights_are_refused(checkpoint: Callable[..., Made]) -> None:
    def spoil(_: dict[str, Any], tensors: Tensors) -> None:
        tensors["h.1.mlp.c_fc.bias"][0] = np.nan

    with pytest.raises(WeightsError, match=r"'layers\.1\.feed_forward\.up\.bias' holds NaN"):
        load_model(checkpoint("gpt2", spoil)[0])


def test_an_unknown_model_type_is_refused(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert", lambda config, _: config.update(model_type="bertt"))
    with pytest.raises(ConfigError, match="'bertt': did you mean 'bert'"):
        load_model(folder)


def test_other_position_embeddings_are_refused(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert", lambda config, _: config.update(position_embedding_type="relative_key"))
    with pytest.raises(WeightsError, match="position_embedding_type is 'relative_key'"):
        load_model(folder)


def test_a_folder_without_weights_is_refused_unless_random_ones_are_wanted(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled weights are not read"):
        load_model(folder)
    assert not load_model(folder, weights="random").pretrained


def test_a_longer_position_table_than_the_checkpoint_has_is_refused(checkpoint: Callable[..., Made]) -> None:
    folder, _ = checkpoint("bert")
    assert load_model(folder, positions=7).pretrained
    with pytest.raises(WeightsError, match="has 7 positions, 8 are needed"):
        load_model(folder, positions=8)


# --- CTranslate2 ------------------------------------------------------------------------------------------------


def ctranslate2_tensors() -> Tensors:
    tensors = {
        "encoder/num_heads": np.array(2, np.int16),
        "encoder/conv1/weight": values(D, 5, 3), "encoder/conv1/bias": values(D),
        "encoder/conv2/weight": values(D, D, 3), "encoder/conv2/bias": values(D),
        "encoder/position_encodings/encodings": values(6, D),
        "encoder/layer_norm/gamma": values(D), "encoder/layer_norm/beta": values(D),
        "decoder/embeddings/weight": values(11, D),
    }  # fmt: skip
    for i in range(2):
        at = f"encoder/layer_{i}/"
        for part, d_out, d_in in (
            ("self_attention/linear_0", 3 * D, D), ("self_attention/linear_1", D, D),
            ("ffn/linear_0", F, D), ("ffn/linear_1", D, F),
        ):  # fmt: skip
            tensors |= {f"{at}{part}/weight": values(d_out, d_in), f"{at}{part}/bias": values(d_out)}
        for part in ("self_attention", "ffn"):
            tensors |= {f"{at}{part}/layer_norm/gamma": values(D), f"{at}{part}/layer_norm/beta": values(D)}
    return tensors


def ctranslate2_bytes(tensors: Tensors, version: int = 6, spec: str = "WhisperSpec") -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        out += text(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        out += struct.pack("<BI", kinds[tensor.dtype.name], tensor.nbytes) + tensor.tobytes()
    return out + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def ctranslate2_folder(root: Path, data: bytes) -> Path:
    folder = root / "spoken"
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_ctranslate2_whisper_is_read(dtype: Any, tmp_path: Path) -> None:
    stored = {name: t if t.dtype == np.int16 else t.astype(dtype) for name, t in ctranslate2_tensors().items()}
    model = load_model(ctranslate2_folder(tmp_path, ctranslate2_bytes(stored)))
    config = model.config
    assert (config.name, config.layers, config.d_model, config.heads, config.d_ff) == ("spoken", 2, D, 2, F)
    assert (config.features, config.max_positions, config.stem, config.strides) == (5, 6, "frames", (1, 2))
    turned = stored["encoder/conv1/weight"].astype(np.float32).transpose(0, 2, 1)
    assert np.array_equal(model.weights.stem.convolutions[0].weight, turned)
    layer, at = model.weights.layers[1], "encoder/layer_1/"
    for found, name in (
        (layer.attention_norm.bias, f"{at}self_attention/layer_norm/beta"),
        (layer.attention.qkv.weight, f"{at}self_attention/linear_0/weight"),
        (layer.attention.output.weight, f"{at}self_attention/linear_1/weight"),
        (layer.feed_forward_norm.weight, f"{at}ffn/layer_norm/gamma"),
        (layer.feed_forward.down.weight, f"{at}ffn/linear_1/weight"),
        (model.weights.final_norm.weight, "encoder/layer_norm/gamma"),
    ):
        assert np.array_equal(found, stored[name].astype(np.float32)), name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_ctranslate2_truncated_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = ctranslate2_bytes(ctranslate2_tensors())
    folder = ctranslate2_folder(tmp_path, whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(WeightsError, match=r"model\.bin"):
        load_model(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_ctranslate2_with_a_changed_byte_loads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(ctranslate2_bytes(ctranslate2_tensors()))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(EffrefError):
        assert load_model(ctranslate2_folder(tmp_path, bytes(whole))).pretrained


@pytest.mark.parametrize(("version", "spec"), [(5, "WhisperSpec"), (6, "TransformerSpec"), (0x80, "WhisperSpec")])
def test_ctranslate2_of_another_kind_is_refused(version: int, spec: str, tmp_path: Path) -> None:
    folder = ctranslate2_folder(tmp_path, ctranslate2_bytes(ctranslate2_tensors(), version, spec))
    with pytest.raises(WeightsError, match="is not a CTranslate2 file of version 6"):
        resolve_config(folder)


def test_ctranslate2_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = ctranslate2_tensors() | {"encoder/conv1/weight": np.ones((D, 5, 3), np.int8)}
    with pytest.raises(WeightsError, match="'encoder/conv1/weight' is stored as integers"):
        load_model(ctranslate2_folder(tmp_path, ctranslate2_bytes(tensors)))


def test_ctranslate2_without_an_encoder_is_refused(tmp_path: Path) -> None:
    tensors = {"decoder/embeddings/weight": values(11, D)}
    with pytest.raises(WeightsError, match="lacks 'encoder/position_encodings/encodings'"):
        load_model(ctranslate2_folder(tmp_path, ctranslate2_bytes(tensors)))


# --- ONNX ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_folder(tmp_path: Path) -> tuple[Path, Tensors]:
    """The tensors of `dinov2` as an exporter leaves them: matrices turned and nameless, the position table in two."""
    onnx = pytest.importorskip("onnx")
    _, tensors = dinov2()
    constants, nodes = {}, []
    for name, array in tensors.items():
        if name.startswith("encoder.") and array.ndim == 2:
            constants[f"onnx::MatMul_{len(nodes)}"] = array.T
            node = "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["x"], name=node))
        elif name == "embeddings.position_embeddings":
            constants |= {"onnx::Concat_1957": array[:, :1], "onnx::Reshape_1962": array[:, 1:]}
        else:
            constants[f"backbone.{name}"] = array
    constants["decoder.final.weight"] = values(1, D)
    made = [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes[::-1], "vit", [], [], made))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return tmp_path, tensors


def test_onnx_gives_what_safetensors_give(onnx_folder: tuple[Path, Tensors], checkpoint: Callable[..., Made]) -> None:
    folder, tensors = onnx_folder
    other, _ = checkpoint("dinov2", lambda _, stored: stored.update(tensors))
    config = resolve_config(other)
    found, wanted = (readers.read_checkpoint(place, config).tensors for place in (folder, other))
    assert list(found) == list(wanted) == list(shapes(config))
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_onnx_truncated_anywhere_is_refused(onnx_folder: tuple[Path, Tensors], data: st.DataObject) -> None:
    folder, _ = onnx_folder
    whole = (folder / "model.onnx").read_bytes()
    cut = folder / "cut"
    cut.mkdir(exist_ok=True)
    (cut / "model.onnx").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(WeightsError):
        readers.read_checkpoint(cut, override(preset("dinov2-s"), layers=2, d_model=D, heads=2, d_ff=F))


# --- fetched models ---------------------------------------------------------------------------------------------


def fetched(name: str) -> Any:
    if pretrained.folder(name) is None:
        pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
    return load_model(name, weights="pretrained")


@pytest.mark.models
def test_fetched_minilm_is_the_preset() -> None:
    model = fetched("minilm-l6")
    assert model.config == preset("minilm-l6")
    assert load_model("minilm").source == model.source
    assert model.weights.layers[5].feed_forward.down.weight.shape == (384, 1536)
    assert resolve_config(model.assets).d_ff == 1536


@pytest.mark.models
def test_fetched_whisper_is_the_preset() -> None:
    model = fetched("whisper-tiny-en")
    assert not model.weights.layers[0].attention.qkv.bias[384:768].any()  # Whisper's keys have no bias
    own = resolve_config(model.assets)
    for name in ("layers", "d_model", "heads", "d_ff", "features", "strides", "max_positions", "eps"):
        assert getattr(own, name) == getattr(model.config, name)
