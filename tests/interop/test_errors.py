"""convert from-hf on what does not fit: one line that names file, tensor and numbers; nothing is left behind."""

import json
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from neva_jax.errors import UserError
from neva_jax.interop import output, tensors
from neva_jax.interop.pickles import read_pickle
from tests.interop import folders
from tests.interop.conftest import written

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(from_hf, tmp_path, monkeypatch):
    """Runs from-hf; returns its message. Unless told otherwise, no weight may be read before it."""

    def run(src, reads=False, **options):
        if not reads:
            monkeypatch.setattr(tensors.Tensor, "read", lambda *_: pytest.fail("a weight was read"))
        before = written(tmp_path)
        with pytest.raises(UserError) as caught:
            from_hf(src, **options)
        assert written(tmp_path) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def llama(tmp_path):
    """A function that writes a Llama folder with some arrays or fields changed."""

    def write(arrays=(), fields=(), without=(), shards=1):
        all_arrays = folders.llm_arrays(folders.LLAMA) | dict(arrays)
        for name in without:
            del all_arrays[name]
        return folders.write_folder(tmp_path / "hf", folders.LLAMA | dict(fields), all_arrays, shards=shards)

    return write


UP = "model.layers.1.mlp.up_proj.weight"


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_missing_tensor(llama, refused):
    message = refused(llama(without=[UP, "model.norm.weight"]))
    assert message.startswith("") and f"/hf: tensor {UP} (and 1 more) is missing" in message


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"])
def test_extra_tensor(name, llama, refused):
    message = refused(llama({name: np.zeros(3, np.float32)}))
    assert f"/hf/model.safetensors: tensor {name}: is not part of the model" in message


def test_unknown_tensor(llama, refused):
    assert "tensor adapter.x: is of no model that can be converted" in refused(llama({"adapter.x": np.zeros(3)}))


def test_a_tensor_under_two_names(llama, refused):
    message = refused(llama({"language_model.model.norm.weight": np.zeros(32, np.float32)}))
    assert "language_model.model.norm.weight" in message and "model.norm.weight are the same parameter" in message


def test_misshapen_tensor(llama, refused):
    message = refused(llama({UP: np.zeros((48, 31), np.float32)}))
    assert f"model.safetensors: tensor {UP}: has shape (48, 31), but the config.json asks for (48, 32)" in message


def test_embedding_of_another_size(llama, refused):
    message = refused(llama(fields={"vocab_size": 410}))
    assert "weight: has shape (420, 32), but the config.json asks for (410, 32)" in message


@pytest.mark.parametrize(("dtype", "name"), [(np.float64, "F64"), (np.int64, "I64")])
def test_wrong_dtype(dtype, name, llama, refused):
    assert f"tensor {UP}: is {name}; only F32, F16 and BF16" in refused(llama({UP: np.zeros((48, 32), dtype)}))


def test_layers_of_different_dtypes(llama, refused, from_hf):
    folder = llama({UP: np.zeros((48, 32), np.float16)})
    message = refused(folder)
    assert f"tensor {UP}: is F16, but model.layers.0.mlp.up_proj.weight is F32; give --dtype" in message


def test_layers_of_different_dtypes_with_a_dtype(llama, from_hf):
    from_hf(llama({UP: np.zeros((48, 32), np.float16)}), dtype="fp32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [UP, "lm_head.weight"])
def test_values_that_are_not_finite(value, name, llama, refused, from_hf, tmp_path):
    array = folders.llm_arrays(folders.LLAMA)[name].copy()
    array[3, 4] = value
    folder = llama({name: array})
    message = refused(folder, reads=True, check_finite=True)
    assert f"model.safetensors: tensor {name}: has values that are not finite (1 of " in message
    from_hf(folder)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "message"),
    [(4, "is truncated within its header"), (100, "is truncated within its header"), (-1, "is truncated: ")],
)
def test_truncated_file(keep, message, llama, refused):
    folder = llama()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: {message}" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 64, "is no safetensors file"),
        (b"\x08" + bytes(7) + b"not json", "its header is broken"),
        (b"\x02" + bytes(7) + b"[]", "its header is broken"),
        (b"", "is truncated within its header"),
    ],
)
def test_a_file_that_is_none(content, message, llama, refused):
    folder = llama()
    (folder / "model.safetensors").write_bytes(content)
    assert f"model.safetensors: {message}" in refused(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, "12 bytes for F32 of shape (2, 2)"),
        ({"dtype": "F32", "shape": [-2, 2], "data_offsets": [0, 16]}, "are no sizes"),
        ({"dtype": "F32", "shape": [2, 2]}, "its header is broken"),
    ],
)
def test_a_header_that_contradicts_itself(entry, message, llama, refused):
    folder = llama()
    text = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert message in refused(folder)


