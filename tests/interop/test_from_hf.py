"""convert from-hf: each layout and name generation lands in the tree that the models read, on any mesh."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from neva_jax.config import Config, DataConfig, LlmConfig, ModelConfig
from neva_jax.configfile import load_config
from neva_jax.inference.engine import Engine, Request, SamplingOptions
from neva_jax.interop import from_hf as from_hf_module
from neva_jax.interop import store
from neva_jax.training.checkpoint_meta import available_components, locate, read_meta
from neva_jax.training.setup import starting_weights
from tests.interop import folders
from tests.interop.conftest import assert_same, load, written
from tests.models import helpers


def config_of(checkpoint) -> Config:
    return read_meta(locate(checkpoint)).config


@pytest.mark.parametrize("family", folders.FAMILIES)
def test_language_models(family, from_hf, tmp_path):
    hf = folders.FAMILIES[family]
    arrays = folders.llm_arrays(hf)
    out = from_hf(folders.write_folder(tmp_path / "hf", hf, arrays, shards=2))
    config = config_of(out)
    assert_same(load(out), {"llm": helpers.llm_tree(arrays, config.model.llm)})
    assert available_components(out) == {"llm": out / "checkpoints" / "0"}
    assert config.data == DataConfig(template="v1", max_length=hf["max_position_embeddings"])
    assert config.precision.compute == "fp32"


EXPECTED = LlmConfig(
    vocab_size=420,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_base=5000.0,
)
CHANGES = {
    "llama": {},
    "llama_tied": {"tie_embeddings": True},
    "llama_head_dim": {"head_dim": 6, "num_kv_heads": 4},
    "llama_biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "attention_dropout": 0.1},
    "llama_linear": {"rope_scaling": "linear", "rope_factor": 2.5},
    "llama_dynamic": {"rope_scaling": "dynamic", "rope_factor": 3.0, "rope_original_length": 8},
    "llama3": {
        "rope_base": 7000.0,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
        "rope_original_length": 16,
        "rope_low_freq_factor": 0.5,
        "rope_high_freq_factor": 2.0,
    },
    "mistral": {"sliding_window": 4},
    "mistral_full": {},
    "qwen2": {"qkv_bias": True},
    "qwen2_window": {"qkv_bias": True, "sliding_window": 4},
}


@pytest.mark.parametrize("family", folders.FAMILIES)
def test_configurations(family, from_hf, tmp_path):
    hf = folders.FAMILIES[family]
    out = from_hf(folders.write_folder(tmp_path / "hf", hf, folders.llm_arrays(hf)))
    assert config_of(out).model.llm == dataclasses.replace(EXPECTED, **CHANGES[family])


@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_tower.vision_model."])
@pytest.mark.parametrize("hf", [folders.CLIP, folders.SIGLIP], ids=["clip", "siglip"])
def test_vision_encoders_under_every_prefix(hf, prefix, from_hf, tmp_path):
    arrays = folders.vision_arrays(hf, prefix)
    extra = folders.draw(
        {"text_model.embeddings.token_embedding.weight": (3, 3), "logit_scale": (), "head.probe": (1,)}
    )
    extra["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    out = from_hf(folders.write_folder(tmp_path / "hf", hf, arrays | extra), select_layer=-1)
    vision = load(out)["vision"]
    h, d = 4, 16
    name = f"{prefix}encoder.layers.1.self_attn.k_proj"
    assert np.array_equal(vision["layers"]["k"][1], arrays[f"{name}.weight"].T.reshape(d, h, 4))
    assert np.array_equal(vision["layers"]["k_bias"][1], arrays[f"{name}.bias"].reshape(h, 4))
    patch = arrays[f"{prefix}embeddings.patch_embedding.weight"]
    assert np.array_equal(vision["patch"].reshape(4, 4, 3, d)[1, 2, 0], patch[:, 0, 1, 2])
    assert ("class_token" in vision) == (hf is folders.CLIP)
    config = config_of(out).model.vision
    assert config.kind == hf["model_type"].split("_")[0]
    assert config.select_layer == -1
    assert config.activation == {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}[hf["hidden_act"]]
    assert config.image_mean[0] == (0.5 if hf is folders.SIGLIP else 0.48145466)


@pytest.mark.parametrize("names", ["hub", "disk", "memory"])
@pytest.mark.parametrize("hf", [folders.LLAVA, folders.NEXT], ids=["llava", "llava_next"])
def test_llava_under_every_generation_of_names(hf, names, from_hf, tmp_path):
    reference, arrays = folders.llava_arrays(hf, "memory"), folders.llava_arrays(hf, names)
    folder = folders.write_folder(tmp_path / "hf", hf, arrays)
    folders.write_preprocessor(folder)
    out = from_hf(folder)
    config, params = config_of(out), load(out)
    assert_same(params["llm"], helpers.llm_tree(reference, config.model.llm, "model.language_model."))
    projector = {
        f"{ours}_{i}": reference[f"model.multi_modal_projector.linear_{i}.{theirs}"].T
        for i in (1, 2)
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    if hf is folders.NEXT:
        projector["newline"] = reference["model.image_newline"]
        assert (config.data.image_mode, config.data.image_grids) == ("anyres", hf["image_grid_pinpoints"])
    assert_same(params["projector"], projector)
    assert config.model.projector.kind == "mlp2x_gelu"
    assert config.model.vision.image_mean == [0.1, 0.2, 0.3]
    assert config.model.vision.select_layer == -2


def test_the_engine_answers_from_it_and_training_starts_from_it(from_hf, tmp_path):
    out = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAVA, folders.llava_arrays(folders.LLAVA)))
    engine = Engine.from_checkpoint(out)
    (reply,) = engine.generate([Request("hello")], SamplingOptions(max_new_tokens=3))
    assert len(reply.ids) == 3
    config = config_of(out)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=str(out)))
    assert starting_weights(config) == dict.fromkeys(("vision", "projector", "llm"), locate(out))


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8, "tensor": 1}])
def test_onto_eight_devices_from_small_chunks(mesh, from_hf, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 500)
    monkeypatch.setattr(from_hf_module, "BLOCK_BYTES", 1000)
    hf = folders.LLAVA
    out = from_hf(folders.write_folder(tmp_path / "hf", hf, folders.llava_arrays(hf)))
    one, eight = load(out), load(out, mesh)
    assert len(list((out / "checkpoints/0/state/params.llm.head").iterdir())) > 50
    assert_same(jax.tree.map(np.asarray, eight), jax.tree.map(np.asarray, one))
    whole = from_hf(tmp_path / "hf", tmp_path / "again")
    assert_same(load(whole), one)
    shards = {shard.data.shape for shard in eight["llm"]["layers"]["gate"].addressable_shards}
    assert shards == {(3, 32 // mesh["fsdp"], 48 // mesh["tensor"])}


# --- parts that are put together -------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, tokenizer_path):
    """An LLM folder, a CLIP folder, and a function that writes a projector's file."""
    llm = folders.write_folder(tmp_path / "llm", folders.LLAMA, folders.llm_arrays(folders.LLAMA), tokenizer_path)
    vision = folders.write_folder(tmp_path / "clip", folders.CLIP, folders.vision_arrays(folders.CLIP))

    def projector(kind="mlp2x_gelu"):
        arrays = folders.projector_arrays(folders.PROJECTORS[kind], "model.mm_projector.")
        return folders.write_tensors(tmp_path / "mm" / "mm_projector.safetensors", arrays)

    return llm, vision, projector


