"""Kill a `prepare` of much text at random moments, continue, and compare what it made with an undisturbed one's.

A moment is drawn evenly from the processor seconds that the undisturbed one took; the next start goes on in the same
folder. One that ends before its moment is compared, and the next begins with an empty cache.

    PYTHONPATH=$PWD python -m tests.benchmarks.prepare_kills FOLDER --work WORK --kills 20 --out kills.json

FOLDER holds `*.jsonl`, such as `split -n l/20` makes of what `tests.benchmarks.text_of_any_size` writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CONFIG = """
run: kills
distributions: {{text: {{files: "{files}/*.jsonl", heldout_fraction: 0.01}}}}
tokenizer: {{vocab_size: 4096}}
stages: [{{data: text}}]
"""
_TICKS = os.sysconf("SC_CLK_TCK")


def made(folder: Path) -> dict[str, str]:
    """SHA-256 of tokenizers, tokens, their numbers, and of what manifests say of the corpus."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("data/cache/tokenizers/*", "data/cache/tokens/[!.]*/*")
        for path in sorted(folder.glob(pattern))
        # Notes on when a file was verified have times.
        if path.is_file() and path.name != "verified.json"
    }
    for path in sorted(folder.glob("data/cache/manifests/*.json")):
        content = json.loads(path.read_text())
        # States of files are those of the disk; hashes of corpus and near copies are to be the same.
        content.pop("sha256")
        for file in content.get("files", {}).values():
            file.pop("state")
        found[path.name] = json.dumps(content, sort_keys=True)
    return found


def remains(folder: Path) -> list[str]:
    """Half-written files and pieces that are there though nothing runs."""
    return sorted(str(path.relative_to(folder)) for kind in (".tmp-*", "piece-*") for path in folder.rglob(kind))


def seconds(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def prepare(folder: Path, config: Path, kill_after: float = float("inf")) -> tuple[bool, float]:
    """Prepare in a folder; whether it came to its end, and its processor seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipelines.cli", "prepare", str(config)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        used = 0.0
        while process.poll() is None:
            used = seconds(process.pid)
            if used >= kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return False, used
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"prepare ended with {process.returncode}")
    return True, used


def main() -> None:
    """Measure, and write what was found after each kill."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw, work = random.Random(options.seed), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    config = work / "text.yaml"
    config.write_text(CONFIG.format(files=options.files.resolve()))
    _, whole = prepare(work / "undisturbed", config)
    expected, kills, ends, different = made(work / "undisturbed"), list[float](), 0, 0
    while True:
        is_last = len(kills) >= options.kills
        is_done, used = prepare(work / "killed", config, float("inf") if is_last else draw.uniform(0, whole))
        if is_done:
            ends += 1
            different += made(work / "killed") != expected
        else:
            kills.append(round(used, 2))
        result = {
            "command": "python -m tests.benchmarks.prepare_kills",
            "megabytes": round(sum(path.stat().st_size for path in options.files.glob("*.jsonl")) / 1e6),
            "undisturbed_processor_seconds": round(whole, 1),
            "kills": len(kills),
            "killed_after_processor_seconds": kills,
            "ends": ends,
            "different": different,
            "compared_files": len(expected),
            "remains_at_the_end": remains(work / "killed"),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        if is_last:
            return
        if is_done:
            shutil.rmtree(work / "killed")


if __name__ == "__main__":
    main()
