"""`lifelong-moe init`: a first configuration for folders of somebody's own text."""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.initial.sizes import FolderText, sizes_for
from lifelong_moe.config.initial.text import HELD_OUT, LEAST_HELD_OUT, MIN_CHARS, config_text
from lifelong_moe.config.load import configure
from lifelong_moe.config.routing.bounds import MOST_STAGES
from lifelong_moe.data.formats.outcomes import Outcome, counted, sentence
from lifelong_moe.data.text.documents import Corpus
from lifelong_moe.data.text.known import summary_of
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.tokens.prepare import prepare_data
from lifelong_moe.data.tokens.records import Remembered
from lifelong_moe.errors import ConfigError, DataError
from lifelong_moe.storage.files import write_atomic
from pipelines.shared.places import CACHE

LONGEST_NAME = 40
"""Of a distribution: names of stages may be 64 characters long, and are made of it."""


def init(folders: Sequence[str], target: str, console: Console) -> dict[str, Any]:
    """Read the folders' text, write a configuration that learns them in this order, and say what comes next.

    Args:
        folders: Each becomes a distribution and a stage.
        target: The file to write.
        console: Where people read.

    Raises:
        ConfigError: The file exists, or a folder is none, twice or within another; nothing was written.
        DataError: A folder has too little text, a file in it is malformed, or one folder trains on what another one
            holds out; nothing was written.
    """
    path = Path(target)
    # A link that leads nowhere is something, too.
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--to={target} exists already, and is not replaced. Name another file by --to.")
    paths = _folders(folders)
    run, names = _name(path.stem), _distinct([_name(one.resolve().name) for one in paths])
    found, told, read = [], {}, {}
    for folder, name in zip(paths, names, strict=True):
        source = _source(folder)
        corpus = _read(folder, source, name, console)
        found.append(_summary(corpus, str(source.files)))
        told[name] = counted(corpus.files)
        read[name] = source, corpus
    sizes = sizes_for(found)
    written = config_text(run, found, sizes)
    # What is written must run as it stands.
    config = configure(OmegaConf.create(written), [], target).config  # type: ignore[arg-type]
    with console.status("tokenizing the text"):
        # What is written names the same text, which is not read again.
        known = Remembered(
            read={name: corpus for name, (source, corpus) in read.items() if config.distributions[name] == source}
        )
        # Refuses what `plan` would, such as text that fills no block; what it caches is what `plan` needs next.
        prepare_data(config.distributions, config.tokenizer, names, config.model.context, CACHE, known)
    write_atomic(path, written)
    console.print(
        f"Wrote {target}: {len(found)} stage(s), {sum(sizes.tokens):,} training tokens, a model of width {sizes.width}."
    )
    console.print(f"Next: lifelong-moe plan {target}, then lifelong-moe run {target}")
    return {"config": target, "run": config.run, "files": told, "tokens": sum(sizes.tokens), "width": sizes.width}


def _folders(given: Sequence[str]) -> list[Path]:
    if len(given) > MOST_STAGES:
        raise ConfigError(f"{len(given):,} folders; there may be at most {MOST_STAGES:,}.")
    paths = [Path(one) for one in given]
    for one in paths:
        try:
            is_folder, exists = one.is_dir(), one.exists()
        except (OSError, ValueError) as error:
            raise ConfigError(f"FOLDER={one}: {error}.") from None
        if not is_folder:
            reason = "a file; name the folder that it is in" if exists else "no such folder"
            raise ConfigError(f"FOLDER={one}: {reason}.")
        # It would be read as a reference to another key.
        if "${" in str(one):
            raise ConfigError(f"FOLDER={one}: a name with ${{ cannot stand in a configuration; rename it.")
    places = [one.resolve() for one in paths]
    for i, place in enumerate(places):
        for other in places[:i]:
            if place == other:
                raise ConfigError(f"FOLDER={paths[i]}: the same folder twice.")
            if place.is_relative_to(other) or other.is_relative_to(place):
                # Text that is held out of the one would be trained on in the other.
                raise ConfigError(f"FOLDER={paths[i]}: of {other} and {place} one is within the other.")
    return paths


def _name(text: str) -> str:
    """A name that a configuration allows, of a folder's or a file's."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-._")[:LONGEST_NAME] or "text"


def _distinct(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        each = (name if number == 1 else f"{name}-{number}" for number in count(1))
        found.append(next(one for one in each if one not in found))
    return found


def _source(folder: Path) -> SourceConfig:
    """A folder's text as a distribution."""
    pattern = str(Path(glob.escape(str(folder))) / "**" / "*")
    return SourceConfig(files=pattern, min_chars=MIN_CHARS, heldout_fraction=HELD_OUT, heldout_sources=LEAST_HELD_OUT)


def _read(folder: Path, source: SourceConfig, name: str, console: Console) -> Corpus:
    """Read a folder as a run will, and say what became of its files."""
    try:
        with console.status(f"reading {folder}"):
            corpus = read_corpus(name, source, CACHE)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    console.print(f"{name}: {sentence(corpus.files)}")
    return corpus


def _summary(corpus: Corpus, pattern: str) -> FolderText:
    return FolderText(
        name=corpus.name,
        pattern=pattern,
        train_bytes=summary_of(corpus.train).bytes,
        documents=len(corpus.train),
        other_encodings=sum(file.outcome == Outcome.other_encoding for file in corpus.files),
    )
