"""Jinja chat templates, as `tokenizer_config.json` of a Hugging Face model has them: `data.template=jinja`.

`transformers` renders the template, with marks in place of what people say; then the rendering is cut at the marks:

    messages      user ⟦0⟧, assistant ⟦1⟧
    rendering     <|im_start|>user\\n⟦0⟧<|im_end|>\\n<|im_start|>assistant\\n⟦1⟧<|im_end|>\\n
    generation                                                            ^^^^^^^^^^^^^
    pieces        token  text     text  token …                           text  token      text

Between marks it is the template that speaks: names of special tokens become their ids. What stands for a mark is text,
and stays text. White space around what is said is rendered too, not hidden in the mark, so that `| trim` works.

What is learned stands between the template's own `{% generation %}` and `{% endgeneration %}`; one without them is
refused, since its roles can only be guessed.
"""

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neva_jax.config import Config, DataConfig
from neva_jax.data.rows import IMAGE_MARK, BadRow, Turn
from neva_jax.data.templates import Ending, Piece
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError

OPEN, CLOSE = "\ue000", "\ue001"  # of a mark; private characters, which a template does not write
_MARK = f"{OPEN}([0-9]+){CLOSE}"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = threading.Lock()  # transformers notes the generation blocks in the compiled template itself


def with_chat_template(config: Config) -> Config:
    """The configuration with the template's text in place of its file, so that a checkpoint needs no file.

    Raises:
      UserError: the file cannot be read, or holds no template.
    """
    if config.data.template != "jinja":
        return config
    return replace(config, data=replace(config.data, chat_template=read_chat_template(config.data.chat_template)))


def read_chat_template(where: str) -> str:
    """The text of a template: of a Jinja file, of a `tokenizer_config.json`, or `where` itself if it is one.

    Raises:
      UserError: unreadable, or no template in it.
    """
    if "{%" in where or "{{" in where:
        return where
    try:
        text = Path(where).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"data.chat_template={where}: cannot be read ({error})") from None
    if Path(where).suffix != ".json":
        return text
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"data.chat_template={where}: is no JSON ({error})") from None
    found = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise UserError(f"data.chat_template={where}: has no field chat_template that holds the text of a template")
    return found


@dataclass(frozen=True)
class _Rendering:
    """What a template makes of marks: the text, and the (start, end) of what is learned."""

    text: str
    learned: list[tuple[int, int]]


