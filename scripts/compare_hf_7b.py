"""A random LLaVA 1.5 7B in Hugging Face's layout, converted and compared on one GPU; figures in docs/checkpoints.md.

python scripts/compare_hf_7b.py all --work DIR --results F.jsonl [--size tiny]

The steps, each a process of its own, so that its time and peak memory are its own (needs PyTorch and 45 GB of disk):

    make       7B + ViT-L/14-336 with random weights, bf16, in shards of 4 GB
    from-hf    python -m neva_jax.convert from-hf
    theirs     logits of LlavaForConditionalGeneration in bf16, and in fp32 from the same weights
    ours       logits of the converted checkpoint in bf16 and fp32
    to-hf      python -m neva_jax.convert to-hf
    compare    tensors of both folders bit by bit; logits and losses of the four forwards

Both get the same token ids and the same uint8 pixels: 2 rows of 576 image tokens and 64 of text. The loss is the mean
over the text's tokens.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "7b": {
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "tiny": {
        "text": {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
}
PIECES, IMAGE_TOKEN, ROWS, TEXT, VOCABULARY = 32000, 32000, 2, 64, 32064
PRECISIONS = ("bf16", "fp32")


def main() -> int:
    """Runs one step, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("all", "make", "theirs", "ours", "compare"))
    parser.add_argument("--work", type=Path, required=True, help="folder for models and logits")
    parser.add_argument("--results", type=Path, help="file that JSON lines are appended to")
    parser.add_argument("--size", choices=SIZES, default="7b")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.step == "all":
        return run_all(options)
    {"make": make, "theirs": theirs, "ours": ours, "compare": compare}[options.step](options)
    return 0


