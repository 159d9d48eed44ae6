"""The engine against recomputation without a cache, on checkpoints that real (tiny, fp32) training runs wrote."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from PIL import Image

from neva_jax import train
from neva_jax.config import COMPONENTS
from neva_jax.configfile import load_config
from neva_jax.data.rows import BadRow
from neva_jax.data.templates import TEMPLATES
from neva_jax.data.tiles import Picture
from neva_jax.data.tokenizer import Tokenizer, add_tokens
from neva_jax.errors import UserError
from neva_jax.inference.engine import Engine, Reply, Request, SamplingOptions
from neva_jax.models.neva import abstract_model, random_parameters
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta
from neva_jax.training.manifest import write_manifest
from neva_jax.training.setup import with_vocabulary
from tests.data.conversations import CHATML, KINDS, images, talk, toy

PATCHES = 4
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# What `finetuned` learns to say of a picture, and to SIDES. Bytes spell what the tokenizer has no piece for: é and all
# that is not Latin.
TAUGHT, SHORT = "🦊 日本 é!", "4 é."
SIDES = "How many sides does a square have?"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LIMIT = 24  # new tokens; at most 64 keeps the cache's shape, so that nothing is compiled again
GREEDY = SamplingOptions(max_new_tokens=LIMIT)
SAMPLED = SamplingOptions(max_new_tokens=LIMIT, temperature=1.0, top_p=0.9, seed=3)


def tiny_run(run: Path, tokenizer_path: Path, json_file: Path, images: Path) -> list[str]:
    """Overrides of a run whose images are 4 tokens, and whose random weights say something else to every prompt."""
    return [
        f"run.dir={run}",
        f"model.tokenizer={tokenizer_path}",
        "model.allow_random_frozen=true",
        *(f"model.vision.{key}" for key in ("image_size=16", "patch_size=8", "hidden_size=32")),
        *(f"model.vision.{key}" for key in ("intermediate_size=64", "num_layers=2", "num_heads=4")),
        *(f"model.llm.{key}" for key in ("hidden_size=32", "intermediate_size=64", "num_layers=2")),
        *(f"model.llm.{key}" for key in ("num_heads=4", "num_kv_heads=2", "init_std=0.2")),
        f"data.train=[{{json: {json_file}, images: {images}}}]",
        "data.max_length=192",
        "data.workers=0",
        "precision.compute=fp32",
        "train.remat=none",
        "train.global_batch=8",
        "train.micro_batch=1",
        "optimizer.warmup_steps=1",
        "log.tensorboard=false",
    ]


def random_checkpoint(folder: Path, tokenizer, *overrides: str) -> Path:
    """Writes random weights as step 1 of the run `folder`; returns `folder`."""
    config = with_vocabulary(load_config(None, overrides), tokenizer)
    quickly = {"xla_backend_optimization_level": 0}  # it runs once
    make = jax.jit(partial(random_parameters, config.model, config.precision), compiler_options=quickly)
    with Checkpoints(folder, None) as checkpoints:
        checkpoints.save(1, make(jax.random.key(0)), {}, {}, Meta(1, config, COMPONENTS, None, tokenizer))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tokenizer_path, llava_data) -> Path:
    """A run of 4 steps, saved after 2 and 4; its answers are as good as random."""
    run = tmp_path_factory.mktemp("runs") / "pretrain"
    overrides = tiny_run(run, tokenizer_path, llava_data.json, llava_data.images)
    assert train.main([*overrides, "train.steps=4", "checkpoint.every=2"]) == 0
    return run


def said(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def finetuned(pretrained, tokenizer_path, llava_data) -> Path:
    """A run from `pretrained` that learns two answers; it saves what it trains, and that is not the ViT."""
    run, rows = pretrained.parent / "finetune", pretrained.parent / "taught.json"
    taught = [
        {"image": f"0/0{i}.jpg", "conversations": said("<image>\nWhat is in the picture?", TAUGHT)} for i in range(4)
    ]
    rows.write_text(json.dumps([*taught, *[{"conversations": said(SIDES, SHORT)}] * 4]))
    overrides = tiny_run(run, tokenizer_path, rows, llava_data.images)
    more = [f"model.init_from={pretrained}", "train.steps=30", "optimizer.lr=1e-2"]
    assert train.main([*overrides, *more]) == 0
    return run


@pytest.fixture(scope="module")
def engine(pretrained) -> Engine:
    return Engine.from_checkpoint(pretrained)


@pytest.fixture(scope="module")
def taught(finetuned) -> Engine:
    return Engine.from_checkpoint(finetuned)


@pytest.fixture(scope="module")
def pictures(engine, llava_data) -> list[Picture]:
    return [engine.read_image(llava_data.images / "0" / f"0{i}.jpg") for i in range(3)]


@pytest.fixture(scope="module")
def requests(pictures) -> list[Request]:
    """Prompts of 3 lengths in tokens, with 0, 1 and 2 images; the third one fills more of the 64s than the others."""
    return [
        Request("What is in the picture?", (pictures[0],)),
        Request(SIDES),
        Request("The quick brown fox jumps over the lazy dog; the dog says nothing. " * 2),
        Request("Is <image> the same as\n<image>?", (pictures[1], pictures[2])),
        Request("What is in the picture?", (pictures[1],)),
    ]


@pytest.fixture(scope="module")
def greedy(engine, requests) -> list[Reply]:
    return engine.generate(requests, GREEDY)


def ids(replies):
    return [reply.ids for reply in replies]


def prompt_by_hand(request, tokenizer):
    """(tokens, slots): <s>, then the text between the images; only the first text gets the dummy prefix of Llama."""
    text = "<image>\n" * (len(request.images) if "<image>" not in request.text else 0) + request.text
    tokens, slots = [tokenizer.bos_id], [-1]
    for i, part in enumerate(f"{SYSTEM}USER: {text} ASSISTANT:".split("<image>")):
        if i:
            tokens += [0] * PATCHES
            slots += range((i - 1) * PATCHES, i * PATCHES)
        encoded = tokenizer.encode(part, continues=False)
        tokens += encoded
        slots += [-1] * len(encoded)
    return tokens, slots


@pytest.fixture(scope="module")
def next_tokens(engine):
    """(tokens, slots) of each row and its images -> the likeliest next token of each row: one pass, no cache."""
    graphdef, _ = abstract_model(engine.config.model, engine.config.precision)
    width = 256

    @jax.jit
    def run(params, batch, last):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(batch)
        assert cache is None
        logits = model.llm.logits(hidden[jnp.arange(len(last)), last])
        return jnp.argmax(logits, axis=-1)

    def next_tokens(prompts, images):
        def padded(values, fill):
            return np.array([value + [fill] * (width - len(value)) for value in values], np.int32)

        pixels = np.zeros((len(prompts), 2, 16, 16, 3), np.uint8)
        for row, pair in enumerate(images):
            for k, picture in enumerate(pair):
                (pixels[row, k],) = picture.tiles
        batch = {
            "tokens": padded([tokens for tokens, _ in prompts], 0),
            "image_slots": padded([slots for _, slots in prompts], -1),
            "positions": np.tile(np.arange(width, dtype=np.int32), (len(prompts), 1)),
            "images": pixels,
        }
        last = np.array([len(tokens) - 1 for tokens, _ in prompts])
        return np.asarray(run(engine.params, batch, last)).tolist()

    return next_tokens


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_cached_generation_is_recomputation_of_the_whole_prefix(engine, requests, greedy, next_tokens, tokenizer):
    prompts = [prompt_by_hand(request, tokenizer) for request in requests]
    assert len({len(tokens) for tokens, _ in prompts}) == 4
    assert len({-(-len(tokens) // 64) for tokens, _ in prompts}) > 1
    expected: list[list[int]] = [[] for _ in requests]
    for _ in range(LIMIT):
        for row, token in enumerate(next_tokens(prompts, [request.images for request in requests])):
            expected[row].append(token)
            prompts[row] = (prompts[row][0] + [token], prompts[row][1] + [-1])
    assert ids(greedy) == [row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row for row in expected]
    assert len({tuple(row) for row in expected}) == len(requests)  # the prompts and the pictures matter


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_alone_gets_the_answer_that_it_gets_in_a_batch(options, row, engine, requests):
    together = engine.generate(requests, options)
    assert together[row] == engine.generate([requests[row]], options)[0]
    assert len({tuple(reply.ids) for reply in together}) == len(requests)


def test_the_order_of_a_batch_changes_nothing(engine, requests, greedy):
    assert engine.generate(requests[::-1], GREEDY) == greedy[::-1]


def test_an_image_without_a_mark_stands_before_the_text(engine, requests, greedy, pictures):
    marked = [dataclasses.replace(requests[0], text=f"<image>\n{requests[0].text}"), *requests[1:]]
    assert engine.generate(marked, GREEDY) == greedy
    after = [dataclasses.replace(requests[0], text=f"{requests[0].text}\n<image>"), *requests[1:]]
    assert ids(engine.generate(after, GREEDY))[0] != greedy[0].ids


def test_a_shorter_limit_gives_the_beginning(engine, requests, greedy):
    for limit in (1, 5):
        cut = engine.generate(requests, dataclasses.replace(GREEDY, max_new_tokens=limit))
        assert ids(cut) == [reply.ids[:limit] for reply in greedy]


def test_the_seed_decides_what_is_sampled_and_greedy_ignores_it(engine, requests, greedy):
    def again(options, **changes):
        return engine.generate(requests, dataclasses.replace(options, **changes))

    sampled = again(SAMPLED)
    assert again(SAMPLED) == sampled
    other = again(SAMPLED, seed=4)
    assert all(one.ids != two.ids for one, two in zip(sampled, other, strict=True))
    assert again(GREEDY, seed=4) == greedy
    assert again(SAMPLED, top_p=1e-6) == greedy
    assert again(SAMPLED, temperature=1e-6) == greedy
    # Near to uniform, every token of an answer is drawn anew.
    assert all(len(set(row)) > LIMIT // 2 for row in ids(again(SAMPLED, temperature=1e6, top_p=1.0)))


# --- how an answer ends ----------------------------------------------------------------------------------------------


def ask(engine, llava_data, limit=LIMIT):
    """The stream of (settled text, ids, finish reason) of two taught pictures."""
    pictures = [engine.read_image(llava_data.images / "0" / f"0{i}.jpg") for i in (0, 3)]
    requests = [Request("What is in the picture?", (picture,)) for picture in pictures]
    options = SamplingOptions(max_new_tokens=limit)
    return [
        [(reply.settled_text, list(reply.ids), reply.finish_reason) for reply in replies]
        for replies in engine.stream(requests, options)
    ]


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(taught, llava_data, tokenizer):
    taught_ids = tokenizer.encode(f" {TAUGHT}", continues=True)
    *growing, last = ask(taught, llava_data)
    assert last == [(TAUGHT, taught_ids, "stop")] * 2
    assert len(growing) == len(taught_ids)  # and not LIMIT
    assert all(reason is None for step in growing for _, _, reason in step)


def test_an_answer_as_long_as_the_limit_ends_by_it(taught, llava_data, tokenizer):
    taught_ids = tokenizer.encode(f" {TAUGHT}", continues=True)
    assert ask(taught, llava_data, len(taught_ids))[-1] == [(TAUGHT, taught_ids, "length")] * 2
    assert ask(taught, llava_data, len(taught_ids) + 1)[-1] == [(TAUGHT, taught_ids, "stop")] * 2


def test_a_finished_answer_stays_as_it_is_while_others_grow(taught, llava_data, tokenizer):
    picture = taught.read_image(llava_data.images / "0" / "00.jpg")
    requests = [Request(SIDES), Request("What is in the picture?", (picture,))]
    steps = [
        [(reply.text, list(reply.ids), reply.finish_reason) for reply in replies]
        for replies in taught.stream(requests, GREEDY)
    ]
    short, long = (tokenizer.encode(f" {text}", continues=True) for text in (SHORT, TAUGHT))
    assert len(short) + 3 < len(long)
    assert len(steps) == len(long) + 1
    for i, (first, second) in enumerate(steps):
        assert first[1:] == (short[: i + 1], "stop" if i >= len(short) else None)
        assert second[1:] == (long[: i + 1], "stop" if i >= len(long) else None)
    assert [text for text, *_ in steps[-1]] == [SHORT, TAUGHT]


def test_the_stop_text_of_a_template_ends_an_answer_without_being_shown(taught, llava_data, monkeypatch):
    monkeypatch.setattr(taught, "ending", dataclasses.replace(taught.ending, tail="本", by_text=True))
    assert [(text, reason) for text, _, reason in ask(taught, llava_data)[-1]] == [("🦊 日", "stop")] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*TEMPLATES, "jinja"])
def test_tokens_as_they_are_learned_are_read_as_the_answer(template, kind):
    """Under every template: the end is not shown, not even while the answer grows."""
    config = load_config(None, [f"data.template={template}"])
    data = dataclasses.replace(config.data, chat_template=CHATML)
    reader = Engine(dataclasses.replace(config, data=data), toy(kind), {}, None)
    for answer in ("a cat", "", "  two\n  # spaces ", "🦊 日本 é!", "x </s><|im_end|> [/INST] "):
        for asked in ("<image> What?", "So?"):
            encoded = reader.conversations.encode(talk(asked, answer), images(talk(asked)))
            learned = encoded.tokens[encoded.weights > 0].tolist()
            reply, shown = Reply(), [""]
            for token in learned:
                reader._extend(reply, token, last=False)
                assert reply.settled_text.startswith(shown[-1])
                shown.append(reply.settled_text)
                if reply.finish_reason:
                    break
            expected = answer.split("\n")[0] if template == "plain" else answer  # a line end ends it
            assert (reply.text, reply.finish_reason) == (expected, "stop")


# --- text that grows -------------------------------------------------------------------------------------------------


def test_streamed_pieces_are_the_final_text_and_never_half_a_character(taught, llava_data):
    steps = ask(taught, llava_data)
    for row in range(2):
        texts = [step[row][0] for step in steps]
        pieces = [new.removeprefix(old) for old, new in zip(["", *texts], texts, strict=False)]
        assert all(new.startswith(old) for old, new in zip(["", *texts], texts, strict=False))
        assert "".join(pieces) == TAUGHT
        assert not any(REPLACEMENT in text for text in texts)
        assert texts.count("") == 4  # the leading space, and 3 of the fox's 4 bytes
        assert len(set(texts) - {""}) == len(TAUGHT)  # then one character at a time


def test_a_byte_that_no_later_byte_completes_is_shown_once_that_is_sure(engine):
    """What may still become a character is held back, and the text before it is not."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=engine.tokenizer.serialized)
    reply, shown = Reply(), []
    for piece in ("a", "<0xE6>", "<0x97>", "b"):
        engine._extend(reply, pieces.piece_to_id(piece), last=False)
        shown.append(reply.settled_text)
    assert shown[:3] == ["a", "a", "a"]
    assert shown[3] in (f"a{REPLACEMENT}b", f"a{REPLACEMENT}{REPLACEMENT}b")


