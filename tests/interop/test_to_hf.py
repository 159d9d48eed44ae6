"""convert to-hf: what goes in comes out, bit for bit; the files around the weights; what cannot be expressed."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from PIL import Image

from neva_jax.config import Config, DataConfig, LlmConfig, ModelConfig
from neva_jax.data.encoding import conversation_encoder
from neva_jax.data.rows import Turn
from neva_jax.data.templates import VICUNA_SYSTEM
from neva_jax.data.tiles import image_span, picture
from neva_jax.errors import UserError
from neva_jax.interop import to_hf as to_hf_module
from neva_jax.interop.export_config import text_config
from neva_jax.interop.names import llm_parameters
from neva_jax.interop.tensors import open_weights
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, locate, read_meta
from tests.interop import folders
from tests.interop.conftest import load, written


def tensors(folder):
    return {name: tensor.read() for name, tensor in open_weights(folder, allow_pickle=False).items()}


def assert_bits_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert ours[name].tobytes() == np.ascontiguousarray(expected).tobytes(), name


def hf_config(folder):
    raw = json.loads((folder / "config.json").read_text())
    return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


MATTERS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    attention_dropout hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings
    rope_parameters attention_bias
    mlp_bias sliding_window use_sliding_window layer_types image_size patch_size layer_norm_eps num_channels
    vision_feature_layer vision_feature_select_strategy projector_hidden_act multimodal_projector_bias
    image_token_index image_grid_pinpoints"""


def matters(config):
    found = {name: getattr(config, name) for name in MATTERS.split() if hasattr(config, name)}
    if "rope_parameters" in found:  # the old name of rope_type, which they keep beside it
        found["rope_parameters"] = {k: v for k, v in found["rope_parameters"].items() if k != "type"}
    return found


