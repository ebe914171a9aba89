"""Write docs/configuration.md from the docstrings of the configuration's dataclasses; run it after a change."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.config.routing.modes import ROUTERS
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.plan.comparison import ComparisonConfig
from lifelong_moe.plan.retraining import RetrainConfig

INTRODUCTION = """# Configuration

Made from the docstrings by `python docs/generate_configuration.py`; a test keeps it true.

A run is one YAML file, and any key can be set on the command line: `lifelong-moe run FILE seed=1
stage_defaults.tokens=100000 'stages[1].grow.experts=4'`. `stage_defaults` holds what all `stages` have in common.
A key that does not exist, or a value that cannot be, costs one line and exit code 2 before anything is written.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return docs


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default as YAML would write it."""
    if field.default is not dataclasses.MISSING:
        value = field.default.value if isinstance(field.default, Enum) else field.default
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"


RETRAINING = """# Scheduled retraining

A file of its own, such as `configs/retrain.yaml`, that names a run's configuration as its `base`; see
[scheduling.md](scheduling.md). `key=value` on the command line sets a key of this file, or else of the base.
"""


COMPARING = """# Comparing arms

A file of its own, such as `configs/compare.yaml`, that names a run's configuration as its `base`; see
[usage.md](usage.md#comparing-arms). `key=value` on the command line sets a key of this file, or else one of every arm.
"""


def routing_section() -> list[str]:
    """The keys of all modes in one table, each with the modes that have it and what they bring for it."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for mode, cls in [(mode, ROUTERS[mode].settings) for mode in ROUTERS] + [("your own", CustomRouterConfig)]:
        docs = {
            key: doc
            for base in reversed(cls.__mro__)
            if dataclasses.is_dataclass(base)
            for key, doc in field_docs(base).items()
        }
        for field in dataclasses.fields(cls):
            default = "learned" if field.name == "mode" else default_text(field)
            if field.name == "mixture":
                default = "the section below"
            if field.name == "capacity":
                made = cls().capacity
                default = "null" if made is None else brought(made)
            rows.setdefault((field.name, docs[field.name]), {}).setdefault(default, []).append(mode)
    lines = []
    for (key, doc), defaults in rows.items():
        modes = [mode for these in defaults.values() for mode in these]
        whose = "all" if len(modes) > len(ROUTERS) else ", ".join(modes)
        first, *others = defaults.items()
        values = "".join(f"; {', '.join(these)}: `{value}`" for value, these in others)
        lines.append(f"| `{key}` | {whose} | `{first[0]}`{values} | {doc} |")
    head = [
        "## `routing`",
        "",
        str(inspect.getdoc(RoutingConfig)),
        "",
        "| key | modes | default | |",
        "|---|---|---|---|",
    ]
    return [
        *head,
        *lines,
        "",
        *section(CapacityConfig, "routing.capacity", ""),
        "",
        *section(MixtureConfig, "routing.mixture", ""),
    ]


def brought(capacity: CapacityConfig) -> str:
    """What differs from an empty section, as YAML would write it."""
    plain = CapacityConfig()
    keys = [f.name for f in dataclasses.fields(capacity) if getattr(capacity, f.name) != getattr(plain, f.name)]
    return f"{{{', '.join(f'{key}: {getattr(capacity, key)}' for key in keys)}}}"


def section(cls: type, path: str, whole: str) -> list[str]:
    """A table for one dataclass, then the sections inside it."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    rows, inner = [], []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        nested = next((k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)), None)
        name = f"{path}.{field.name}" if path else field.name
        if nested is not None:
            if issubclass(nested, RoutingConfig):
                inner += routing_section()
                continue
            is_list = get_origin(kind) is list
            suffix = ".NAME" if get_origin(kind) is dict else "[i]" if is_list else ""
            inner += section(nested, name + suffix, whole)
        else:
            rows.append(f"| `{field.name}` | `{default_text(field)}` | {docs[field.name]} |")
    title = f"## `{path}`" if path else f"## {whole}"
    return [title, "", str(inspect.getdoc(cls)), "", "| key | default | |", "|---|---|---|", *rows, "", *inner]


def configuration() -> str:
    """The whole page."""
    run, tick = section(RunConfig, "", "The run"), section(RetrainConfig, "", "The tick")
    arms = section(ComparisonConfig, "", "The comparison")
    return "\n".join([INTRODUCTION, *run, COMPARING, *arms, RETRAINING, *tick]).rstrip().replace("``", "`") + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(configuration(), encoding="utf-8")
    sys.exit(0)