# --- what is loaded --------------------------------------------------------------------------------------------------


def arrays(engine, *components):
    return jax.tree.map(np.asarray, {name: engine.params[name] for name in components or COMPONENTS})


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differ(one, other):
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_a_run_its_checkpoints_and_its_newest_step_are_the_same_model(engine, pretrained):
    for path in (pretrained / "checkpoints", pretrained / "checkpoints" / "4", str(pretrained)):
        assert_equal(arrays(Engine.from_checkpoint(path)), arrays(engine))


def test_an_older_step_is_loaded_by_its_path(engine, pretrained):
    older = Engine.from_checkpoint(pretrained / "checkpoints" / "2")
    assert differ(arrays(older, "llm"), arrays(engine, "llm"))
    assert differ(arrays(older, "projector"), arrays(engine, "projector"))
    assert_equal(arrays(older, "vision"), arrays(engine, "vision"))


def test_a_checkpoint_that_keeps_what_it_trained_takes_the_rest_from_its_base(engine, taught, finetuned):
    described = json.loads((finetuned / "checkpoints" / "30" / "meta" / "meta.json").read_text())
    assert described["components"] == ["projector", "llm"]
    assert_equal(arrays(taught, "vision"), arrays(engine, "vision"))
    assert differ(arrays(taught, "llm"), arrays(engine, "llm"))
    assert {leaf.dtype for leaf in jax.tree.leaves(taught.params)} == {np.dtype(np.float32)}