@pytest.mark.parametrize("family", folders.FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_language_models_come_back_bit_for_bit(family, dtype, from_hf, to_hf, tmp_path):
    hf = folders.FAMILIES[family]
    arrays = folders.cast(folders.llm_arrays(hf), dtype)
    source = folders.write_folder(tmp_path / "hf", hf, arrays)
    out = to_hf(from_hf(source, vocab_multiple=128), text_only=True)
    assert_bits_equal(tensors(out), arrays)
    ours, theirs = hf_config(out), hf_config(source)
    expected = matters(theirs)
    if family == "mistral_full":  # without a window it is a Llama, and is exported as one
        assert expected.pop("sliding_window") is None
    assert matters(ours).items() >= expected.items()
    assert ours.model_type == ("llama" if family == "mistral_full" else theirs.model_type)
    assert str(ours.dtype).removeprefix("torch.") == np.dtype(dtype).name
    assert written(out) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


LLAVAS = {
    "llava": folders.LLAVA,
    "next": folders.NEXT,
    "full": folders.LLAVA | {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    "siglip_mistral": folders.LLAVA
    | {
        "vision_config": folders.SIGLIP,
        "text_config": folders.FAMILIES["mistral"],
        "vision_feature_select_strategy": "full",
    },
    "siglip_qwen2": folders.LLAVA
    | {
        "vision_config": folders.SIGLIP,
        "text_config": folders.FAMILIES["qwen2"],
        "vision_feature_select_strategy": "full",
    },
}


@pytest.mark.parametrize("name", LLAVAS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_llava_comes_back_bit_for_bit(name, dtype, from_hf, to_hf, tmp_path):
    hf = LLAVAS[name]
    arrays = folders.cast(folders.llava_arrays(hf), dtype)
    source = folders.write_folder(tmp_path / "hf", hf, arrays, shards=3)
    folders.write_preprocessor(source)
    out = to_hf(from_hf(source))
    assert_bits_equal(tensors(out), arrays)
    ours, theirs = hf_config(out), hf_config(source)
    for section in ("text_config", "vision_config"):
        assert matters(getattr(ours, section)).items() >= matters(getattr(theirs, section)).items()
    assert matters(ours).items() >= matters(theirs).items()
    assert ours.architectures == hf["architectures"]
    again = from_hf(out, tmp_path / "again", tokenizer=out / "tokenizer.model")
    first, second = (dataclasses.asdict(read_meta(locate(path)).config) for path in (tmp_path / "checkpoint", again))
    assert first == second


def test_shards_and_their_index(from_hf, to_hf, tmp_path, monkeypatch):
    monkeypatch.setattr(to_hf_module, "BLOCK_BYTES", 1000)
    hf, arrays = folders.LLAVA, folders.llava_arrays(folders.LLAVA)
    out = to_hf(from_hf(folders.write_folder(tmp_path / "hf", hf, arrays)), shard_gib=60_000 / 2**30)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert files == {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert all((out / file).stat().st_size < 70_000 for file in files)
    assert_bits_equal(tensors(out), arrays)


def test_dtype_flag(from_hf, to_hf, tmp_path):
    arrays = folders.llm_arrays(folders.LLAMA)
    out = to_hf(from_hf(folders.write_folder(tmp_path / "hf", folders.LLAMA, arrays)), text_only=True, dtype="bf16")
    assert_bits_equal(tensors(out), folders.cast(arrays, ml_dtypes.bfloat16))


def test_the_embedding_grows_for_the_image_token(from_hf, to_hf, tmp_path, capsys):
    hf = folders.LLAVA | {"text_config": folders.LLAMA | {"vocab_size": 400}}
    arrays = folders.llava_arrays(hf)
    out = to_hf(from_hf(folders.write_folder(tmp_path / "hf", hf, arrays)))
    exported = tensors(out)
    assert "the embedding grows from 400 to 448 rows, for <image>" in capsys.readouterr().out
    assert hf_config(out).text_config.vocab_size == 448
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert np.array_equal(exported[name][:400], arrays[name])
        np.testing.assert_allclose(exported[name][400:], np.tile(arrays[name].mean(axis=0), (48, 1)), atol=1e-6)
    hidden = np.random.default_rng(0).standard_normal((50, 32))
    assert (hidden @ exported["language_model.lm_head.weight"].T).argmax(axis=1).max() < 400


def test_a_checkpoint_of_a_training_run_and_its_base(from_hf, to_hf, tmp_path):
    """Saved by the training loop: whole arrays instead of chunks by layer, and frozen parts in another checkpoint."""
    hf, arrays = folders.LLAVA, folders.llava_arrays(folders.LLAVA)
    base = from_hf(folders.write_folder(tmp_path / "hf", hf, arrays))
    meta, params = read_meta(locate(base)), load(base)
    trained = {"projector": jax.tree.map(lambda x: x + 1, params["projector"])}
    with Checkpoints(tmp_path / "run", keep=None) as checkpoints:
        run = Meta(7, meta.config, ("projector",), str(locate(base)), meta.tokenizer)
        checkpoints.save(7, trained, {}, {}, run)
        whole = Meta(8, meta.config, ("vision", "projector", "llm"), None, meta.tokenizer)
        checkpoints.save(8, {**params, **trained}, {}, {}, whole)
    expected = {name: array + 1 if "projector" in name else array for name, array in arrays.items()}
    for step in (7, 8):
        exported = to_hf(tmp_path / "run" / "checkpoints" / str(step), tmp_path / f"exported{step}")
        assert_bits_equal(tensors(exported), expected)


LARGE = LlmConfig(
    vocab_size=400,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=80,
    num_heads=4,
    head_dim=16,
    tie_embeddings=True,
)
EXPORT = """
import sys
from neva_jax.interop import hf_config, to_hf
from neva_jax.convert import main

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

hf_config.hf_class("llama", "")
before = peak()
assert main(["to-hf", "--text-only", *sys.argv[1:]]) == 0
print("kilobytes:", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
def test_a_training_checkpoint_is_exported_layer_by_layer(tokenizer, tmp_path):
    """Three stacked parameters of 80 MiB each, 80 layers of 1 MiB: none of them is ever in memory."""
    draw = np.random.default_rng(0)

    def values(parameter):
        stack = () if parameter.layers is None else (parameter.layers,)
        return jnp.asarray(draw.standard_normal((*stack, *parameter.ours), np.float32))

    params = nnx.traversals.unflatten_mapping({p.path: values(p) for p in llm_parameters(LARGE, LARGE.vocab_size)})
    config = Config(model=ModelConfig(llm=LARGE))
    with Checkpoints(tmp_path / "run", keep=None) as checkpoints:
        checkpoints.save(3, {"llm": params}, {}, {}, Meta(3, config, ("llm",), None, tokenizer))
    out = tmp_path / "exported"
    command = [sys.executable, "-c", EXPORT, f"--checkpoint={tmp_path / 'run'}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.rsplit("kilobytes:", 1)[1]) < 75 * 1024, done.stdout
    written = tensors(out)
    for layer in (0, 41, 79):
        down = written[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(down, params["layers"]["down"][layer].T)


# --- tokenizer, processor, template ----------------------------------------------------------------------------------


@pytest.fixture
def exported(from_hf, to_hf, tmp_path):
    source = folders.write_folder(tmp_path / "hf", folders.LLAVA, folders.llava_arrays(folders.LLAVA))
    folders.write_preprocessor(source)
    return to_hf(from_hf(source))


def test_the_json_tokenizer_encodes_as_sentencepiece(exported, tokenizer):
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    draw = random.Random(0)
    parts = [*" \n\tabcdefgh12345é日🙂.,;:", "USER", " the", "  ", "   ", "\n\n", "ASSISTANT: ", "<0x41>", "▁"]
    for _ in range(2000):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 30)))
        ids = tokenizer.encode(text, continues=False)
        assert theirs.encode(text).ids == [tokenizer.bos_id, *ids], text
        assert theirs.decode(ids) == tokenizer.decode(ids), text


def test_the_image_is_one_token(exported, tokenizer):
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert (
        theirs.token_to_id("<image>") == 400 == json.loads((exported / "config.json").read_text())["image_token_index"]
    )
    assert theirs.encode("a<image>b").ids.count(400) == 1
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert [settings[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")] == ["<s>", "</s>", "<unk>", "<unk>"]


def test_the_processor_prepares_a_prompt_as_we_do(exported, tokenizer):
    processor = transformers.AutoProcessor.from_pretrained(exported)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (4, 1)
    assert processor.vision_feature_select_strategy == "default"
    question = "What is  in the picture?"
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(said, add_generation_prompt=True)
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    theirs = processor(text=prompt, images=[image], return_tensors="np")
    assert theirs["pixel_values"].shape == (1, 3, 12, 12)
    span = image_span(20, 30, read_meta(locate(exported.parent / "checkpoint")).config)
    ours = conversation_encoder(DataConfig(), tokenizer).encode([Turn("user", f"<image>\n{question}")], [span])
    assert theirs["input_ids"][0].tolist() == np.where(ours.slots >= 0, 400, ours.tokens).tolist()


@pytest.mark.parametrize("mode", ["square", "pad", "squash", "anyres"])
def test_the_processor_makes_our_pixels(mode, from_hf, to_hf, tmp_path):
    hf = folders.NEXT if mode == "anyres" else folders.LLAVA
    source = folders.write_folder(tmp_path / "hf", hf, folders.llava_arrays(hf))
    folders.write_preprocessor(source, image_processor_type="LlavaImageProcessor", do_pad=mode == "pad")
    if mode == "squash":
        size = {"height": 12, "width": 12}
        folders.write_preprocessor(source, image_processor_type="SiglipImageProcessor", size=size, do_center_crop=False)
    checkpoint = from_hf(source)
    config = read_meta(locate(checkpoint)).config
    assert config.data.image_mode == mode
    processor = transformers.AutoProcessor.from_pretrained(to_hf(checkpoint))
    vision = config.model.vision
    mean, std = (np.asarray(values)[:, None, None] for values in (vision.image_mean, vision.image_std))
    draw = np.random.default_rng(0)
    for width, height in ((30, 20), (12, 12), (7, 33), (50, 51)):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3)).astype(np.uint8))
        theirs = processor.image_processor(image, return_tensors="np")["pixel_values"].reshape(-1, 3, 12, 12)
        mean, std = (
            np.asarray(values)[:, None, None]
            for values in (config.model.vision.image_mean, config.model.vision.image_std)
        )
        ours = picture(image, config).tiles.transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(theirs, (ours - mean) / std, atol=1e-5)


def test_the_chat_template_of_several_turns(exported, tokenizer):
    processor = transformers.AutoProcessor.from_pretrained(exported)
    said = [("user", "Hello"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")]
    text = processor.apply_chat_template([{"role": role, "content": content} for role, content in said])
    assert text == f"{VICUNA_SYSTEM} USER: Hello ASSISTANT: Yes.</s>USER: Why? ASSISTANT: So.</s>"
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(said, add_generation_prompt=True) == "Be brief. USER: Hello ASSISTANT:"
    assert processor.apply_chat_template(said) == "Be brief. USER: Hello"


def test_anyres_and_siglip_processors(from_hf, to_hf, tmp_path):
    for name, kind, extra in (("next", "LlavaNextProcessor", 1), ("siglip_qwen2", "LlavaProcessor", 0)):
        source = folders.write_folder(tmp_path / name, LLAVAS[name], folders.llava_arrays(LLAVAS[name]))
        out = to_hf(from_hf(source, tmp_path / f"{name}1"), tmp_path / f"{name}2")
        processor = transformers.AutoProcessor.from_pretrained(out)
        assert (type(processor).__name__, processor.num_additional_image_tokens) == (kind, extra)
    assert processor.vision_feature_select_strategy == "full"


# --- what cannot be expressed ----------------------------------------------------------------------------------------


def change(checkpoint, **changes):
    """Other values in meta.json; the weights are not looked at before the configuration is."""
    path = locate(checkpoint) / "meta" / "meta.json"
    described = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, last = name.split("__")
        branch = described["config"]
        for section in sections:
            branch = branch[section]
        branch[last] = value
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__projector__kind": "mlp_downsample"}, "kind=mlp_downsample joins 2 x 2 patches"),
        ({"model__projector__kind": "linear"}, "kind=linear has one layer"),
        ({"model__projector__kind": "identity"}, "kind=identity has no layer"),
        ({"model__projector__kind": "mlp3x_gelu"}, "kind=mlp3x_gelu has another number of layers"),
        ({"model__projector__newline": True}, "newline=True with data.image_mode=square"),
        ({"data__image_mode": "anyres"}, "newline=False with data.image_mode=anyres"),
        ({"data__image_mode": "keep"}, "data.image_mode=keep: no Hugging Face processor does it"),
        ({"model__vision__position_image_size": 24}, "position_image_size=24: the position table is interpolated"),
    ],
)
def test_refused_with_the_reason_but_the_text_goes(changes, message, from_hf, to_hf, tmp_path):
    out = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAVA, folders.llava_arrays(folders.LLAVA)))
    change(out, **changes)
    with pytest.raises(UserError, match=message):
        to_hf(out)
    assert not (tmp_path / "exported").exists()
    assert_bits_equal(tensors(to_hf(out, text_only=True)), folders.llm_arrays(folders.LLAMA))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_fraction": 0.5}, "rope_fraction=0.5: Hugging Face's"),
        ({"o_bias": True}, "qkv_bias=False, o_bias=True"),
        ({"sliding_window": 4, "mlp_bias": True}, "sliding_window=4: Hugging Face has it in Mistral"),
        ({"qkv_bias": True, "mlp_bias": True}, "qkv_bias=True, o_bias=False, mlp_bias=True"),
    ],
)
def test_language_models_that_no_class_computes(changes, message, from_hf, tmp_path):
    hf = folders.LLAMA
    llm = read_meta(locate(from_hf(folders.write_folder(tmp_path / "hf", hf, folders.llm_arrays(hf))))).config.model.llm
    with pytest.raises(UserError, match=message):
        text_config(dataclasses.replace(llm, **changes), 420, 512, {})


def test_a_language_model_alone_is_no_llava(from_hf, to_hf, tmp_path):
    out = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAMA, folders.llm_arrays(folders.LLAMA)))
    with pytest.raises(UserError, match="has no vision and no projector; --text-only exports the language model"):
        to_hf(out)
    with pytest.raises(UserError, match="holds no checkpoint"):
        to_hf(tmp_path / "hf")


def test_out_is_kept_without_force(from_hf, to_hf, tmp_path):
    out = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAMA, folders.llm_arrays(folders.LLAMA)))
    exported = to_hf(out, text_only=True)
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    with pytest.raises(UserError, match=r"--out .*exported: exists; name another folder, or add --force"):
        to_hf(out, text_only=True)
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before
    for wrong in (out, out / "checkpoints"):
        with pytest.raises(UserError, match=r"--out .*: (is the folder that is read|contains what is read)"):
            to_hf(out, wrong, text_only=True, force=True)
    to_hf(out, text_only=True, force=True)
    assert written(tmp_path) == {"hf", "checkpoint", "exported"}


def test_max_length(from_hf, to_hf, tmp_path):
    out = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAMA, folders.llm_arrays(folders.LLAMA)))
    assert hf_config(to_hf(out, text_only=True, max_length=77)).max_position_embeddings == 77


def test_averaged_weights_are_exported_where_they_are_asked_for(from_hf, to_hf, tmp_path):
    """Of what the run trained; the rest is the base's own."""
    arrays = folders.llava_arrays(folders.LLAVA)
    base = from_hf(folders.write_folder(tmp_path / "hf", folders.LLAVA, arrays))
    meta, params = read_meta(locate(base)), load(base)
    frozen = {name: dataclasses.replace(getattr(meta.config.model, name), freeze=True) for name in ("vision", "llm")}
    config = dataclasses.replace(meta.config, model=dataclasses.replace(meta.config.model, **frozen))
    average = {"projector": jax.tree.map(lambda x: x + 1, params["projector"])}
    with Checkpoints(tmp_path / "run", keep=None) as checkpoints:
        run = Meta(7, config, ("projector",), str(locate(base)), meta.tokenizer, ema=True)
        checkpoints.save(7, {"projector": params["projector"]}, {}, {}, run, average)
    assert_bits_equal(tensors(to_hf(tmp_path / "run", tmp_path / "plain")), arrays)
    expected = {name: array + 1 if "projector" in name else array for name, array in arrays.items()}
    assert_bits_equal(tensors(to_hf(tmp_path / "run", tmp_path / "ema", ema=True)), expected)
    with pytest.raises(UserError, match=r"has no averaged weights \(it was trained without optimizer.ema_decay\)"):
        to_hf(base, tmp_path / "none", ema=True)
