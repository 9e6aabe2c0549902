"""Checks of a YAML config and its bases before Detectron2 reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY

from fpn_plugin.errors import UserError, one_line
from fpn_plugin.model_zoo import get_config_file

__all__ = ["check_config_file", "is_for_mini"]


def check_config_file(path: str, above: tuple[str, ...] = ()) -> None:
    """Refuses a config that Detectron2 does not read, or not as its author means it.

    Args:
        path: of a file that exists.
        above: real paths of the files that have it as their base.

    Raises:
        UserError: it or one of its bases, at any depth, is not a mapping of plain YAML, has a key
            twice, or names a base that is no local file or has it as a base in turn.
    """
    above, where = (*above, os.path.realpath(path)), " ".join(path.split())
    for base in _bases(_read(path, where), where):
        shown = f"{where}: its {BASE_KEY} {base!r}"
        if "://" in base:
            raise UserError(
                f"{shown} is a URL, and configs are not downloaded: download the file and give "
                "its path"
            )
        # fvcore finds it in the same way.
        file = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(file):
            what = "is a folder" if os.path.isdir(file) else "does not exist"
            raise UserError(f"{shown} {what}: expected a YAML file's path, relative to {where}")
        if os.path.realpath(file) in above:
            raise UserError(f"{shown} leads back to this file: remove {BASE_KEY} from one of them")
        check_config_file(file, above)


def is_for_mini(path: str) -> bool:
    """Whether a YAML config, or one of its bases, is a packaged one for the mini dataset.

    Args:
        path: of a file that :func:`check_config_file` takes.
    """
    if os.path.samefile(path, get_config_file("mini/Base-Mini.yaml")):
        return True
    files = (os.path.expanduser(base) for base in _bases(_read(path, path), path))
    return any(is_for_mini(os.path.join(os.path.dirname(path), file)) for file in files)


def _bases(content: Any, where: str) -> Iterator[str]:
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{where} {what}: a config has keys and values, such as SEED: 1")
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"{where}: {key!r} is no config key: keys are text, such as SEED")
    given = content.get(BASE_KEY, [])
    for base in given if isinstance(given, list) else [given]:
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
        raise UserError(f"{where} nests lists or mappings too deeply: write it flatter") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no valid number or date
        raise UserError(f"{where} cannot be read as plain YAML: {one_line(error)}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses keys that occur twice, and values that contain themselves by an alias."""

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
        # Cycles are found only in what is built to its depth at once.
        self.deep_construct = True
        return super().construct_document(node)
