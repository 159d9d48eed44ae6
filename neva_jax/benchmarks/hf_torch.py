"""The baseline: Hugging Face's LlavaForConditionalGeneration in PyTorch, the same shapes, tokens and micro batches.

It is set up as well as PyTorch allows without other packages: weights in bf16 on the GPU, SDPA's fused causal attention
(FlashAttention-2 where that package is installed), no padding mask, PyTorch's fused AdamW. Trained weights have fp32
masters and moments, as ours do and as DeepSpeed gives LLaVA; each parameter is updated alone, so that fp32 gradients
never exist all at once. Its projector always has two layers.
"""

import importlib.util
import platform
import time
from typing import Any

import numpy as np

from neva_jax.benchmarks.batches import made_up, tokens_per_sample
from neva_jax.benchmarks.conditions import conditions, describe
from neva_jax.benchmarks.timing import run_steps, spread
from neva_jax.config import Config
from neva_jax.derived import head_dim, image_tokens, kv_heads, padded_vocab, trained_components
from neva_jax.errors import UserError
from neva_jax.planning.flops import flops_per_row
from neva_jax.planning.speed import default_rate

WARMUP = 3
GIB = 2**30


def measure(config: Config, steps: int, checkpointing: bool) -> dict[str, Any]:
    """The baseline's row for a configuration, on one GPU (or the CPU).

    Raises:
      UserError: PyTorch is not installed, or the configuration has what the baseline lacks.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--baseline: needs PyTorch (pip install torch); neva_jax itself does without")
    import torch

    if config.model.vision.kind != "clip" or config.precision.compute not in ("bf16", "fp32"):
        raise UserError("--baseline: CLIP encoders in bf16 or fp32 only")
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.run.seed)
    dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
    model, attention = _model(config, device, dtype, checkpointing)
    optimizer = _Masters([p for p in model.parameters() if p.requires_grad], config)
    accumulate = config.train.global_batch // config.train.micro_batch
    stream = made_up(config, 1)
    image_token = model.config.image_token_id
    mean, std = (
        torch.tensor(values, device=device, dtype=torch.float32).view(1, 3, 1, 1) * 255
        for values in (config.model.vision.image_mean, config.model.vision.image_std)
    )

    def start(_: int) -> tuple[torch.Tensor, Any]:
        arrays = next(stream).arrays
        parts = {name: np.array_split(array, accumulate) for name, array in arrays.items()}
        total = torch.zeros((), device=device)
        for i in range(accumulate):
            is_image = parts["image_slots"][i] >= 0
            ids = np.where(is_image, image_token, parts["tokens"][i]).astype(np.int64)
            labels = np.where(is_image, -100, ids)
            pixels = torch.from_numpy(parts["images"][i][:, 0]).to(device).permute(0, 3, 1, 2)
            loss = model(
                input_ids=torch.from_numpy(ids).to(device),
                labels=torch.from_numpy(labels).to(device),
                pixel_values=((pixels.float() - mean) / std).to(dtype),
                use_cache=False,
            ).loss
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
        optimizer.step()
        if device.type == "cpu":
            return total, None
        done = torch.cuda.Event()
        total = total.to("cpu", non_blocking=True)
        done.record()
        return total, done

    def wait(pending: tuple[torch.Tensor, Any]) -> float:
        loss, done = pending
        if done is not None:
            done.synchronize()
        return float(loss)

    times, losses = run_steps(start, wait, steps, WARMUP)
    batch, timing = next(stream), spread(times)
    per_s = batch.samples / timing["step_ms"] * 1e3
    tflop = flops_per_row(config, "xla").model / 1e12
    rate = default_rate(config)
    peak = round(torch.cuda.max_memory_allocated() / GIB, 3) if device.type == "cuda" else None
    return {
        "bench": "train",
        "impl": "hf_torch",
        **describe(config),
        "projector": "mlp2x_gelu",
        "backend": "torch",
        "attention": attention,
        "remat": "full" if checkpointing else "none",
        "mesh": {},
        "accumulate": accumulate,
        **tokens_per_sample(batch),
        "samples_per_step": batch.samples,
        **timing,
        "samples_per_s": round(per_s, 3),
        "samples_per_s_per_gpu": round(per_s, 3),
        "data": "synthetic",
        "tflop_per_sample": round(tflop, 4),
        "tflops_per_gpu": round(tflop * per_s, 1),
        "peak_tflops": rate,
        "utilisation": round(tflop * per_s / rate, 4),
        "peak_gib": peak,
        "losses": losses,
        "start_to_end_s": round(time.perf_counter() - began, 1),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "gpus": 1,
        **conditions("torch", "transformers"),
    }


def _model(config: Config, device: Any, dtype: Any, checkpointing: bool) -> tuple[Any, str]:
    """(the model with random weights on the device, its attention); what is frozen needs no gradient."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    llm, vision = config.model.llm, config.model.vision
    vocabulary = padded_vocab(llm)
    described = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=llm.hidden_size,
            intermediate_size=llm.intermediate_size,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_heads,
            num_key_value_heads=kv_heads(llm),
            head_dim=head_dim(llm),
            rms_norm_eps=llm.norm_eps,
            max_position_embeddings=max(4096, config.data.max_length),
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        ),
        image_token_index=vocabulary - 1,
        image_seq_length=image_tokens(config.model),
        vision_feature_layer=vision.select_layer,
    )
    flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    attention = "flash_attention_2" if flash else "sdpa"
    described._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(described)
    finally:
        torch.set_default_dtype(before)
    trained = trained_components(config.model)
    owners = {"vision_tower": "vision", "multi_modal_projector": "projector"}
    for name, parameter in model.named_parameters():
        owner = next((ours for theirs, ours in owners.items() if theirs in name), "llm")
        parameter.requires_grad_(owner in trained)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model, attention


class _Masters:
    """AdamW on fp32 masters of parameters, after clipping by the global norm."""

    def __init__(self, parameters: list[Any], config: Config):
        import torch

        settings = config.optimizer
        self.parameters, self.clip = parameters, settings.clip_norm
        self.masters = [p.detach().float().clone() for p in parameters]
        self.optimizers = [
            torch.optim.AdamW(
                [master],
                lr=settings.lr,
                betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=master.is_cuda,
            )
            for master in self.masters
        ]

    def step(self) -> None:
        """Updates masters and parameters, and forgets the gradients."""
        import torch

        scale = 1.0
        if self.clip is not None:
            norms = torch._foreach_norm([p.grad for p in self.parameters])
            norm = torch.linalg.vector_norm(torch.stack([value.float() for value in norms]))
            scale = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
        for parameter, master, optimizer in zip(self.parameters, self.masters, self.optimizers, strict=True):
            master.grad = parameter.grad.float() * scale
            parameter.grad = None
            optimizer.step()
            master.grad = None
            parameter.data.copy_(master)
