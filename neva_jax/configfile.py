"""From a YAML file and `section.key=value` overrides to a `Config`, and back.

Both are merged into the schema by OmegaConf, so an unknown key or a wrong type cannot pass.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from neva_jax.config import Config, SourceConfig, walk
from neva_jax.errors import UserError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file `path` (None: defaults only), applies `section.key=value` overrides, returns the Config.

    Raises:
      UserError: no such file, no YAML, an unknown key (the nearest one is named), or a value of the wrong type.
    """
    layers = [] if path is None else [(_read_yaml(path), str(path))]
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"override {text!r}: write it as section.key=value")
        try:
            parsed = yaml.load(value, _Loader)
        except YAML_ERRORS as error:
            raise UserError(f"override {text!r}: the value is no YAML ({_first_line(error)})") from None
        layers.append((_nest(name, parsed), f"override {name}"))
    return _merged(layers)


def config_from_dict(values: dict) -> Config:
    """The inverse of `to_dict`; used for the copy of the configuration inside a checkpoint."""
    # Not a path by then, but a whole template, which may hold anything: OmegaConf never sees it.
    data = dict(values.get("data", {}))
    template = data.pop("chat_template", None)
    config = _merged([(values | {"data": data}, "configuration of the checkpoint")])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=template))


def to_dict(config: Any) -> dict:
    """A configuration (or one section of it) as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: str | Path) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({_reason(error)})") from None
    try:
        values = yaml.load(text, _Loader)
    except YAML_ERRORS as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"--config {path}:{line} is no usable YAML ({problem})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold sections of keys, but holds a {type(values).__name__}")
    return values


YAML_ERRORS = (yaml.YAMLError, TypeError, ValueError, RecursionError)  # the last three: {{x}}, !!int x, 10000 brackets


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and no key twice: `off` is a word, `1e-3` a number, `007`, `12:30` and `2024-11-24` text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuses a mapping in which a key stands twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"key {key_node.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader`, or a reader of YAML 1.1, would take for something else than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own way)
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Every value is written where it stands."""
        return True


def _nest(name: str, value: Any) -> dict:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _merged(layers: Sequence[tuple[dict, str]]) -> Config:
    """The schema's defaults under (values, where they come from), the later ones on top."""
    merged = _schema(Config)
    for values, origin in layers:
        _check_keys(values, Config, "", origin)
    try:
        merged = OmegaConf.merge(merged, *(values for values, _ in layers))
    except _MERGE_ERRORS:
        # Again in single steps, which takes longer but tells where the fault is.
        for values, origin in layers:
            with _named(origin):
                merged = OmegaConf.merge(merged, values)
    with _named("configuration"):
        return OmegaConf.to_object(merged)


@cache
def _schema(kind: type) -> DictConfig:
    """OmegaConf's view of a section, which `merge` copies: making it takes longer than merging."""
    return OmegaConf.structured(kind, flags={"readonly": False})


_MERGE_ERRORS = (OmegaConfBaseException, TypeError, ValueError)


@contextmanager
def _named(origin: str, prefix: str = "") -> Iterator[None]:
    """Turns OmegaConf's errors into one line that names where the value came from and its key."""
    try:
        yield
    except _MERGE_ERRORS as error:
        name = getattr(error, "full_key", None)
        raise UserError(f"{origin}: {f'{prefix}{name}: ' if name else ''}{_first_line(error)}") from None


def _check_keys(values: Any, schema: type, prefix: str, origin: str) -> None:
    """Unknown keys and misplaced sections, found before OmegaConf so that the message can name the nearest key."""
    if values is None and prefix:
        raise UserError(f"{origin}: {prefix[:-1]} is a section and holds nothing; remove it or give it keys")
    if not isinstance(values, dict):
        raise UserError(f"{origin}: {prefix[:-1]} is a section of keys, not {values!r}")
    fields = {item.name: item for item in dataclasses.fields(schema)}
    for name, value in values.items():
        if name not in fields:
            wrong = f"{prefix}{name}{_first_key(value)}"
            known = [full for full, _ in walk()] + [
                f"data.train.{item.name}" for item in dataclasses.fields(SourceConfig)
            ]
            near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.0)
            raise UserError(f"{origin}: unknown key {wrong}; did you mean {near[0]}?")
        if isinstance(value, str) and value == "???":
            raise UserError(f"{origin}: {prefix}{name}: ??? stands for a value that is still missing; give one")
        _check_plain(value, f"{origin}: {prefix}{name}")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            _check_keys(value, kind, f"{prefix}{name}.", origin)
        elif kind == list[SourceConfig]:
            if not isinstance(value, list):
                raise UserError(f"{origin}: {prefix}{name} is a list of {{json, images, weight}}, not {value!r}")
            for i, source in enumerate(value):
                _check_keys(source, SourceConfig, f"{prefix}{name}[{i}].", origin)
                with _named(origin, f"{prefix}{name}[{i}]."):
                    OmegaConf.merge(_schema(SourceConfig), source)


def _check_plain(value: Any, where: str) -> None:
    """Raises UserError for `${…}`, which OmegaConf would replace: by a secret of the environment, say."""
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{where}={value}: ${{…}} is not replaced in a configuration; write the value itself")
    for item in value if isinstance(value, list) else []:
        _check_plain(item, where)


def _first_key(value: Any) -> str:
    """The path to the first leaf below an unknown section, so that the suggestion is a whole key."""
    if not isinstance(value, dict) or not value:
        return ""
    name, inner = next(iter(value.items()))
    return f".{name}{_first_key(inner)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or _first_line(error)
