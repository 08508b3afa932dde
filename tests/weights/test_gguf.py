"""GGUF: files of another writer, blocks by their definition, Hugging Face's names beside them, and damage."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl import forward
from refimpl.errors import ConfigError, EffrefError, InputError, MissingDependencyError, WeightsError
from refimpl.inputs import load_input
from refimpl.weights import load_model, pretrained, readers, resolve_config
from refimpl.weights.gguf_reader import GGUFFile, tokenizer
from refimpl.weights.layout import shapes

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.numpy")

Tensors = dict[str, np.ndarray]
Fields = dict[str, Any]
Kind = gguf.GGMLQuantizationType
D, F, V, T = 64, 96, 300, 9  # d, f, V of all models here; 2 layers; 4 query heads of 16

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    """Numbers that differ from call to call, so that no two tensors can be taken for each other."""
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


LLAMA: Fields = {
    "block_count": 2, "embedding_length": D, "feed_forward_length": F, "context_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500.0,
}  # fmt: skip
GPT2: Fields = {
    "block_count": 2, "embedding_length": D, "feed_forward_length": F, "context_length": 16,
    "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip


def llama() -> Tensors:
    tensors = {"token_embd.weight": values(V, D), "output_norm.weight": values(D)}
    for i in range(2):
        for part, d_out, d_in in (
            ("attn_q", D, D), ("attn_k", D // 2, D), ("attn_v", D // 2, D), ("attn_output", D, D),
            ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F),
        ):  # fmt: skip
            tensors[f"blk.{i}.{part}.weight"] = values(d_out, d_in)
        tensors |= {f"blk.{i}.{part}.weight": values(D) for part in ("attn_norm", "ffn_norm")}
    return tensors


def gpt2() -> Tensors:
    tensors = {"token_embd.weight": values(V, D), "position_embd.weight": values(16, D)}
    tensors |= {"output_norm.weight": values(D), "output_norm.bias": values(D)}
    for i in range(2):
        for part, d_out, d_in in (("attn_qkv", 3 * D, D), ("attn_output", D, D), ("ffn_up", F, D), ("ffn_down", D, F)):
            tensors |= {f"blk.{i}.{part}.weight": values(d_out, d_in), f"blk.{i}.{part}.bias": values(d_out)}
        for part in ("attn_norm", "ffn_norm"):
            tensors |= {f"blk.{i}.{part}.weight": values(D), f"blk.{i}.{part}.bias": values(D)}
    return tensors


MODELS = {"llama": (LLAMA, llama), "gpt2": (GPT2, gpt2)}

# GPT-2's byte alphabet, some merges, and a control token; "1 2" would join digits that SmolLM keeps apart
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
MERGES = ["t h", "Ġ th", "th e", "Ġ the", "1 2", "a n", "an d", "Ġ and"]
TOKENS = [*BYTES, *(pair.replace(" ", "") for pair in MERGES), "<|endoftext|>"]
TOKENIZER: Fields = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": MERGES, "add_bos_token": False}


def write(
    path: Path, architecture: str, fields: Fields, tensors: Tensors, kind: Any = Kind.F32, words: Fields = TOKENIZER
) -> Path:
    """A file by the writer of the package gguf; matrices are stored as `kind`, vectors as float32."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    for key, value in words.items():
        add = {bool: writer.add_bool, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"tokenizer.ggml.{key}", value)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Change = Callable[[Fields, Tensors], None]
Write = Callable[..., tuple[Path, Tensors]]


@pytest.fixture
def folder(tmp_path: Path) -> Write:
    """Writes a folder with a GGUF file, changed by the caller, and returns it with the tensors."""

    def make(architecture: str, change: Change | None = None, **more: Any) -> tuple[Path, Tensors]:
        fields, tensors = dict(MODELS[architecture][0]), MODELS[architecture][1]()
        if change:
            change(fields, tensors)
        return write(tmp_path / architecture / "model.gguf", architecture, fields, tensors, **more).parent, tensors

    return make


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MODELS)
def test_gguf_gives_every_weight(architecture: str, folder: Write) -> None:
    place, _ = folder(architecture)
    model = load_model(place)
    assert model.pretrained
    assert model.source == f"checkpoint {place}"
    assert model.config == resolve_config(place)
    found = readers.read_checkpoint(place, model.config).tensors
    assert {name: tensor.shape for name, tensor in found.items()} == shapes(model.config)
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in found.values())
    assert all(tensor.flags.writeable for tensor in found.values())  # not the file itself


