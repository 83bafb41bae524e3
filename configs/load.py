"""schema <- YAML <- command line: one function that merges them and one that saves the result."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.files import atomic_write

Config = TypeVar("Config")


def load_config(
    schema: type[Config], path: str | Path | None = None, overrides: list[str] | None = None
) -> Config:
    """Merge the schema's defaults, the YAML file at `path` and dotted overrides (`optim.lr=1e-3`).

    Returns an instance of the frozen dataclass `schema`. Unknown keys, wrong types and unreadable
    files raise ValueError naming the file (or "command line") and the key, with a suggestion where
    one is close.
    """
    merged = OmegaConf.structured(schema)
    sources = [] if path is None else [(str(path), lambda: _read_yaml(Path(path)))]
    sources += [(f"command line: {o}", lambda o=o: _parse_override(o)) for o in overrides or []]
    for name, read in sources:
        try:
            merged = OmegaConf.merge(merged, read())
        except OmegaConfBaseException as error:
            raise ValueError(f"{name}: {_first_lines(error)}{_deeper(error, merged)}") from None
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a required key that nobody set
        raise ValueError(f"{path or 'configuration'}: {_first_lines(error)}") from None


def save_config(config: object, path: str | Path) -> None:
    """Write the resolved config as YAML; `load_config(type(config), path)` gives it back."""
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_same_config(saved: Path, config: object, changeable: re.Pattern) -> None:
    """ValueError if the run whose config is `saved` was begun with another one, keys that match
    `changeable` aside; no file, no objection."""
    if not saved.is_file():
        return
    try:
        before, now = flat(asdict(load_config(type(config), saved))), flat(asdict(config))
    except ValueError as error:
        raise ValueError(
            f"{error}; the run was begun with another version of the code: resume it with that "
            "one, or begin a new run with out=..."
        ) from None
    changes = [
        f"{key}: {before[key]} -> {now[key]}"
        for key in now
        if before[key] != now[key] and not changeable.fullmatch(key)
    ]
    if changes:
        raise ValueError(
            f"{saved}: a resumed run must be configured as it was begun ({'; '.join(changes)}); "
            "set it back, or begin a new run with out=..."
        )


def flat(node: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    pairs = {}
    for key, value in node.items():
        nested = isinstance(value, dict)
        pairs |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return pairs


def _read_yaml(path: Path) -> object:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise ValueError(f"{path}: no such config file{hint}")
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise ValueError(f"{path}: expected `key: value` lines at the top level")
    return loaded


def _parse_override(override: str) -> object:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"command line: {override!r} is not of the form section.key=value")
    return OmegaConf.from_dotlist([override])


def _deeper(error: OmegaConfBaseException, merged: DictConfig) -> str:
    """Where a key is that was looked for at the top level."""
    known = flat(OmegaConf.to_container(merged))
    found = [key for key in known if key.endswith(f".{getattr(error, 'full_key', None)}")]
    return f"; or is it {' or '.join(found)}?" if found else ""


def _first_lines(error: OmegaConfBaseException) -> str:
    """OmegaConf's own sentence plus the full dotted key, without its type listing."""
    sentence = str(error).splitlines()[0].rstrip(".")
    key = getattr(error, "full_key", None)
    return f"{sentence} (key: {key})" if key else sentence