@pytest.mark.parametrize("kind", folders.PROJECTORS)
def test_llm_encoder_and_projector(kind, parts, from_hf, capsys):
    llm, vision, projector = parts
    file = projector(kind)
    out = from_hf(llm, vision=vision, projector=file.parent, tokenizer=llm / "tokenizer.model", select_layer=3)
    assert set(available_components(out)) == {"vision", "projector", "llm"}
    model = config_of(out).model
    assert (model.projector.kind, model.vision.select_layer) == (kind, -1)
    kernel = load(out)["projector"]["kernel_1"]
    names = [name for name, shape in folders.PROJECTORS[kind].items() if len(shape) == 2]
    arrays = folders.projector_arrays(folders.PROJECTORS[kind], "model.mm_projector.")
    assert np.array_equal(kernel, arrays[f"model.mm_projector.{names[0]}"].T)


def test_llm_and_encoder_without_a_projector(parts, from_hf):
    llm, vision, _ = parts
    assert set(available_components(from_hf(llm, vision=vision))) == {"vision", "llm"}


@pytest.mark.parametrize("kind", folders.PROJECTORS)
def test_a_projector_alone(kind, parts, from_hf):
    out = from_hf(parts[2](kind))
    assert set(available_components(out)) == {"projector"}
    model = config_of(out).model
    assert (model.projector.kind, model.vision.hidden_size, model.llm.hidden_size) == (kind, 16, 32)


@pytest.mark.parametrize("newline", [False, True])
def test_original_layout(newline, parts, from_hf, tmp_path):
    _, vision, _ = parts
    hf, arrays = folders.ORIGINAL, folders.original_arrays(newline)
    if newline:
        grids = [[24, 12], [36, 12]]
        hf = hf | {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": grids,
        }
    tuned = folders.vision_arrays(folders.CLIP, "model.vision_tower.vision_tower.vision_model.", seed=9)
    out = from_hf(folders.write_folder(tmp_path / "hf", hf, arrays | (tuned if newline else {})), vision=vision)
    config, params = config_of(out), load(out)
    assert np.array_equal(params["projector"]["kernel_2"], arrays["model.mm_projector.2.weight"].T)
    token = folders.vision_arrays(folders.CLIP, seed=9 if newline else 1)["embeddings.class_embedding"]
    assert np.array_equal(params["vision"]["class_token"], token)
    assert config.model.projector.newline == newline
    assert config.data.image_mode == ("anyres" if newline else "pad")
    if newline:
        assert config.data.image_grids == [[12, 24], [12, 36]]
        assert np.array_equal(params["projector"]["newline"], arrays["model.image_newline"])
    assert_same(params["llm"], helpers.llm_tree(arrays, config.model.llm))