def test_gguf_sizes_are_those_of_the_metadata(folder: Write) -> None:
    config = resolve_config(folder("llama")[0])
    assert (config.name, config.source) == ("llama", "model.gguf")
    assert (config.layers, config.d_model, config.d_ff, config.heads, config.kv_heads) == (2, D, F, 4, 2)
    assert (config.vocab, config.max_positions, config.rope_base) == (V, 128, 500.0)
    assert config.eps == 1e-5  # stored as the float32 9.9999997e-06
    assert config.rope_interleaved
    assert config.generates
    config = resolve_config(folder("gpt2")[0])
    assert (config.layers, config.d_model, config.d_ff, config.heads, config.vocab) == (2, D, F, 4, V)
    assert (config.max_positions, config.eps, config.activation, config.position) == (16, 1e-5, "gelu_tanh", "learned")


def test_gguf_metadata_equal_those_of_the_packages_reader(folder: Write) -> None:
    place, _ = folder("llama", kind=Kind.Q8_0)
    own, theirs = GGUFFile(place / "model.gguf"), gguf.GGUFReader(place / "model.gguf")
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert own.metadata == fields
    assert {name: own.shape(name) for name in own.names()} == {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in theirs.tensors
    }
    for tensor in theirs.tensors:
        assert np.array_equal(own.read(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def _gpt2_as_hugging_face_has_it(root: Path, stored: Tensors) -> Path:
    names = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    names |= {"attn_norm": "ln_1", "ffn_norm": "ln_2"}
    tensors = {"wte.weight": stored["token_embd.weight"], "wpe.weight": stored["position_embd.weight"]}
    for name, tensor in stored.items():
        if name.startswith("blk."):
            _, index, part, leaf = name.split(".")
            matrix = tensor.ndim == 2  # stored (in, out) there
            tensors[f"h.{index}.{names[part]}.{leaf}"] = np.ascontiguousarray(tensor.T) if matrix else tensor
    tensors |= {f"ln_f.{leaf}": stored[f"output_norm.{leaf}"] for leaf in ("weight", "bias")}
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": D, "n_head": 4, "n_inner": F, "n_positions": 16}
    return _save(root, {**config, "vocab_size": V}, tensors)


def _llama_as_hugging_face_has_it(root: Path, stored: Tensors) -> Path:
    """Undoes what llama.cpp's converter does: rows of q and k from pairs (2i, 2i + 1) to halves (i, i + D / 2)."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm"}
    tensors = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for name, tensor in stored.items():
        if name.startswith("blk."):
            _, index, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                heads = len(tensor) // 16
                tensor = np.ascontiguousarray(tensor.reshape(heads, 8, 2, D).swapaxes(1, 2)).reshape(-1, D)
            tensors[f"model.layers.{index}.{names[part]}.weight"] = tensor
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": D, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": F, "max_position_embeddings": 128, "rope_theta": 500.0}
    return _save(root, {**config, "vocab_size": V}, tensors)


def _save(root: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    place = root / "hugging-face"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, place / "model.safetensors")
    return place


def test_llama_gguf_with_its_permuted_rows_equals_the_hugging_face_checkpoint(folder: Write, tmp_path: Path) -> None:
    """The same weights in the other order of rows: equal logits only if the GGUF's pairs are adjacent channels."""
    place, stored = folder("llama")
    other = load_model(_llama_as_hugging_face_has_it(tmp_path, stored))
    assert not other.config.rope_interleaved
    ids = RNG.integers(V, size=(2, T))
    expected = forward(other, ids).output
    found = load_model(place)
    np.testing.assert_allclose(forward(found, ids).output, expected, rtol=1e-4, atol=1e-5)
    halves = replace(found, config=replace(found.config, rope_interleaved=False))
    assert np.abs(forward(halves, ids).output - expected).max() > 0.1


def test_gpt2_gguf_equals_the_hugging_face_checkpoint(folder: Write, tmp_path: Path) -> None:
    place, stored = folder("gpt2")
    found, other = load_model(place), load_model(_gpt2_as_hugging_face_has_it(tmp_path, stored))
    assert replace(found.config, name="", source="") == replace(other.config, name="", source="")
    ids = RNG.integers(V, size=(2, T))
    assert np.array_equal(forward(found, ids).output, forward(other, ids).output)


# --- blocks ---------------------------------------------------------------------------------------------------------


def q4_1(block: bytes) -> np.ndarray:
    """float16 d, float16 m, 16 bytes: the low nibbles, then the high ones, times d plus m."""
    d, m = np.frombuffer(block[:4], "<f2").astype(np.float32)
    q = np.frombuffer(block[4:], np.uint8)
    return np.concatenate([q & 15, q >> 4]) * d + m


def q8_0(block: bytes) -> np.ndarray:
    """float16 d, 32 int8, times d."""
    return np.frombuffer(block[2:], np.int8) * np.frombuffer(block[:2], "<f2").astype(np.float32)[0]


@pytest.mark.parametrize(("kind", "size", "decode"), [(Kind.Q4_1, 20, q4_1), (Kind.Q8_0, 34, q8_0)])
def test_quantised_tensors_are_their_blocks(
    kind: Any, size: int, decode: Callable[[bytes], np.ndarray], folder: Write
) -> None:
    place, stored = folder("llama", kind=kind)
    weights = load_model(place).weights
    for found, name in (
        (weights.stem.embedding, "token_embd.weight"),
        (weights.layers[1].feed_forward.down.weight, "blk.1.ffn_down.weight"),
        (weights.layers[0].feed_forward.up.weight[:F], "blk.0.ffn_gate.weight"),
        (weights.layers[1].attention.qkv.weight[-D // 2 :], "blk.1.attn_v.weight"),
    ):
        data = gguf.quants.quantize(stored[name], kind).tobytes()
        blocks = [decode(data[at : at + size]) for at in range(0, len(data), size)]
        assert np.array_equal(found, np.concatenate(blocks).reshape(stored[name].shape)), name
    assert np.array_equal(weights.final_norm.weight, stored["output_norm.weight"])  # a vector, float32


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q4_0", 0.2), ("Q5_1", 0.06), ("Q8_0", 0.01)],
)
def test_every_kind_of_storage_is_near_what_was_written(kind: str, error: float, folder: Write) -> None:
    place, stored = folder("gpt2", kind=Kind[kind])
    found, written = load_model(place).weights.layers[1].attention.qkv.weight, stored["blk.1.attn_qkv.weight"]
    assert found.dtype == np.float32
    assert np.abs(found - written).max() <= error * np.abs(written).max()
    assert (error == 0) == np.array_equal(found, written)


# --- the language head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MODELS)
def test_an_output_equal_to_the_embedding_is_tied(architecture: str, folder: Write) -> None:
    place, _ = folder(architecture, lambda _, t: t.update({"output.weight": t["token_embd.weight"]}))
    assert load_model(place).config.head


@pytest.mark.parametrize("architecture", MODELS)
def test_an_output_of_its_own_gives_hidden_states(architecture: str, folder: Write) -> None:
    model = load_model(folder(architecture, lambda _, t: t.update({"output.weight": values(V, D)}))[0])
    assert not model.config.head
    assert "without its language head" in model.source
    assert model.config.rope_interleaved == (architecture == "llama")


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(place: Path) -> str:
    """The one line of the error that loading raises."""
    with pytest.raises(EffrefError) as caught:
        load_model(place)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "m" / "model.gguf", "gemma3", LLAMA, llama()).parent
    said = "holds a model of the architecture 'gemma3'; of GGUF files effref reads llama and gpt2"
    assert said in refusal(place)
    with pytest.raises(WeightsError, match="gemma3"):
        resolve_config(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f, t: t.pop("blk.1.attn_k.weight"), "lacks 'blk.1.attn_k.weight'"),
        (lambda f, t: t.pop("token_embd.weight"), "lacks 'token_embd.weight'"),
        (lambda f, t: t.pop("output_norm.weight"), "lacks 'output_norm.weight'"),
        (lambda f, t: t.update({"rope_freqs.weight": values(8)}), "'rope_freqs.weight', for which"),
        (lambda f, t: t.update({"blk.0.attn_q.bias": values(D)}), "'blk.0.attn_q.bias', for which"),
        (lambda f, t: t.update({"blk.0.ffn_down.weight": values(F, D)}), "'blk.0.ffn_down.weight' (96, 64) does not"),
        (lambda f, t: t.update({"blk.0.attn_v.weight": values(D)}), "'blk.0.attn_v.weight' (64,) does not make"),
        (lambda f, t: t["blk.0.ffn_norm.weight"].fill(np.nan), "'layers.0.feed_forward_norm.weight' holds NaN"),
        (lambda f, t: t.update({"blk.1.ffn_up.weight": np.ones((F, D), np.int8)}), "gguf does not decode (Dequan"),
        (lambda f, t: f.pop("embedding_length"), "lacks the field 'llama.embedding_length'"),
        (lambda f, t: f.pop("attention.layer_norm_rms_epsilon"), "lacks the field 'llama.attention.layer_norm_rms"),
        (lambda f, t: f.update({"attention.layer_norm_rms_epsilon": -1.0}), "a positive number is needed"),
        (lambda f, t: f.update({"attention.layer_norm_rms_epsilon": math.nan}), "a positive number is needed"),
        (lambda f, t: f.update({"rope.freq_base": "large"}), "'large'; a positive number is needed"),
        (lambda f, t: f.update({"block_count": 3}), "says 3 layers, but has tensors of 2"),
        (lambda f, t: f.update({"block_count": 2**31}), "says 2147483648 layers, but has tensors of 2"),
        (lambda f, t: f.update({"attention.head_count": 0}), "heads is 0"),
        (lambda f, t: f.update({"attention.head_count": [4, 4]}), "heads is [4, 4]"),
        (lambda f, t: f.update({"attention.head_count_kv": 1}), "does not make the shape (96, 64)"),
        (lambda f, t: f.update({"expert_count": 8}), "llama.expert_count is 8; effref implements 0 only"),
        (lambda f, t: f.update({"attention.causal": False}), "attention.causal is False; effref implements True"),
        (lambda f, t: f.update({"rope.scaling.type": "yarn"}), "rope.scaling.type is 'yarn'; effref implements 'none'"),
        (lambda f, t: f.update({"rope.scaling.factor": 4.0}), "rope.scaling.factor is 4.0"),
        (lambda f, t: f.update({"rope.dimension_count": 8}), "rope.dimension_count is 8; effref implements 16 only"),
        (lambda f, t: f.update({"attention.value_length": 32}), "attention.value_length is 32; effref implements 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: Change, said: str, folder: Write) -> None:
    assert said in refusal(folder("llama", change)[0])


def test_a_head_width_of_its_own_is_read(folder: Write) -> None:
    def narrow(fields: Fields, tensors: Tensors) -> None:
        fields |= {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
        for i in range(2):
            for part, rows in (("attn_q", 32), ("attn_k", 16), ("attn_v", 16)):
                tensors[f"blk.{i}.{part}.weight"] = values(rows, D)
            tensors[f"blk.{i}.attn_output.weight"] = values(D, 32)

    assert load_model(folder("llama", narrow)[0]).config.head_dim == 8


def test_a_folder_with_two_files_is_refused(folder: Write) -> None:
    place, _ = folder("llama")
    (place / "other.gguf").write_bytes((place / "model.gguf").read_bytes())
    assert "holds model.gguf, other.gguf: keep one .gguf file" in refusal(place)


def test_the_folder_is_asked_for_and_not_the_file(folder: Write) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf is a file: give the folder"):
        load_model(folder("llama")[0] / "model.gguf")


def test_safetensors_go_before_gguf(tmp_path: Path) -> None:
    other = _gpt2_as_hugging_face_has_it(tmp_path, gpt2())
    (other / "broken.gguf").write_bytes(b"")
    assert load_model(other).config.source == "config.json"


def test_a_missing_package_is_named(folder: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = folder("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"needs gguf: pip install 'effref\[models\]'"):
        load_model(place)
    assert resolve_config(place).layers == 2  # sizes need no package


# --- damage ---------------------------------------------------------------------------------------------------------


def small(root: Path, kind: Any = Kind.F32) -> bytes:
    """A whole file, as small as it gets."""
    words = {**TOKENIZER, "tokens": ["t", "h", "th"], "merges": ["t h"]}
    return write(root / "small" / "model.gguf", "llama", LLAMA, llama(), kind, words).read_bytes()


def damaged(root: Path, data: bytes) -> Path:
    place = root / "damaged"
    place.mkdir(exist_ok=True)
    (place / "model.gguf").write_bytes(data)
    return place


@pytest.mark.parametrize(
    "start",
    [b"", b"GGU", b"GGUF", b"GGML\3\0\0\0", b"GGUF\1\0\0\0", b"GGUF\4\0\0\0", b"GGUF\0\0\0\3", b"PK\3\4" + bytes(60)],
)
def test_what_is_no_gguf_is_refused(start: bytes, tmp_path: Path) -> None:
    assert "WeightsError" in (said := refusal(damaged(tmp_path, start)))
    assert "is truncated" in said or "is not a little-endian GGUF file of version 2 or 3" in said


HEAD = b"GGUF\3\0\0\0"
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (struct.pack("<QQ", 0, 2**63), "is truncated"),
        (struct.pack("<QQ", 2**64 - 1, 0), "is truncated"),
        (struct.pack("<QQQ", 0, 1, 2**63), "is truncated"),
        (struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 13), "a field in it has the type 13"),
        (struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 4, 2**62) + bytes(40), "is truncated"),
        (struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**62) + bytes(40), "is truncated"),
        (struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "a field in it has the type 9"),
        (struct.pack("<QQQ", 0, 1, 1) + b"\xff" + bytes(40), "a string in it is not UTF-8"),
        (struct.pack("<QQ", 0, 2) + 2 * (KEY + struct.pack("<IB", 0, 1)) + bytes(40), "a name occurs twice"),
        (struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 5) + bytes(60), "a tensor in it has 5 axes"),
        (struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 2**32 - 1), "has 4294967295 axes"),
        (struct.pack("<QQQ", 0, 1, 17) + b"general.alignment" + struct.pack("<II", 4, 0), "alignment is 0"),
        (struct.pack("<QQ", 0, 0) + bytes(64), "the architecture 'None'"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    assert said in refusal(damaged(tmp_path, HEAD + data))


def test_an_unknown_quantisation_is_refused(tmp_path: Path) -> None:
    whole = small(tmp_path)
    name = struct.pack("<Q", 19) + b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", whole, at) == (0,)  # F32
    data = whole[:at] + struct.pack("<I", 4711) + whole[at + 4 :]
    assert "'blk.0.attn_q.weight' is stored in a way that gguf does not decode (4711" in refusal(
        damaged(tmp_path, data)
    )


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    """(128, 32) read as (256, 16): as many values, but a block would cross a row."""
    whole = small(tmp_path, Kind.Q8_0)
    name = struct.pack("<Q", 19) + b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name) + 4
    data = whole[:at] + struct.pack("<QQ", 16, 256) + whole[at + 16 :]
    assert "'blk.0.attn_q.weight' (256, 16) is no whole blocks of Q8_0" in refusal(damaged(tmp_path, data))


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_truncated_tensors_are_refused(where: float, tmp_path: Path) -> None:
    whole = small(tmp_path)
    first = len(whole) - sum(tensor.nbytes for tensor in llama().values())  # about where the data begin
    said = refusal(damaged(tmp_path, whole[: int(first + where * (len(whole) - 1 - first))]))
    assert "is truncated" in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_truncated_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = small(tmp_path, Kind.Q4_1)
    kept = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert "model.gguf" in refusal(damaged(tmp_path, kept))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.data())