@pytest.fixture
def index(llama):
    """A folder of two shards, and a function that changes its weight_map."""
    folder = llama(shards=2)
    path = folder / "model.safetensors.index.json"

    def change(**names):
        content = json.loads(path.read_text())
        content["weight_map"] |= names
        path.write_text(json.dumps(content))
        return folder

    return change


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder(name, index, refused):
    assert f"model.safetensors.index.json: names the file {name}, which is not in its folder" in refused(
        index(extra=name)
    )


def test_an_index_of_a_missing_shard(index, refused):
    message = refused(index(extra="model-00003-of-00003.safetensors"))
    assert "names the file model-00003-of-00003.safetensors, which is missing" in message


def test_an_index_of_a_missing_tensor(index, refused):
    message = refused(index(extra="model-00001-of-00002.safetensors"))
    assert "model-00001-of-00002.safetensors: has no tensor extra, which model.safetensors.index.json names" in message


def test_a_tensor_in_another_shard_than_the_index_says(index, refused):
    names = json.loads((index() / "model.safetensors.index.json").read_text())["weight_map"]
    other = {file: name for name, file in names.items()}
    first, second = sorted(other)
    message = refused(index(**{other[second]: first}))
    assert f"{first}: has no tensor {other[second]}, which model.safetensors.index.json names" in message


def test_a_tensor_that_the_index_does_not_name(index, refused):
    folder = index()
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    file = content["weight_map"].pop(UP)
    path.write_text(json.dumps(content))
    assert f"{file}: tensor {UP} is of no file in model.safetensors.index.json" in refused(folder)


def test_an_index_without_a_map(llama, refused):
    folder = llama(shards=2)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refused(folder)


def test_no_weights_at_all(llama, refused):
    folder = llama()
    (folder / "model.safetensors").unlink()
    assert "/hf: holds no weights" in refused(folder)


@pytest.mark.parametrize("content", ["[]", "{", "\xff"])
def test_a_config_that_is_none(content, llama, refused):
    folder = llama()
    (folder / "config.json").write_text(content)
    assert "/hf/config.json: " in refused(folder)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Harmful:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return Path.touch, (Path("/tmp/neva_jax_was_run"),)


