"""The checkpoint's conversation template as the `chat_template.jinja` of an exported folder.

A message is written images first, then its text. A system message takes the place of the template's own system text,
and a message's `label` that of the default one. As in LLaVA's, the bos is left to the tokenizer where that adds it.
"""

import json

from neva_jax.config import DataConfig
from neva_jax.data.chat_template import read_chat_template
from neva_jax.data.encoding import conversation_encoder
from neva_jax.data.rows import IMAGE_MARK, Turn
from neva_jax.data.templates import Template, parts
from neva_jax.data.tokenizer import Tokenizer

# vLLM looks for a loop over the content of the loops' variable, by its name: here as in every loop over messages, `m`.
TEXT_MACRO = (
    "{% macro text(m) %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
)


def starts_with_bos(data: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a conversation start with the bos."""
    first = conversation_encoder(data, tokenizer).encode([Turn("user", "a")], []).tokens[0]
    return tokenizer.bos_id is not None and int(first) == tokenizer.bos_id


def obstacle(data: DataConfig, tokenizer: Tokenizer, with_images: bool, adds_bos: bool) -> str | None:
    """Why no Jinja template gives our tokens, or None; `adds_bos`: the exported tokenizer does, before every text."""
    if conversation_encoder(data, tokenizer).whole and tokenizer.file == "tokenizer.model":
        compat = " with data.compat=neva" if data.compat == "neva" else ""
        return (
            f"data.template={data.template}{compat} has no space before a text behind a special token, and Hugging "
            "Face's tokenizer puts one there"
        )
    if with_images and adds_bos and not starts_with_bos(data, tokenizer):
        return (
            f"data.template={data.template} does not start with the bos, and the exported tokenizer.json puts one "
            "before every text"
        )
    return None


def chat_template(data: DataConfig, tokenizer: Tokenizer, with_images: bool, with_bos: bool) -> str:
    """The template in Jinja.

    Args:
      with_images: messages may be lists of parts, some of them images.
      with_bos: it writes the bos that a conversation starts with: nobody else does.
    """
    if data.template == "jinja":
        source = read_chat_template(data.chat_template)
        return _flattened(_image(data) + "\n") + source if with_images else source
    layout = conversation_encoder(data, tokenizer).layout
    return _Writer(layout.template, data, layout.ids, with_images, with_bos).write()


def _image(data: DataConfig) -> str:
    return f"{data.image_start or ''}{IMAGE_MARK}{data.image_end or ''}"


def _flattened(image: str) -> str:
    """Jinja that makes the messages' parts one text each, for a template that knows only texts."""
    return (
        TEXT_MACRO
        + _images_macro(image)
        + "{% set flat = namespace(messages=[]) %}{% for m in messages %}"
        + "{% set flat.messages = flat.messages + [dict(m, content=images(m) + text(m))] %}{% endfor %}"
        + "{% set messages = flat.messages %}"
    )


def _images_macro(image: str) -> str:
    return (
        "{% macro images(m) %}{% if m.content is not string %}{% for part in m.content if part.type == 'image' %}"
        f"{{{{ {json.dumps(image)} }}}}{{% endfor %}}{{% endif %}}{{% endmacro %}}"
    )


class _Writer:
    """Writes the frames of a template as Jinja."""

    def __init__(
        self, template: Template, data: DataConfig, ids: dict[str, int | None], with_images: bool, with_bos: bool
    ):
        self.template, self.ids, self.front = template, ids, data.image_position == "front"
        line_end = "" if template.image_only or self.front else "\n"
        image = template.image.replace("{text}", _image(data)) + line_end
        self.macros = TEXT_MACRO + (_images_macro(image) if with_images else "")
        self.with_images, self.with_bos = with_images, with_bos

    def write(self) -> str:
        template = self.template
        default = json.dumps(template.system, ensure_ascii=False)
        label = self._label() if template.label_line else ""
        return (
            self.macros
            + "{% if messages[0].role == 'system' %}{% set system = text(messages[0]) %}{% set turns = messages[1:] %}"
            + f"{{% else %}}{{% set system = {default} %}}{{% set turns = messages %}}{{% endif %}}"
            + "{% set block %}{% if system %}"
            + self._frame(template.system_block, system="{{ system }}")
            + ("{% else %}" + self._frame(template.bare) if template.bare else "")
            + "{% endif %}{% endset %}"
            + self._frame(template.head, first=True, system="{{ block }}")
            + "{% for m in turns %}{% if m.role == 'user' %}"
            + (f"{{% if not loop.first %}}{self._frame(template.between)}{{% endif %}}" if template.between else "")
            + self._frame(
                template.user,
                first=not template.head,
                system="{% if loop.first %}{{ block }}{% endif %}",
                text=self._said(),
            )
            + "{% if not loop.last or add_generation_prompt %}"
            + self._frame(template.cue, label=label)
            + "{% endif %}{% else %}"
            + self._frame(template.answer, text="{{ text(m) }}")
            + "{% endif %}{% endfor %}"
        )

    def _frame(self, frame: str, first: bool = False, **slots: str) -> str:
        """A frame in Jinja; `first`: the conversation begins here, with a bos that may be the tokenizer's affair."""
        written = []
        for i, (kind, value) in enumerate(parts(frame)):
            if kind == "slot" and value in slots:
                written.append(slots[value])
            elif kind != "slot":
                written.append(f"{{{{ {json.dumps(value, ensure_ascii=False)} }}}}")
            elif self.ids[value] is not None:
                token = "{{ eos_token }}" if value == "eos" else "{{ bos_token }}"
                if first and i == 0 and not self.with_bos:
                    token = f"{{% if not loop.first %}}{token}{{% endif %}}" if frame == self.template.user else ""
                written.append(token)
        return "".join(written)

    def _said(self) -> str:
        if not self.with_images:
            return "" if self.template.image_only else "{{ text(m) }}"
        if self.template.image_only:
            return "{{ images(m) }}"
        if not self.front:
            return "{{ images(m) }}{{ text(m) }}"
        return (
            "{% if images(m) %}{{ images(m) }}{% if text(m) | trim %}{{ '\\n' + text(m) | trim }}{% endif %}"
            "{% else %}{{ text(m) }}{% endif %}"
        )

    def _label(self) -> str:
        given = self._frame(self.template.label_line, label="{{ loop.nextitem.label }}")
        default = ""
        if self.template.default_label is not None:
            default = self._frame(self.template.label_line, label=self.template.default_label)
        return (
            "{% if loop.nextitem is defined and loop.nextitem.label is defined %}"
            f"{given}{{% else %}}{default}{{% endif %}}"
        )
