"""Looking at a YAML config and those it stands on before Detectron2 reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY

from fpn_plugin.errors import UserError

__all__ = ["check_config_file"]


def check_config_file(path: str) -> None:
    """Refuses a config that Detectron2 would not read, or not as its author means it.

    Args:
        path: of a file that is there.

    Raises:
        UserError: it or one of its bases, at any depth, is not a mapping of plain YAML, has a key
            twice, or names a base that is not a file here or that stands on it in turn.
    """
    _check(path, ())


def _check(path: str, above: tuple[str, ...]) -> None:
    """Checks a file.

    Args:
        path: of it.
        above: real paths of the files that stand on it.
    """
    above = (*above, os.path.realpath(path))
    where = " ".join(path.split())
    for base in _bases(_read(path, where), where):
        shown = f"{where}: its {BASE_KEY} {base!r}"
        if "://" in base:
            raise UserError(
                f"{shown} would be fetched from the network, which is not done here: download the "
                "file and name it there"
            )
        # As fvcore finds it.
        file = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(file):
            what = "is a folder" if os.path.isdir(file) else "is not there"
            raise UserError(f"{shown} {what}: expected a YAML file's path, relative to {where}")
        if os.path.realpath(file) in above:
            raise UserError(
                f"{shown} stands on this file in turn: take {BASE_KEY} out of one of them"
            )
        _check(file, above)


def _bases(content: Any, where: str) -> Iterator[str]:
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{where} {what}: a config has keys and values, as SEED: 1")
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"{where}: {key!r} is no config key: keys are text, as in SEED: 1")
    given = content.get(BASE_KEY, [])
    bases = given if isinstance(given, list) else [given]
    for base in bases:
        if not isinstance(base, str):
            raise UserError(f"{where}: {BASE_KEY} is {given!r}: expected a path or a list of them")
        yield base


def _read(path: str, where: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, _StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read {where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not a text file") from error
    except RecursionError as error:
        raise UserError(
            f"{where} has lists or mappings within one another too deeply: write it flatter"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number or date that is none
        message = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read as plain YAML: {message}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, and what contains itself by an alias."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                message = f"key {name!r} is there twice: delete one of the two"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(name)
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        # Otherwise only what is hashed is built to its depth at once, which finds the cycles.
        self.deep_construct = True
        return super().construct_document(node)
