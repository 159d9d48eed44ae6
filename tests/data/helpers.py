"""Random pixels, and Hugging Face's CLIP preprocessing of them."""

import numpy as np
from transformers import CLIPImageProcessorPil


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(image, size):
    """[S, S, 3] uint8 of Hugging Face's processor, before it scales and normalises."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    (pixels,) = processor(image)["pixel_values"]
    return np.asarray(pixels).transpose(1, 2, 0)