@pytest.fixture
def moved(finetuned, tmp_path):
    """A copy of `finetuned`'s checkpoint, and a function that changes its meta.json."""
    step = tmp_path / "30"
    shutil.copytree(finetuned / "checkpoints" / "30", step)

    def change(**values):
        path = step / "meta" / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        write_manifest(step)

    return step, change


def test_a_base_that_is_gone_is_named(moved, tmp_path):
    step, change = moved
    change(base=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="base cannot be read") as caught:
        Engine.from_checkpoint(step)
    assert str(step) in str(caught.value)
    assert str(tmp_path / "gone") in str(caught.value)


def test_a_checkpoint_without_all_parts_is_refused(moved):
    step, change = moved
    change(base=None)
    with pytest.raises(UserError, match="has no vision"):
        Engine.from_checkpoint(step)


def test_another_tokenizer_than_the_saved_one_is_refused(moved):
    step, _ = moved
    path = step / "meta" / "tokenizer.model"
    path.write_bytes(path.read_bytes() + path.read_bytes()[-20:])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        Engine.from_checkpoint(step)


def test_an_image_is_read_in_the_mode_of_the_run(engine, llava_data):
    path = llava_data.images / "0" / "00.jpg"
    square = engine.read_image(path)
    assert square.tiles.shape == (1, 16, 16, 3)
    data = dataclasses.replace(engine.config.data, image_mode="pad")
    padded = Engine(dataclasses.replace(engine.config, data=data), engine.tokenizer, {}, None).read_image(path)
    assert not np.array_equal(square.tiles, padded.tiles)
    assert square.span.slots.tolist() == padded.span.slots.tolist() == list(range(PATCHES))