def run_all(options: argparse.Namespace) -> int:
    """Every step in order, with its wall time and peak resident memory; stops at the first that fails."""
    own = [sys.executable, __file__]
    tail = ["--work", str(options.work), "--size", options.size, "--results", str(options.results)]
    convert, work = [sys.executable, "-m", "neva_jax.convert"], options.work
    steps = {
        "make": [*own, "make", *tail],
        "from-hf": [*convert, "from-hf", "--src", str(work / "hf"), "--out", str(work / "ours")],
        "theirs": [*own, "theirs", *tail],
        "ours": [*own, "ours", *tail],
        "to-hf": [*convert, "to-hf", "--checkpoint", str(work / "ours"), "--out", str(work / "back")],
        "compare": [*own, "compare", *tail],
    }
    for name, command in steps.items():
        before = time.monotonic()
        # Conversion computes nothing; without this JAX would reserve most of the GPU for it.
        cpu = {"JAX_PLATFORMS": "cpu"} if name in ("from-hf", "to-hf") else {}
        process = subprocess.Popen(command, env={**os.environ, **cpu}, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        report(
            options,
            {
                "bench": "convert",
                "step": name,
                "seconds": round(time.monotonic() - before, 2),
                "peak_rss_gib": round(usage.ru_maxrss / 2**20, 3),  # Linux counts it in KiB
                "rc": os.waitstatus_to_exitcode(status),
            },
        )
        if status:
            return 1
    return 0


def report(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Prints a result with its conditions, and appends it to --results."""
    conditions = {
        "size": options.size,
        "gpu": gpu_name(),
        "cpus": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "orbax-checkpoint")},
    }
    line = json.dumps({**row, **conditions})
    print(line, flush=True)
    if options.results:
        with options.results.open("a") as file:
            file.write(line + "\n")


def gpu_name() -> str:
    """The first GPU, as nvidia-smi calls it."""
    try:
        names = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return names.stdout.splitlines()[0]


# --- the model -------------------------------------------------------------------------------------------------------


def make(options: argparse.Namespace) -> None:
    """WORK/hf: weights, configuration, tokenizer and preprocessor; WORK/inputs.npz."""
    import torch
    import transformers

    size = SIZES[options.size]
    vision = transformers.CLIPVisionConfig(**size["vision"], projection_dim=size["vision"]["hidden_size"])
    text = transformers.LlamaConfig(
        **size["text"], vocab_size=VOCABULARY, rms_norm_eps=1e-5, max_position_embeddings=4096
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = name.endswith("weight") and "norm" in name
                parameter.normal_(1.0 if scale else 0.0, 0.02)
    model.save_pretrained(options.work / "hf", max_shard_size="4GB")
    (options.work / "hf" / "tokenizer.model").write_bytes(tokenizer())
    side = size["vision"]["image_size"]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(options.work / "hf")

    rng = np.random.default_rng(0)
    tokens = (side // size["vision"]["patch_size"]) ** 2
    np.savez(
        options.work / "inputs.npz",
        pixels=rng.integers(0, 256, (ROWS, side, side, 3), np.uint8),
        text=rng.integers(3, PIECES, (ROWS, TEXT)),
        image_tokens=tokens,
    )


def tokenizer() -> bytes:
    """A SentencePiece model of as many pieces as Llama's; what they spell does not matter here."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    bytes_ = [(f"<0x{i:02X}>", kinds.BYTE) for i in range(256)]
    words = [(f"▁{i}", kinds.NORMAL) for i in range(PIECES - len(special) - len(bytes_))]
    for i, (piece, kind) in enumerate([*special, *bytes_, *words]):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


# --- the forwards ----------------------------------------------------------------------------------------------------


def theirs(options: argparse.Namespace) -> None:
    """WORK/theirs_{bf16,fp32}.npy: fp32 logits [B, 64, V] that predict the text."""
    import torch
    import transformers

    inputs = np.load(options.work / "inputs.npz")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    image = np.full((ROWS, inputs["image_tokens"]), IMAGE_TOKEN)
    ids = torch.tensor(np.concatenate([np.ones((ROWS, 1), int), image, inputs["text"]], axis=1), device=device)
    # The library's own normalisation, so that nothing of ours is in the reference.
    processor = transformers.CLIPImageProcessor.from_pretrained(options.work / "hf")
    pixels = processor(list(inputs["pixels"]), do_resize=False, do_center_crop=False, return_tensors="pt")
    for name, dtype in zip(PRECISIONS, (torch.bfloat16, torch.float32), strict=True):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(options.work / "hf", dtype=dtype).to(device)
        with torch.no_grad():
            values = pixels["pixel_values"].to(device, dtype)
            logits = model(input_ids=ids, pixel_values=values).logits[:, -TEXT - 1 : -1]
        np.save(options.work / f"theirs_{name}.npy", logits.float().cpu().numpy())
        del model, logits
        if device == "cuda":
            torch.cuda.empty_cache()


def ours(options: argparse.Namespace) -> None:
    """WORK/ours_{bf16,fp32}.npy: the same of the converted checkpoint, with the attention kernel of training."""
    import dataclasses

    import jax
    from flax import nnx

    from neva_jax.config import PrecisionConfig
    from neva_jax.models.neva import abstract_model
    from neva_jax.parallel.mesh import one_device_mesh, shardings
    from neva_jax.precision.policy import compute_dtype
    from neva_jax.training.checkpoint_meta import available_components, locate, read_meta
    from neva_jax.training.weights import load_components

    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32; bf16 products are as ever
    inputs = np.load(options.work / "inputs.npz")
    step_dir = locate(options.work / "ours")
    config = read_meta(step_dir).config
    tokens = int(inputs["image_tokens"])
    ids = np.concatenate([np.ones((ROWS, 1), int), np.zeros((ROWS, tokens), int), inputs["text"]], axis=1)
    slots = np.full(ids.shape, -1, np.int32)
    slots[:, 1 : 1 + tokens] = np.arange(tokens)
    batch = {
        "tokens": ids.astype(np.int32),
        "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(slots),
        "image_slots": slots,
        "images": inputs["pixels"][:, None],
    }
    for name in PRECISIONS:
        precision = PrecisionConfig(compute=name)
        graphdef, state = abstract_model(dataclasses.replace(config.model, attention="auto"), precision)
        dtype = compute_dtype(precision)
        abstract = jax.tree.map(
            lambda leaf, place, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
            nnx.to_pure_dict(state),
            shardings(one_device_mesh(), state),
        )
        params = load_components(abstract, available_components(step_dir))

        @jax.jit
        def forward(params: dict, batch: dict, graphdef: Any = graphdef) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden, _ = model(batch)
            return model.llm.logits(hidden[:, -TEXT - 1 : -1])

        np.save(options.work / f"ours_{name}.npy", np.asarray(forward(params, batch), np.float32))
        del params


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> None:
    """Bit-equality of the folders, and the differences of all pairs of forwards."""
    before, after = (tensors(options.work / name) for name in ("hf", "back"))
    equal = [name for name in before if name in after and np.array_equal(before[name](), after[name]())]
    report(
        options,
        {
            "bench": "round_trip",
            "tensors": len(before),
            "bit_equal": len(equal),
            "missing": sorted(before.keys() - after.keys()),
            "added": sorted(after.keys() - before.keys()),
            "differing": sorted(name for name in before.keys() & after.keys() if name not in equal),
        },
    )
    text = np.load(options.work / "inputs.npz")["text"]
    logits = {f"{who}_{p}": np.load(options.work / f"{who}_{p}.npy") for who in ("theirs", "ours") for p in PRECISIONS}
    losses = {name: token_loss(values, text) for name, values in logits.items()}
    for a, b in (
        ("ours_bf16", "theirs_bf16"),
        ("ours_bf16", "theirs_fp32"),
        ("theirs_bf16", "theirs_fp32"),
        ("ours_fp32", "theirs_fp32"),
    ):
        difference = np.abs(logits[a] - logits[b])
        report(
            options,
            {
                "bench": "forward",
                "a": a,
                "b": b,
                "max_abs": float(difference.max()),
                "mean_abs": float(difference.mean()),
                "relative_norm": float(np.linalg.norm(logits[a] - logits[b]) / np.linalg.norm(logits[b])),
                "logits_std": float(logits[b].std()),
                "same_argmax": float((logits[a].argmax(-1) == logits[b].argmax(-1)).mean()),
                "loss_a": losses[a],
                "loss_b": losses[b],
                "loss_difference": losses[a] - losses[b],
                "rows": ROWS,
                "tokens": int(np.load(options.work / "inputs.npz")["image_tokens"]) + TEXT + 1,
            },
        )


def token_loss(logits: np.ndarray, text: np.ndarray) -> float:
    """Mean of -log p(token), in fp64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return float((log_total - np.take_along_axis(logits, text[..., None], -1)[..., 0]).mean())


def tensors(folder: Path) -> dict[str, Any]:
    """Name -> a function that reads the tensor's bytes, as an array of uint8.

    transformers writes `vision_tower.embeddings…` today, and we the hub's `vision_tower.vision_model.embeddings…`.
    """
    from safetensors import safe_open

    def reader(file: Path, name: str) -> Any:
        def read() -> np.ndarray:
            import torch

            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(name).view(torch.uint8).numpy()

        return read

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
        found |= {name.replace("vision_tower.vision_model.", "vision_tower."): reader(file, name) for name in names}
    return found


if __name__ == "__main__":
    sys.exit(main())