def write_bin(path, described):
    """A PyTorch archive with nothing but a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(described))
    return path


def test_a_pickle_needs_leave(llama, refused, tmp_path):
    folder = llama()
    (folder / "model.safetensors").unlink()
    write_bin(folder / "pytorch_model.bin", {})
    assert "pytorch_model.bin: is a pickle; add --allow-pickle" in refused(folder)


@pytest.mark.parametrize("described", [{"x": Harmful()}, Harmful(), {"x": np.zeros(3)}, [1], {"x": 1}])
def test_a_pickle_runs_nothing(described, llama, refused):
    folder = llama()
    (folder / "model.safetensors").unlink()
    write_bin(folder / "pytorch_model.bin", described)
    message = refused(folder, allow_pickle=True)
    assert "pytorch_model.bin: is " in message
    assert not Path("/tmp/neva_jax_was_run").exists()


def test_an_old_pickle_asks_for_torch(tmp_path, monkeypatch):
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"x": 1}))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"old\.bin: is a pickle from before PyTorch 1\.6 .* pip install torch"):
        read_pickle(tmp_path / "old.bin")


# --- what does not go together ---------------------------------------------------------------------------------------


def test_tokenizer_larger_than_the_embedding(refused, tmp_path):
    hf = folders.LLAMA | {"vocab_size": 390}
    message = refused(folders.write_folder(tmp_path / "hf", hf, folders.llm_arrays(hf)))
    assert "the tokenizer has 400 tokens, but the embedding only 390 rows" in message
    assert "--new-rows mean|zero|normal" in message


def test_tokenizer_much_smaller_than_the_embedding(refused, tmp_path):
    hf = folders.LLAMA | {"vocab_size": 1500}
    message = refused(folders.write_folder(tmp_path / "hf", hf, folders.llm_arrays(hf)))
    assert "the tokenizer has 400 tokens, but the embedding 1500 rows" in message


def test_no_tokenizer(llama, refused, tmp_path, tokenizer_path):
    folder = llama()
    with pytest.raises(UserError, match=r"--src .*hf: has no tokenizer\.model or tokenizer\.json; name one"):
        from neva_jax.convert import main

        main(["from-hf", "--src", str(folder), "--out", str(tmp_path / "out")])
    (folder / "tokenizer.model").write_bytes(b"no model")
    assert "tokenizer.model: is no SentencePiece model" in refused(folder, tokenizer=folder / "tokenizer.model")


def test_parts_that_are_given_twice_or_missing(refused, tmp_path):
    llava = folders.write_folder(tmp_path / "llava", folders.LLAVA, folders.llava_arrays(folders.LLAVA))
    clip = folders.write_folder(tmp_path / "clip", folders.CLIP, folders.vision_arrays(folders.CLIP))
    llm = folders.write_folder(tmp_path / "llm", folders.LLAMA, folders.llm_arrays(folders.LLAMA))
    original = folders.write_folder(tmp_path / "original", folders.ORIGINAL, folders.original_arrays())
    file = folders.write_tensors(tmp_path / "mm" / "mm_projector.safetensors", folders.projector_arrays())
    assert "--vision " in (message := refused(llava, vision=clip)) and "has a vision encoder of its own" in message
    assert "has a projector of its own" in refused(llava, projector=file)
    assert "is a vision encoder itself" in refused(clip, vision=clip)
    assert "is a projector alone" in refused(file, vision=clip)
    assert "needs --vision, whose features it projects" in refused(llm, projector=file)
    assert "only names its vision encoder (openai/clip-vit-large-patch14-336)" in refused(original)
    assert "has a projector of its own" in refused(original, vision=clip, projector=file)
    assert "no such file or directory" in refused(tmp_path / "nope")
    assert "has no config.json and no mm_projector.safetensors" in refused(tmp_path)
    assert "field model_type=llama is not supported; vision encoders" in refused(llm, vision=llm)


def test_widths_that_do_not_meet(refused, tmp_path):
    wide = folders.CLIP | {"hidden_size": 24}
    clip = folders.write_folder(tmp_path / "clip", wide, folders.vision_arrays(wide))
    llm = folders.write_folder(tmp_path / "llm", folders.LLAMA, folders.llm_arrays(folders.LLAMA))
    original = folders.write_folder(tmp_path / "original", folders.ORIGINAL, folders.original_arrays())
    arrays = folders.projector_arrays(folders.MLP2X, "mm_projector.")
    file = folders.write_tensors(tmp_path / "mm_projector.safetensors", arrays)
    message = refused(llm, vision=clip, projector=file)
    assert "tensor mm_projector.0.weight: has shape (32, 16), but the config.json asks for (32, 24)" in message
    assert "field mm_hidden_size=16, but the encoder in" in refused(original, vision=clip)


# --- the output ------------------------------------------------------------------------------------------------------


def test_out_that_exists(llama, refused, tmp_path):
    folder = llama()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("mine")
    assert "--out " in (message := refused(folder)) and "exists; name another folder, or add --force" in message
    (tmp_path / "file").write_text("mine")
    assert "is a file; name a folder" in refused(folder, out=tmp_path / "file", force=True)
    assert "is no directory" in refused(folder, out=tmp_path / "file" / "checkpoint")
    assert "is the folder that is read" in refused(folder, out=folder, force=True)
    assert "contains what is read" in refused(folder, out=tmp_path, force=True)
    assert (tmp_path / "checkpoint" / "mine").read_text() == "mine"


def test_no_room_is_seen_beforehand(llama, refused, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20 // 10})())
    assert "needs up to 0.2 MiB, but only 0.1 MiB are free there" in refused(llama())


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_no_room_while_writing(command, llama, from_hf, to_hf, tmp_path):
    """The file system refuses files above 20 kB."""
    source = llama() if command == "from-hf" else from_hf(llama())
    before = written(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \("):
            from_hf(source) if command == "from-hf" else to_hf(source, text_only=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written(tmp_path) == before


def test_a_real_process_ends_with_one_line(llama, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "neva_jax.convert", "from-hf", "--src", llama(), "--out", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --src ")
