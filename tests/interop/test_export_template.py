"""The exported chat template, rendered and tokenized by transformers, against our own tokens."""

import dataclasses

import numpy as np
import pytest
import transformers

from neva_jax.config import DataConfig
from neva_jax.configfile import load_config
from neva_jax.data.encoding import conversation_encoder
from neva_jax.data.rows import Turn
from neva_jax.data.templates import TEMPLATES
from neva_jax.data.tiles import ImageSpan
from neva_jax.interop.export_files import write_tokenizer
from neva_jax.interop.export_template import chat_template, obstacle, starts_with_bos
from neva_jax.interop.to_hf import _generation
from neva_jax.training.checkpoint_meta import Meta
from tests.data.conversations import CHATML, KINDS, toy

# (system, messages as (role, number of images, text)); without label
TALKS = [
    (None, [(0, 1, "What is it?")]),
    (None, [(0, 1, "What  is it?"), (1, 0, "a cat"), (0, 2, "Sure?"), (1, 0, "")]),
    (None, [(0, 0, "Hi {{ x }} \"'"), (1, 0, "🙂\n  yes "), (0, 1, "So?")]),
    ("Be brief.", [(0, 1, "Hi"), (1, 0, "Yes."), (0, 0, "So?"), (1, 0, "No.")]),
    ("", [(0, 0, "Hi"), (1, 0, "Yes.")]),
]
# Hugging Face's tokenizer.json of Llama has a space before a text behind a special token.
NOT_IN_JSON = {("nvgpt", "sp"), ("nv_dpo", "sp")}


def messages_of(system, said, in_parts):
    made = [] if system is None else [{"role": "system", "content": system}]
    for who, images, text in said:
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}] if in_parts else text
        made.append({"role": ("user", "assistant")[who], "content": content})
    return made


def ours_of(data, tokenizer, system, said, with_images):
    turns, spans = [], []
    for who, images, text in said:
        images = images * with_images
        marks = "<image>\n" * images if data.image_position == "in_place" else "<image>" * images + "\n" * bool(images)
        turns.append(Turn(("user", "assistant")[who], marks + text))
        spans += [ImageSpan(np.arange(1, dtype=np.int32), 1)] * images
    encoded = conversation_encoder(data, tokenizer).encode(turns, spans, system)
    return encoded.tokens, encoded.slots


def exported(folder, data, tokenizer, with_images) -> transformers.PreTrainedTokenizerFast:
    """The folder's tokenizer with its template, or None where there is an obstacle."""
    adds_bos = write_tokenizer(folder, tokenizer, with_images, 512, starts_with_bos(data, tokenizer))
    if obstacle(data, tokenizer, with_images, adds_bos):
        return None
    written = chat_template(data, tokenizer, with_images, not with_images or not adds_bos)
    (folder / "chat_template.jinja").write_text(written, encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(data, tokenizer, theirs, with_images):
    image = theirs.convert_tokens_to_ids("<image>")
    for system, said in TALKS:
        prompts = said[-1][0] == 0
        messages = messages_of(system, said, with_images)
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
        ids = theirs(text, add_special_tokens=with_images)["input_ids"]
        tokens, slots = ours_of(data, tokenizer, system, said, with_images)
        if data.template == "chatml" and not prompts:
            assert not text.endswith("\n")
        assert ids == np.where(slots >= 0, image, tokens).tolist(), text


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_transformers_makes_our_tokens(template, kind, with_images, tmp_path):
    data, tokenizer = DataConfig(template=template), toy(kind)
    theirs = exported(tmp_path, data, tokenizer, with_images)
    assert (theirs is None) == ((template, kind) in NOT_IN_JSON)
    if theirs is not None:
        assert_same(data, tokenizer, theirs, with_images)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_start": "<extra_id_4>", "image_end": "<extra_id_5>"},
        {"image_position": "front"},
        {"image_position": "front", "template": "llama_3"},
        {"template": "v1_mmtag", "image_start": "<extra_id_4>"},
        {"template": "jinja", "chat_template": CHATML},
        {"compat": "neva"},
        {"compat": "neva", "template": "llama_2"},
    ],
    ids=str,
)
def test_other_settings(changes, tmp_path):
    data, tokenizer = DataConfig(**changes), toy("bytes")
    assert_same(data, tokenizer, exported(tmp_path, data, tokenizer, True), True)


def test_labels_of_messages(tmp_path):
    tokenizer = toy("bytes")
    for template in ("nvgpt", "nv_dpo"):
        data = DataConfig(template=template)
        theirs = exported(tmp_path, data, tokenizer, False)
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes.", "label": "quality:1"},
            {"role": "user", "content": "So?"},
        ]
        turns = [Turn("user", "Hi"), Turn("assistant", "Yes.", "quality:1"), Turn("user", "So?")]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == conversation_encoder(data, tokenizer).encode(turns, []).tokens.tolist()


def test_generation_ends_where_the_template_ends_an_answer():
    tokenizer = toy("bytes")
    for template, ends in (("v1", "</s>"), ("chatml", "<|im_end|>"), ("plain", "</s>"), ("nvgpt", "<extra_id_1>")):
        config = dataclasses.replace(load_config(None, []), data=DataConfig(template=template))
        written = _generation(Meta(1, config, (), None, tokenizer), {"transformers_version": "5"})
        expected = sorted({tokenizer.eos_id, tokenizer.special_tokens[ends]})
        assert written["eos_token_id"] == (expected if len(expected) > 1 else expected[0])


def test_what_cannot_be_written_is_said():
    llama = toy("sp")
    assert obstacle(DataConfig(template="v1"), llama, True, True) is None
    assert obstacle(DataConfig(template="v1", compat="neva"), llama, True, False) == (
        "data.template=v1 with data.compat=neva has no space before a text behind a special token, and Hugging Face's "
        "tokenizer puts one there"
    )
    assert obstacle(DataConfig(template="nvgpt"), toy("bytes"), True, True) == (
        "data.template=nvgpt does not start with the bos, and the exported tokenizer.json puts one before every text"
    )
    assert obstacle(DataConfig(template="nvgpt"), toy("bytes"), False, True) is None


def test_a_checkpoint_without_a_chat_template(from_hf, to_hf, tmp_path, monkeypatch):
    from neva_jax.interop import to_hf as module
    from tests.interop import folders

    hf = folders.FAMILIES["llama"]
    source = folders.write_folder(tmp_path / "hf", hf, folders.llm_arrays(hf))
    checkpoint, read = from_hf(source), module.read_meta

    def with_compat(path):
        meta = read(path)
        data = dataclasses.replace(meta.config.data, compat="neva")
        return dataclasses.replace(meta, config=dataclasses.replace(meta.config, data=data))

    monkeypatch.setattr(module, "read_meta", with_compat)
    out = to_hf(checkpoint, text_only=True)
    assert not (out / "chat_template.jinja").exists()
    assert (out / "config.json").exists()
