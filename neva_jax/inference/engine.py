"""Generation: a checkpoint, prompts with images, answers token by token.

Prompts of a batch are padded at the right. A token's cache slot is its position, and a token sees the slots up to its
own, so what stands in the padding's slots is overwritten before anybody can see it:

    row 0   a b c d e _ _ _        prefill: slots 0-7, logits taken at e
    row 1   a b c _ _ _ _ _        first new token of row 1 goes to slot 3, where `_` was

    B rows, T prompt length (a multiple of 64), S cache slots, K tiles per row, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neva_jax.config import COMPONENTS, Config
from neva_jax.data.encoding import conversation_encoder
from neva_jax.data.images import load_image
from neva_jax.data.rows import IMAGE_MARK, BadRow, Turn, check_characters
from neva_jax.data.tiles import TEXT, Picture, tiles_per_image
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from neva_jax.inference.sampling import sample
from neva_jax.models.llama import empty_cache
from neva_jax.models.llama_layer import LayerCache
from neva_jax.models.neva import abstract_model
from neva_jax.parallel.mesh import one_device_mesh, shardings
from neva_jax.precision.policy import compute_dtype
from neva_jax.training.checkpoint_meta import available_components, locate, read_meta, verify
from neva_jax.training.weights import load_components

BUCKET = 64


@dataclass(frozen=True)
class Request:
    """A prompt and its images; `<image>` marks in the text say where they stand, or none: before the text.

    Raises:
      BadRow: marks and images do not agree in number, or the text has half a character.
    """

    text: str
    images: tuple[Picture, ...] = ()  # from `Engine.read_image`

    def __post_init__(self) -> None:
        marks = self.text.count(IMAGE_MARK)
        if marks and marks != len(self.images):
            raise BadRow(f"the prompt has {marks} {IMAGE_MARK} marks, but {len(self.images)} images are given")
        check_characters("the prompt", self.text)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must lie in 0 … 2^32 - 1")


@dataclass
class Reply:
    """An answer as it grows: its token ids, its text, and why it ended (`stop`, `length`, or None so far)."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    unsettled: int = 0

    @property
    def settled_text(self) -> str:
        """What may be shown while the answer grows.

        A character whose bytes are not complete yet is held back, and the last `unsettled` characters, which may turn
        out to belong to the template's end of an answer.
        """
        if self.finish_reason:
            return self.text
        return self.text[: len(self.text) - self.unsettled].rstrip("\N{REPLACEMENT CHARACTER}")


