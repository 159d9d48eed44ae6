"""Conversation templates: one table of frames, and how a frame becomes pieces.

A frame is the template's text around what people say. Words in braces stand for something else, and special tokens are
spelled as they are called:

    {bos} {eos}    the tokenizer's own tokens ({bos}: nothing where it has none)
    {own_bos}      the bos, where the tokenizer puts it before a text by itself
    {system}       the system block: text and frame, in the first round only
    {label}        the line of the answer's attributes (SteerLM)
    {text}         what is said
    <|im_end|>     a special token; `[INST]` and `USER:` are text

The parts of a conversation of two rounds, and what is learned of them (w):

    part    head   user  cue  answer   between   user  cue  answer
    w        0      0     0     1         0       0     0     1

Adding a template is adding a row; docs/data.md draws each. What the frames say become special tokens here, what people
say becomes text (`Piece`), so no text can make a turn.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import tokenizers

from neva_jax.data.rows import IMAGE_MARK, Turn
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError


@dataclass(frozen=True)
class Template:
    """The frames of a conversation.

    head: what the conversation begins with.
    user: what the user says.
    cue: what stands between that and the answer; a prompt ends here.
    answer: the answer and its end, all of it supervised.
    between: what stands between two rounds.
    system: default of the system text.
    system_block: its frame; `bare` stands there instead when the text is empty.
    label_line: frame of an answer's label, `default_label` the label of an answer that has none (None: no line).
    image: frame of an image, `{text}` being its tokens.
    image_only: the user's text is dropped, and only its images stay (LLaVA's `plain`).
    whole: SentencePiece puts its dummy prefix before the whole conversation and nowhere else, as it does when special
      tokens are pieces of a text that is encoded in one go (NeMo); otherwise text behind a special token or an image
      has one too (Hugging Face, LLaVA).
    """

    user: str
    answer: str
    head: str = "{bos}{system}"
    cue: str = ""
    between: str = ""
    system: str = ""
    system_block: str = "{system}"
    bare: str = ""
    label_line: str = ""
    default_label: str | None = None
    image: str = "{text}"
    image_only: bool = False
    whole: bool = False


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = VICUNA_SYSTEM.replace("curious user", "curious human").replace("the user's", "the human's")
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
META_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
STEERLM_LABEL = (
    "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"
)

V1 = Template(
    system=VICUNA_SYSTEM,
    system_block="{system} ",
    user="USER: {text}",
    cue=" ASSISTANT:",
    answer=" {text}{eos}",
)
LLAMA_2 = Template(
    head="",
    system=LLAVA_SYSTEM,
    system_block="<<SYS>>\n{system}\n<</SYS>>\n\n",
    user="{bos}[INST] {system}{text} [/INST]",
    answer=" {text} {eos}",
)
NVGPT = Template(
    head="<extra_id_0>System\n{system}<extra_id_1>",
    system=VICUNA_SYSTEM,
    system_block="{system}\n\n",
    bare="\n",
    user="User\n{text}\n<extra_id_1>",
    cue="Assistant\n{label}",
    label_line="<extra_id_2>{label}\n",
    default_label=STEERLM_LABEL,
    answer="{text}\n<extra_id_1>",
    whole=True,
)
TEMPLATES = {
    "plain": Template(head="{bos}", user="{text}", answer="{text}\n", image_only=True),
    "v0": Template(
        system=HUMAN_SYSTEM,
        system_block="{system}###",
        user="Human: {text}###",
        cue="Assistant:",
        answer=" {text}###",
    ),
    "v1": V1,
    "llava_v1": replace(V1, system=HUMAN_SYSTEM),
    "v1_mmtag": replace(V1, system=MMTAG_SYSTEM, image="<Image>{text}</Image>"),
    "llama_2": LLAMA_2,
    "llama_2_long": replace(LLAMA_2, system=META_SYSTEM),
    "llama_3": Template(
        system=LLAVA_SYSTEM,
        system_block="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        cue="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{text}<|eot_id|>",
    ),
    "mistral": Template(
        head="{bos}", system_block="{system}\n\n", user=" [INST] {system}{text} [/INST]", answer="{text}{eos}"
    ),
    "chatml": Template(
        head="{own_bos}{system}",
        system="You are a helpful assistant.",
        system_block="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        cue="<|im_start|>assistant\n",
        answer="{text}<|im_end|>",
        between="\n",
    ),
    "nvgpt": NVGPT,
    "nv_dpo": replace(NVGPT, system="", system_block="{system}\n", default_label=None),
    "mpt": Template(
        head="{own_bos}{system}",
        system=MPT_SYSTEM,
        system_block="<|im_start|>system\n{system}<|im_end|>",
        user="<|im_start|>user\n{text}<|im_end|>",
        cue="<|im_start|>assistant\n",
        answer="{text}<|im_end|>",
    ),
}

# data.compat=neva: the streams of the templates that NeVA's data sets know, where they differ. Its <extra_id_6> and
# <extra_id_7> are rewritten to <s> and </s>, so {bos} and {eos} are what they become. A row's own system text stands
# in nvgpt as it is.
NEVA = {
    name: replace(TEMPLATES[name], whole=True, **changes)
    for name, changes in {
        "plain": {"head": ""},
        "v1": {"head": "{system}", "between": " "},
        "llama_2": {"user": "[INST] {system}{text} [/INST]", "between": "{bos} "},
        "llama_3": {},
        "mistral": {},
        "nvgpt": {"system": f"{VICUNA_SYSTEM}\n\n", "system_block": "{system}", "bare": ""},
        "nv_dpo": {"system": "\n", "system_block": "{system}", "bare": ""},
    }.items()
}


@dataclass(frozen=True)
class Piece:
    """A part of a conversation.

    value: text, the id of a special token, or None for an image.
    answer: the number of the turn that is being learned here; None: nothing is.
    """

    value: str | int | None
    answer: int | None = None


@dataclass(frozen=True)
class Ending:
    """How an answer begins and ends while it is generated.

    lead: the template's text before the answer.
    tail: the template's text behind it, before the end token.
    ids: tokens that end an answer.
    by_text: there is no end token, and `tail` itself ends the answer.
    continues: a prompt ends with text, so that the answer has no dummy prefix.
    """

    lead: str
    tail: str
    ids: frozenset[int]
    by_text: bool
    continues: bool


_PARTS = re.compile(r"\{(bos|own_bos|eos|system|text|label)\}|(<\|[a-z_]+\|>|<extra_id_\d+>)")


@cache
def parts(frame: str) -> tuple[tuple[str, str], ...]:
    """A frame as (kind, value): kind is `text`, `token` (value: its name) or `slot` (value: the word in braces)."""
    found, end = [], 0
    for match in _PARTS.finditer(frame):
        found.append(("text", frame[end : match.start()]))
        found.append(("slot", match[1]) if match[1] else ("token", match[2]))
        end = match.end()
    return tuple(part for part in [*found, ("text", frame[end:])] if part[1])


class FrameLayout:
    """Lays a conversation out as a template of the table says; `ending` is how its answers end."""

    def __init__(self, name: str, template: Template, tokenizer: Tokenizer):
        """`name`: of the template, for messages.

        Raises:
          UserError: the tokenizer lacks a token that the template needs.
        """
        self.template = template
        self.ids: dict[str, int | None] = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        frames = (template.head, template.system_block, template.user, template.cue, template.label_line)
        used = [part for frame in (*frames, template.answer, template.between) for part in parts(frame)]
        names = dict.fromkeys(value for kind, value in used if kind == "token")
        if lacking := [token for token in names if tokenizer.token_id(token) is None]:
            raise UserError(
                f"data.template={name} needs {', '.join(lacking)}, which the tokenizer lacks; add what is missing with "
                "python -m neva_jax.convert add-tokens, or choose another data.template"
            )
        self.ids |= {token: tokenizer.token_id(token) for token in names}
        if ("slot", "own_bos") in used:
            self.ids["own_bos"] = tokenizer.bos_id if adds_bos(tokenizer) else None
        self.ending = self._ending()

    def pieces(self, turns: Sequence[Turn], system: str | None) -> Iterator[Piece]:
        """The pieces of a conversation; `system` takes the place of the template's system text."""
        template = self.template
        system = template.system if system is None else system
        frame = template.system_block if system else template.bare
        block = self._fill(frame, system=[Piece(system)])
        yield from self._fill(template.head, system=block)
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                yield from self._fill(template.answer, i, text=[Piece(turn.text, i)])
                continue
            if i:
                yield from self._fill(template.between)
            said = self._said(turn.text)
            yield from self._fill(template.user, system=block if i == 0 else [], text=said)
            yield from self._fill(template.cue, label=self._label(turns[i + 1] if i + 1 < len(turns) else None))

    def _said(self, text: str) -> list[Piece]:
        image = self._fill(self.template.image, text=[Piece(None)])
        found = []
        for i, part in enumerate(text.split(IMAGE_MARK)):
            found += image if i else []
            found += [] if self.template.image_only else [Piece(part)]
        return found

    def _label(self, answer: Turn | None) -> list[Piece]:
        label = self.template.default_label if answer is None or answer.label is None else answer.label
        return [] if label is None else self._fill(self.template.label_line, label=[Piece(label)])

    def _fill(self, frame: str, answer: int | None = None, **slots: list[Piece]) -> list[Piece]:
        found: list[Piece] = []
        for kind, value in parts(frame):
            if kind == "text":
                found.append(Piece(value, answer))
            elif value in slots:
                found += slots[value]
            elif self.ids[value] is not None:
                found.append(Piece(self.ids[value], answer))
        return found

    def _ending(self) -> Ending:
        before, after = (parts(half) for half in self.template.answer.split("{text}"))
        lead, tail = ("".join(value for kind, value in side if kind == "text") for side in (before, after))
        ids = {self.ids[value] for kind, value in after if kind != "text"}
        continues = not self.template.image_only
        return Ending(lead, tail, frozenset({*ids, self.ids["eos"]}), by_text=not ids, continues=continues)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own file puts the bos before every text.

    A `tokenizer.json` says so; of a SentencePiece model nobody knows, and the models that use one with a template of
    `<|im_start|>` (Yi) do without.
    """
    if tokenizer.bos_id is None or tokenizer.file != "tokenizer.json":
        return False
    library = tokenizers.Tokenizer.from_str(tokenizer.serialized.decode())
    return library.encode("a").ids[:1] == [tokenizer.bos_id]
