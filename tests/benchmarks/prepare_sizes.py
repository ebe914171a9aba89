"""What `prepare` takes for text of several sizes: the first start, the second, a changed file, and more files.

    PYTHONPATH=$PWD python -m tests.benchmarks.prepare_sizes --megabytes 100 300 1000 --first 3000 --work WORK \
        --out reading.json

Each size is text of its own (`tests.benchmarks.text_of_any_size`) in twenty files, of which a hundredth is held out.
Beside the smallest, `tokenizers` alone is timed: trained on the same text and applied to it, in batches of as much text
as those of `prepare`, with all processors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.processes import taken_by
from tests.benchmarks.provenance import ROOT, keep, made_with
from tests.benchmarks.text_of_any_size import rows, sentences

FILES = 20
ALONE = """
import json, sys, time
from pathlib import Path
from lifelong_moe.data.tokens.tokenizer import train_tokenizer
texts = [json.loads(line)["text"] for path in sorted(Path(sys.argv[1]).glob("*.jsonl")) for line in path.open()]
batches, size = [[]], 0
for text in texts:
    batches[-1].append(text)
    size += len(text)
    if size >= 4 << 20:
        batches.append([])
        size = 0
began = time.time(), time.process_time()
tokenizer = train_tokenizer(texts, 4096)
for batch in batches:
    tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)
print(json.dumps({"seconds": time.time() - began[0], "processor_seconds": time.process_time() - began[1]}))
"""


def config(files: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Of a run that nobody trains."""
    text = {"files": f"{files}/*.jsonl", "heldout_fraction": 0.01}
    return {"run": "text", "distributions": {"text": text}, "tokenizer": tokenizer, "stages": [{"data": "text"}]}


def write(files: Path, megabytes: int, seed: int) -> None:
    """Twenty files of text."""
    files.mkdir(parents=True)
    found = sentences([])
    for number in range(FILES):
        with (files / f"{number:02}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(rows(found, megabytes * 1e6 / FILES, 1000 * seed + number))


def prepare(folder: Path, tokenizer: dict[str, Any]) -> dict[str, float]:
    """Seconds, processor seconds and most memory of a start."""
    path = folder / "text.yaml"
    path.write_text(yaml.safe_dump(config(folder / "text", tokenizer)), encoding="utf-8")
    taken = taken_by(["-m", "pipelines.cli", "prepare", str(path)], folder, ROOT)
    return {name: round(number, 1) for name, number in taken.items()}


def starts(folder: Path, megabytes: int, is_grown: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Each start of one size, the next only after the one before; the last two with text that changed."""
    yield "first", prepare(folder, {"vocab_size": 4096})
    time.sleep(3)  # a file that was just written is not believed to stay as it is
    prepare(folder, {"vocab_size": 4096})
    yield "second", prepare(folder, {"vocab_size": 4096})
    if not is_grown:
        return
    # Text that changes would train another tokenizer, and all tokens be made again.
    (trained,) = (folder / "data/cache/tokenizers").glob("*.json")
    given = {"file": str(shutil.copy(trained, folder / "tokenizer.json"))}
    prepare(folder, given)
    found = sentences([])
    with (folder / "text/00.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(islice(rows(found, 1e6, 9), 3))
    yield "one changed file", prepare(folder, given)
    with (folder / "text/more.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(rows(found, megabytes * 5e4, 10))
    yield "5 % more", prepare(folder, given)


def main() -> None:
    """Measure size after size, and write what was found after each start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--first", type=int, nargs="*", default=[], help="further sizes, whose text does not change")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options, origin = parser.parse_args(), made_with()
    found: dict[str, Any] = {"files": FILES, "sizes": []}
    for megabytes in [*options.megabytes, *options.first]:
        folder = (options.work / str(megabytes)).resolve()
        write(folder / "text", megabytes, megabytes)
        each: dict[str, Any] = {}
        found["sizes"].append({"megabytes": megabytes, "starts": each})
        if megabytes == min(options.megabytes):
            alone = [sys.executable, "-c", ALONE, str(folder / "text")]
            found["tokenizers_alone"] = json.loads(
                subprocess.check_output(alone, env=os.environ | {"PYTHONPATH": str(ROOT)})
            )
        for what, taken in starts(folder, megabytes, megabytes not in options.first):
            each[what] = taken
            print(megabytes, what, taken, flush=True)
            keep(options.out, found, origin)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
