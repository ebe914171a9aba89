"""The folder that an export becomes: a new one, or in place of an earlier export. Torch-free."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.opening import read_bounded
from pipelines.shared.places import CACHE, ROOT

CARD = "README.md"
MARK = "<!-- lifelong-moe export -->"
"""A line of each card that we write, by which we know later that a folder is ours to replace."""
_MOST_CARD_BYTES = 4 << 20
_OURS = re.compile(
    r"README\.md|LICENSE|chat_template\.jinja|tokenizer\.json|pick\.py|centroids\.safetensors"
    r"|((generation|tokenizer|adapter)_)?config\.json|generations\.json"
    r"|(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
"""Names of files that an export may have."""


def signature_of(target: Path) -> Path:
    """Where the signature of an export stands: beside it, since it signs every file of it."""
    return target.with_name(f"{target.name}.sig")


def require_target(given: str, *, force: bool, signs: bool) -> Path:
    """Require a place where a folder can be made without replacing anything but an earlier export.

    Args:
        given: What the user named.
        force: Whether an earlier export is replaced.
        signs: Whether a signature is written beside it.

    Raises:
        ConfigError: It lies in the store, its parent is missing, or something else stands there.
    """
    target = Path(os.path.abspath(given))
    if not target.parent.is_dir():
        raise ConfigError(f"--to={given}: no such directory: {target.parent}.")
    real = target.parent.resolve() / target.name
    if any(real.is_relative_to(root.resolve()) for root in (ROOT, CACHE)):
        raise ConfigError(f"--to={given} lies in the store; name a folder outside of it.")
    if os.path.lexists(target):
        if not _is_export(target):
            raise ConfigError(f"--to={given}: there is something else than an export; name another folder.")
        if not force:
            raise ConfigError(f"--to={given}: there is an export; name another folder, or --force to replace it.")
    elif signs and os.path.lexists(signature_of(target)):
        raise ConfigError(f"--to={given}: there is a {signature_of(target).name}; name another folder, or remove it.")
    return target


def clear(target: Path) -> None:
    """Remove an earlier export and its signature, if there is one."""
    if target.exists() and _is_export(target):
        remove_directory(target)
        signature_of(target).unlink(missing_ok=True)


def _is_export(folder: Path) -> bool:
    """Whether a folder is one of our exports, with no other file in it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        card = read_bounded(folder / CARD, _MOST_CARD_BYTES, follow=False).decode("utf-8", errors="replace")
    except OSError:
        return False
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return MARK in card.splitlines() and all(_OURS.fullmatch(path.name) for path in files)
