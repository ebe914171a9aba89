"""Write text of any size: real sentences, in which every third word is exchanged for another one of the same text.

Repeated as they are, sentences would make each document a near copy of many others. With other words the frequencies of
words stay those of real text, and nearly every run of letters is a document's own.

    PYTHONPATH=$PWD python -m tests.benchmarks.text_of_any_size FILE.jsonl --megabytes 100 [--from OTHER.jsonl.gz ...]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from lifelong_moe.config.data import SourceConfig

SENTENCES = 12
"""Sentences of a document, in the mean: about two kilobytes."""
DOCUMENTS = 5
"""Documents of a source, in the mean."""
_END = re.compile(r"(?<=[.!?])\s+")


def sentences(files: list[str]) -> list[str]:
    """The sentences of some files, or of the text that every installation carries."""
    if files:
        from lifelong_moe.data.text.files import read_documents

        texts = [document.text for document in read_documents(files, SourceConfig(files=files))]
    else:
        from lifelong_moe.data.text.builtin import english_docs

        texts = [document.text for document in english_docs()]
    return [one for text in texts for one in _END.split(text) if len(one.split()) > 3]


def rows(found: list[str], num_bytes: float, seed: int) -> Iterator[str]:
    """Lines of JSON until there are so many bytes of them; the same for the same sentences and seed."""
    random_ = random.Random(seed)
    words = [word for sentence in found for word in sentence.split()]
    written = number = 0
    while written < num_bytes:
        chosen = (random_.choice(found).split() for _ in range(random_.randint(1, 2 * SENTENCES)))
        changed = (
            " ".join(random_.choice(words) if at % 3 == 1 else word for at, word in enumerate(sentence))
            for sentence in chosen
        )
        source = f"site-{seed}-{number // DOCUMENTS}"
        line = json.dumps({"text": " ".join(changed), "source": source}, ensure_ascii=False) + "\n"
        yield line
        written, number = written + len(line.encode()), number + 1


def main() -> None:
    """Write a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="files", nargs="*", default=[])
    options = parser.parse_args()
    found = sentences(options.files)
    with options.file.open("w", encoding="utf-8") as file:
        file.writelines(rows(found, options.megabytes * 1e6, options.seed))


if __name__ == "__main__":
    main()