class JinjaLayout:
    """Lays a conversation out as a Jinja template says; `ending` is how its answers end."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        """`source`: text of the template.

        Raises:
          UserError: no generation markers, or a rendering that cannot be cut into what was said.
        """
        if not _GENERATION.search(source):
            raise UserError(
                "data.chat_template: has no {% generation %} … {% endgeneration %} around what the assistant says, so "
                "that nobody can tell what to learn; put them around an answer and its end token"
            )
        if "strftime_now" in source:
            raise UserError(
                "data.chat_template: writes the date of the day (strftime_now), so that a resumed run would have other "
                "tokens; write a fixed date"
            )
        self.source, self._tokens = source, tokenizer.settings
        # Names of white space alone would tear the template's own line ends and indents.
        names = sorted((name for name in tokenizer.special_tokens if name.strip()), key=len, reverse=True)
        self._ids = {name: tokenizer.special_tokens[name] for name in names}
        self._cuts = re.compile("|".join([_MARK, *map(re.escape, names)]))
        try:
            self.ending = self._ending(tokenizer.eos_id)
        except BadRow as error:
            raise UserError(f"data.chat_template: {error}") from None

    @classmethod
    def from_config(cls, data: DataConfig, tokenizer: Tokenizer) -> "JinjaLayout":
        """The template of `data.chat_template`; raises UserError."""
        return cls(read_chat_template(data.chat_template), tokenizer)

    def pieces(self, turns: Sequence[Turn], system: str | None) -> list[Piece]:
        """The pieces of a conversation; with `system`, a system message comes first.

        Raises:
          BadRow: the template refuses the conversation, or leaves out, doubles or changes what was said.
        """
        first = [] if system is None else [Turn("system", system)]
        rendering = self._render([*first, *turns])
        said = [*first, *turns]
        pieces, end = [], 0
        for turn, (start, stop) in zip(_answers(turns), rendering.learned, strict=True):
            pieces += self._cut(rendering.text[end:start], said, None)
            pieces += self._cut(rendering.text[start:stop], said, turn)
            end = stop
        return [*pieces, *self._cut(rendering.text[end:], said, None)]

    def _render(self, said: Sequence[Turn]) -> _Rendering:
        from transformers.utils.chat_template_utils import render_jinja_template  # half a second, for this only

        messages = [{"role": turn.role, "content": _marked(turn.text, i)} for i, turn in enumerate(said)]
        try:
            with _RENDERING:
                (text,), (learned,) = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.source,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=said[-1].role == "user",
                    **{name: token for name, token in self._tokens.items() if token is not None},
                )
        except Exception as error:  # a template is a program, and may fail in any way
            message = " ".join(str(error).split())
            raise BadRow(f"the chat template fails ({type(error).__name__}: {message})") from None
        self._check(said, text, learned)
        return _Rendering(text, learned)

    def _check(self, said: Sequence[Turn], text: str, learned: list[tuple[int, int]]) -> None:
        expected = [i for i, turn in enumerate(said) if turn.text.strip()]
        found = [int(match[1]) for match in re.finditer(_MARK, text)]
        if found != expected or text.count(OPEN) != len(found) or text.count(CLOSE) != len(found):
            raise BadRow(
                f"the chat template must write what is said once, in order and unchanged; of the texts {expected} it "
                f"writes {found}"
            )
        answers = _answers(said)
        if len(learned) != len(answers):
            raise BadRow(f"the chat template has {len(learned)} generation blocks for {len(answers)} answers")
        for i, (start, stop) in zip(answers, learned, strict=True):
            learned_texts = [int(match[1]) for match in re.finditer(_MARK, text[start:stop])]
            if learned_texts != [i] * bool(said[i].text.strip()):
                raise BadRow("the chat template has an answer outside of its generation block, or another text in it")

    def _cut(self, text: str, said: Sequence[Turn], answer: int | None) -> list[Piece]:
        """The pieces of a part of the rendering."""
        pieces, end = [], 0
        for match in self._cuts.finditer(text):
            pieces.append(Piece(text[end : match.start()], answer))
            if match[1] is None:
                pieces.append(Piece(self._ids[match[0]], answer))
            else:
                turn = said[int(match[1])]
                core = turn.text.strip()
                # In an answer or a system text, an image mark is text.
                for i, part in enumerate(core.split(IMAGE_MARK) if turn.role == "user" else [core]):
                    pieces += [Piece(None)] if i else []
                    pieces.append(Piece(part, answer))
            end = match.end()
        return [*pieces, Piece(text[end:], answer)]

    def _ending(self, eos: int) -> Ending:
        """Read off two rounds, whose prompts must be what the answers are learned behind."""
        said = [Turn(("user", "assistant")[i % 2], "x") for i in range(4)]
        text = self._render(said).text
        for rounds in (1, 3):
            prompt = self._render(said[:rounds]).text
            if not text.startswith(prompt):
                raise BadRow(
                    "the chat template makes prompts that differ from what it trains on (with add_generation_prompt, "
                    f"{prompt[-40:]!r})"
                )
        mark = f"{OPEN}3{CLOSE}"
        lead = text[len(prompt) : text.index(mark)]
        after = text[text.index(mark) + len(mark) :]
        end = self._cuts.search(after)
        tail = after[: end.start()] if end else after
        ids = {eos, self._ids[end[0]]} if end else {eos}
        continues = self._cut(prompt, said, None)[-1].value != ""
        return Ending(lead, tail, frozenset(ids), by_text=not end and tail != "", continues=continues)


def _answers(turns: Sequence[Turn]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn.role == "assistant"]


def _marked(text: str, number: int) -> str:
    """A text with a mark in place of all but the white space around it."""
    core = text.strip()
    return text.replace(core, f"{OPEN}{number}{CLOSE}") if core else text