def test_a_changed_byte_loads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(small(tmp_path, Kind.Q8_0))
    at = data.draw(st.integers(0, whole.index(b"blk.1.ffn_norm") + 60) | st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    with suppress(EffrefError):
        model = load_model(damaged(tmp_path, bytes(whole)))
        assert model.pretrained
        model.tokenizer()


# --- the tokenizer --------------------------------------------------------------------------------------------------


def ids_of(words: list[str]) -> list[int]:
    return [TOKENS.index(word) for word in words]


def test_tokens_follow_merges_in_their_order(folder: Write) -> None:
    found = load_model(folder("llama")[0]).tokenizer()
    assert found.encode("the and 12").ids == ids_of(["the", "Ġand", "Ġ", "1", "2"])
    assert found.encode("the then").ids == ids_of(["the", "Ġth", "e", "n"])  # "Ġ th" goes before "th e"


def test_only_smollm_keeps_digits_apart(folder: Write) -> None:
    place, _ = folder("gpt2", words={**TOKENIZER, "pre": "gpt-2"})
    assert load_model(place).tokenizer().encode("12").ids == ids_of(["12"])
    place, _ = folder("gpt2")
    assert load_model(place).tokenizer().encode("12").ids == ids_of(["1", "2"])


def test_control_tokens_are_found_by_name_and_not_in_text(folder: Write) -> None:
    found = load_model(folder("llama")[0]).tokenizer()
    assert found.token_to_id("<|endoftext|>") == TOKENS.index("<|endoftext|>")
    assert TOKENS.index("<|endoftext|>") not in found.encode("<|endoftext|>").ids
    assert found.encode("<|endoftext|>").tokens[:2] == ["<", "|"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    for found in _TOKENIZERS:
        encoded = found.encode(text)
        assert found.decode(encoded.ids) == text
        assert encoded.ids == found.encode(text, add_special_tokens=False).ids


def _built(pre: str) -> Any:
    file = GGUFFile.__new__(GGUFFile)
    words = {**TOKENIZER, "pre": pre}
    file.where, file.metadata = Path("model.gguf"), {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    return tokenizer(file)


_TOKENIZERS = [_built("smollm"), _built("gpt-2")]


def test_text_is_read_as_input(folder: Write, tmp_path: Path) -> None:
    model = load_model(folder("llama")[0])
    (tmp_path / "text.txt").write_text("the and 12", "utf-8")
    read = load_input(model, tmp_path / "text.txt")
    assert read.array.tolist() == [ids_of(["the", "Ġand", "Ġ", "1", "2"])]
    assert forward(model, read.array).output.shape == (1, 5, V)


def test_tokenizer_json_goes_before_the_file(folder: Write) -> None:
    place, _ = folder("llama")
    model = load_model(place)
    (place / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
        model.tokenizer()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "llama"}, "cannot build its tokenizer (model 'llama', pre 'smollm'"),
        ({"pre": "llama-bpe"}, "pre 'llama-bpe'"),
        ({"add_bos_token": True}, "add_bos_token True"),
        ({"merges": ["a b c"]}, "its tokenizer is damaged"),
        ({"merges": ["zz yy"]}, "its tokenizer is damaged"),
        ({"merges": [1, 2]}, "its tokenizer is damaged"),
        ({"tokens": [1, 2]}, "its tokenizer is damaged"),
        ({"tokens": "abc"}, "its tokenizer is damaged"),
    ],
)
def test_other_tokenizers_are_refused(changes: Fields, said: str, folder: Write) -> None:
    model = load_model(folder("llama", words={**TOKENIZER, **changes})[0])
    with pytest.raises(InputError) as caught:
        model.tokenizer()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer_is_refused(folder: Write) -> None:
    model = load_model(folder("gpt2", words={})[0])
    with pytest.raises(InputError, match="cannot build its tokenizer"):
        model.tokenizer()