# --- several tiles ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anyres(tmp_path_factory, tokenizer, tokenizer_path, llava_data) -> Engine:
    """Random weights that read anyres images between start and end tokens."""
    folder = tmp_path_factory.mktemp("anyres")
    grown = Tokenizer(add_tokens(tokenizer.serialized, ["<im_start>", "<im_end>"], True, "x")[0])
    overrides = [
        *tiny_run(folder, tokenizer_path, llava_data.json, llava_data.images),
        "data.image_mode=anyres",
        "data.image_grids=[[16, 32], [32, 16], [32, 32]]",
        "data.image_start=<im_start>",
        "data.image_end=<im_end>",
        "model.projector.newline=true",
    ]
    return Engine.from_checkpoint(random_checkpoint(folder, grown, *overrides))


@pytest.fixture(scope="module")
def mixed(anyres, tmp_path_factory) -> list[Picture]:
    """Images of 3, 5, 3 and 3 tiles."""
    folder = tmp_path_factory.mktemp("sizes")
    read = []
    for i, (width, height) in enumerate([(20, 40), (40, 40), (90, 30), (100, 1)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        read.append(anyres.read_image(folder / f"{i}.png"))
    assert [len(picture.tiles) for picture in read] == [3, 5, 3, 3]
    return read


def test_a_batch_of_images_of_several_tiles(anyres, mixed):
    requests = [Request("<image> or <image>?", (mixed[0], mixed[1])), Request("What?", (mixed[2],)), Request("Hi")]
    batch, lengths = anyres._batch(requests)
    assert batch["images"].shape == (3, 10, 16, 16, 3)  # two images of at most 5 tiles
    np.testing.assert_array_equal(batch["images"][0, :8], np.concatenate([mixed[0].tiles, mixed[1].tiles]))
    np.testing.assert_array_equal(batch["images"][1, :3], mixed[2].tiles)
    assert not batch["images"][0, 8:].any()
    assert not batch["images"][1, 3:].any()
    assert not batch["images"][2].any()
    first, second = mixed[0].span.slots, mixed[1].span.slots
    moved = np.where(second == -2, -2, second + 3 * PATCHES)
    assert batch["image_slots"][0][batch["image_slots"][0] != -1].tolist() == [*first, *moved]
    assert batch["image_slots"][1][batch["image_slots"][1] != -1].tolist() == mixed[2].span.slots.tolist()
    size = anyres.tokenizer.size
    for row, spans in enumerate([[first, second], [mixed[2].span.slots], []]):
        tokens = batch["tokens"][row, : lengths[row]]
        starts, ends = np.flatnonzero(tokens == size - 2), np.flatnonzero(tokens == size - 1)
        assert [(b - a - 1) for a, b in zip(starts, ends, strict=True)] == [len(span) for span in spans]


def test_images_of_several_tiles_alone_and_in_a_batch(anyres, mixed):
    requests = [
        Request("What is in the picture?", (mixed[0],)),
        Request("What is in the picture?", (mixed[2],)),
        Request("Is <image> the same as\n<image>?", (mixed[1], mixed[3])),
        Request(SIDES),
    ]
    together = anyres.generate(requests, GREEDY)
    assert together == [anyres.generate([request], GREEDY)[0] for request in requests]
    assert len({tuple(reply.ids) for reply in together}) == len(requests)


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "given"), [("<image> What?", 0), ("<image> or <image>?", 1), ("<image>?", 2)])
def test_marks_and_images_that_differ_in_number(text, given, engine, pictures):
    marks = text.count("<image>")
    with pytest.raises(BadRow, match=f"{marks} <image> marks, but {given} images"):
        engine.generate([Request("x"), Request(text, tuple(pictures[:given]))], GREEDY)