def test_original_layout_of_a_pretrained_projector(from_hf, tmp_path):
    folder = tmp_path / "pretrain"
    arrays = folders.projector_arrays(folders.MLP2X, "model.mm_projector.")
    folders.write_tensors(folder / "mm_projector.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(folders.ORIGINAL))
    out = from_hf(folder)
    assert set(available_components(out)) == {"projector"}
    assert config_of(out).data.image_mode == "pad"


# --- dtypes and vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "flag", "expected"),
    [
        (np.float32, "keep", np.float32),
        (np.float16, "keep", np.float16),
        (ml_dtypes.bfloat16, "keep", ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, "fp32", np.float32),
        (np.float32, "bf16", ml_dtypes.bfloat16),
    ],
)
def test_dtypes(stored, flag, expected, from_hf, tmp_path):
    arrays = folders.cast(folders.llm_arrays(folders.LLAMA), stored)
    out = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAMA, arrays), dtype=flag)
    saved = store.SavedArrays(locate(out)).open(("llm", "layers", "up"))
    assert saved.dtype.numpy_dtype == expected
    up = saved.read().result()
    assert np.array_equal(up[2], arrays["model.layers.2.mlp.up_proj.weight"].T.astype(expected))
    assert config_of(out).precision.compute == ("fp32" if expected is np.float32 else "bf16")
    loaded = load(out, dtype=ml_dtypes.bfloat16)["llm"]["layers"]["up"]
    assert np.array_equal(loaded, up.astype(ml_dtypes.bfloat16))


def small_vocabulary(tmp_path, rows, tied=False):
    hf = folders.LLAMA | {"vocab_size": rows, "tie_word_embeddings": tied}
    arrays = folders.llm_arrays(hf)
    return folders.write_folder(tmp_path / "hf", hf, arrays), arrays


@pytest.mark.parametrize("rule", ["mean", "zero", "normal"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_for_added_tokens(rule, tied, from_hf, tmp_path, capsys):
    folder, arrays = small_vocabulary(tmp_path, 390, tied)
    out = from_hf(folder, new_rows=rule, vocab_multiple=64)
    llm, params = config_of(out).model.llm, load(out)["llm"]
    assert (llm.vocab_size, llm.vocab_multiple, params["embedding"].shape) == (400, 64, (448, 32))
    tables = {"embedding": arrays["model.embed_tokens.weight"]}
    if not tied:
        tables["head"] = arrays["lm_head.weight"]
    for name, old in tables.items():
        table = np.asarray(params[name]).T if name == "head" else np.asarray(params[name])
        assert np.array_equal(table[:390], old)
        new = table[390:]
        if rule == "mean":
            np.testing.assert_allclose(new, np.broadcast_to(old.mean(axis=0), new.shape), atol=1e-6)
        else:
            assert np.std(new) == 0 if rule == "zero" else 0.01 < np.std(new) < 0.03
    assert "the embedding grows from 390 to 400 rows" in capsys.readouterr().out


def test_rows_beyond_the_tokenizer_are_kept_and_padded_ones_never_win(from_hf, tmp_path, capsys):
    folder, _ = small_vocabulary(tmp_path, 420)
    out = from_hf(folder, vocab_multiple=256)
    model = config_of(out).model
    assert load(out)["llm"]["head"].shape == (32, 512)
    assert (model.llm.vocab_size, model) == (420, ModelConfig(llm=model.llm))
    assert "20 rows of the embedding are beyond the 400 tokens" in capsys.readouterr().out


def test_a_tokenizer_json_of_the_folder(from_hf, tmp_path, tokenizer_path, to_hf):
    folder, _ = small_vocabulary(tmp_path, 420)
    exported = to_hf(from_hf(folder), text_only=True)
    (folder / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_bytes((exported / "tokenizer_config.json").read_bytes())
    out = from_hf(folder, tmp_path / "json", tokenizer=folder / "tokenizer.json")
    assert read_meta(locate(out)).tokenizer.file == "tokenizer.json"
    assert read_meta(locate(out)).tokenizer.size == 400


def test_force_replaces_and_nothing_else_is_left(from_hf, tmp_path):
    folder, _ = small_vocabulary(tmp_path, 420)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("old")
    out = from_hf(folder, force=True)
    assert written(out) == {"checkpoints", "config.yaml"}
    assert load_config(out / "config.yaml") == config_of(out)
    assert written(out / "checkpoints" / "0" / "state") >= {"params.llm.head", "step", "_METADATA"}
    assert written(tmp_path) == {"hf", "checkpoint"}