# --- fetched models -------------------------------------------------------------------------------------------------


def fetched(name: str) -> Any:
    if pretrained.folder(name) is None:
        pytest.skip(f"{name} is not on this machine: effref models fetch {name}")
    return load_model(name, weights="pretrained")


@pytest.mark.models
def test_fetched_smollm2_is_the_preset() -> None:
    model = fetched("smollm2-135m")
    own = resolve_config(model.assets)
    assert replace(own, name=model.config.name, source=model.config.source) == model.config
    assert replace(model.config, rope_interleaved=False) == resolve_config("smollm2")
    assert sum(math.prod(shape) for shape in shapes(model.config).values()) == 134_515_008


@pytest.mark.models
def test_gpt2_tokens_equal_those_of_whispers_tokenizer_json(tmp_path: Path) -> None:
    """Whisper's English vocabulary is GPT-2's: built from GGUF metadata, it splits like the original file."""
    original = fetched("whisper-tiny-en").assets / "tokenizer.json"
    given = json.loads(original.read_text("utf-8"))["model"]
    tokens = sorted(given["vocab"], key=given["vocab"].__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in given["merges"]]
    words = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges}
    file = GGUFFile(write(tmp_path / "m" / "model.gguf", "gpt2", GPT2, gpt2(), words=words))
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(original))
    for text in ("Call me Ishmael. It's 1851—or so; naïve, 中文\n\n  def f(x): return 12345", "  a  b\t\n c "):
        assert tokenizer(file).encode(text).ids == expected.encode(text, add_special_tokens=False).ids