class Engine:
    """A model ready to answer, on one device."""

    def __init__(self, config: Config, tokenizer: Tokenizer, params: dict, graphdef: nnx.GraphDef):
        self.config, self.tokenizer, self.params = config, tokenizer, params
        self.conversations = conversation_encoder(config.data, tokenizer)
        self.ending = self.conversations.ending
        self._prefill = jax.jit(partial(_prefill, graphdef, tokenizer.size), static_argnames="slots")
        self._decode = jax.jit(partial(_decode, graphdef, tokenizer.size), donate_argnames="cache")

    @classmethod
    def from_checkpoint(cls, path: str | Path, ema: bool = False) -> "Engine":
        """Loads a run, or one of its steps; weights are held in the compute dtype.

        ema: the averaged weights (`optimizer.ema_decay`) of what the run trained.

        Raises:
          UserError: no checkpoint there, or one whose parts are missing.
        """
        step_dir = locate(path)
        meta = read_meta(step_dir)
        sources = available_components(step_dir)
        for used in {step_dir, *sources.values()}:
            verify(used, "size")  # `neva_jax.checkpoint verify` compares the contents
        if lacking := [name for name in COMPONENTS if name not in sources]:
            raise UserError(f"{step_dir}: has no {' and no '.join(lacking)}")
        config = meta.config
        # The causal-only kernel has no cache mask; XLA's serves on every device.
        model = dataclasses.replace(config.model, attention="xla")
        graphdef, state = abstract_model(model, config.precision)
        layout = shardings(one_device_mesh(), state)
        dtype = compute_dtype(config.precision)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            nnx.to_pure_dict(state),
            layout,
        )
        params = load_components(abstract, sources, step_dir if ema else None)
        return cls(config, meta.tokenizer, params, graphdef)

    def read_image(self, path: str | Path) -> Picture:
        """An image file as the model takes it; raises BadRow."""
        return load_image(path, self.config)

    def generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Reply]:
        """Answers all requests as one batch."""
        *_, replies = self.stream(requests, options)
        return replies

    def stream(self, requests: Sequence[Request], options: SamplingOptions) -> Iterator[list[Reply]]:
        """Answers all requests as one batch; yields the growing replies after each token."""
        batch, lengths = self._batch(requests)
        length = batch["tokens"].shape[1]
        slots = length + -(-options.max_new_tokens // BUCKET) * BUCKET
        rng = jax.random.key(options.seed)
        choice = (jnp.float32(options.temperature), jnp.float32(options.top_p))
        tokens, cache = self._prefill(self.params, batch, lengths, jax.random.fold_in(rng, 0), *choice, slots=slots)
        replies = [Reply() for _ in requests]
        for step in range(1, options.max_new_tokens + 1):
            for reply, token in zip(replies, np.asarray(tokens), strict=True):
                self._extend(reply, int(token), last=step == options.max_new_tokens)
            yield replies
            if all(reply.finish_reason for reply in replies):
                return
            positions = jnp.asarray(lengths + step - 1)
            tokens, cache = self._decode(
                self.params, tokens, positions, jax.random.fold_in(rng, step), *choice, cache=cache
            )

    def _extend(self, reply: Reply, token: int, last: bool) -> None:
        if reply.finish_reason:
            return
        tail = self.ending.tail
        if token in self.ending.ids:
            reply.finish_reason, reply.text = "stop", reply.text.removesuffix(tail)
            return
        reply.ids.append(token)
        reply.text = self.conversations.answer(reply.ids)
        reply.unsettled = next(n for n in range(len(tail), -1, -1) if reply.text.endswith(tail[:n]))
        if self.ending.by_text and tail in reply.text:
            reply.text = reply.text.split(tail)[0]
            reply.finish_reason = "stop"
        elif last:
            reply.finish_reason = "length"

    def _batch(self, requests: Sequence[Request]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Prompts as arrays [B, T], tiles [B, K, S, S, 3], and the prompts' lengths [B]."""
        size = self.config.model.vision.image_size
        encoded, tiles = [], []
        for request in requests:
            marked = IMAGE_MARK in request.text
            text = request.text if marked else f"{IMAGE_MARK}\n" * len(request.images) + request.text
            spans = [picture.span for picture in request.images]
            encoded.append(self.conversations.encode((Turn("user", text),), spans))
            tiles.append([tile for picture in request.images for tile in picture.tiles])
        lengths = np.asarray([len(e.tokens) for e in encoded], np.int32)
        length = -(-int(lengths.max()) // BUCKET) * BUCKET
        # Whole images of the most tiles, so that one image more or less is a new shape, but not one tile.
        per_image = tiles_per_image(self.config)
        most = max(1, *(-(-len(row) // per_image) for row in tiles), 1) * per_image
        images = np.zeros((len(requests), most, size, size, 3), np.uint8)
        tokens = np.zeros((len(requests), length), np.int32)
        image_slots = np.full((len(requests), length), TEXT, np.int32)
        for row, e in enumerate(encoded):
            tokens[row, : len(e.tokens)] = e.tokens
            image_slots[row, : len(e.slots)] = e.slots
            for k, tile in enumerate(tiles[row]):
                images[row, k] = tile
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        return {"tokens": tokens, "image_slots": image_slots, "images": images, "positions": positions}, lengths


def _prefill(
    graphdef: nnx.GraphDef,
    vocabulary: int,
    params: dict,
    batch: dict[str, jax.Array],
    lengths: jax.Array,
    rng: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    slots: int,
) -> tuple[jax.Array, LayerCache]:
    """Reads the prompts; returns the first new token of each row [B] and the cache [L, B, S, G, K].

    `vocabulary`: ids from there on have embeddings but no text (model.llm.vocab_size above the tokenizer's), and are
    never drawn.
    """
    model = nnx.merge(graphdef, params)
    cache = empty_cache(model.llm.config, batch["tokens"].shape[0], slots, model.llm.dtype)
    hidden, cache = model(batch, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return sample(model.llm.logits(last)[:, :vocabulary], rng, temperature, top_p), cache


def _decode(
    graphdef: nnx.GraphDef,
    vocabulary: int,
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    rng: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    cache: LayerCache,
) -> tuple[jax.Array, LayerCache]:
    """Reads one token [B] at its position [B]; returns the next token [B] and the cache."""
    model = nnx.merge(graphdef, params)
    hidden, cache = model.llm(model.llm.embed(tokens[:, None]), positions[:, None], cache=cache)
    return sample(model.llm.logits(hidden[:, 0])[:, :vocabulary], rng, temperature, top_p), cache
