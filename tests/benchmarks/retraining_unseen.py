"""Thirty ticks over text that nobody tuned anything to: manuals in seven languages, scripts, catalogues, noise, copies.

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python -m tests.benchmarks.retraining_unseen --home unseen

The text is what a Debian system carries under ``/usr/share``; the file is the source. Base and ticks are those of
``retraining_policy``, with stages trained, gated and promoted: one run, in the directory ``--home``, which must not
exist. Each day's inbox holds that day's files alone. Prints a table with what was wanted beside what was found, and
writes it to ``ticks.jsonl`` there as it comes, and to ``unseen.json`` in the end.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lifelong_moe.data.text.documents import Document
from lifelong_moe.errors import LifelongError
from lifelong_moe.plan.retraining import load_retraining
from pipelines.retrain.retrain import retrain
from pipelines.shared.quiet import silence_libraries
from tests.benchmarks.provenance import keep, made_with
from tests.benchmarks.retraining_month import vandalised
from tests.benchmarks.retraining_policy import BASE_KINDS, Pool, make_base, noise, write

SHARE = Path("/usr/share")
BYTES = 70_000
LEARNS, CARES, IGNORES = ("promoted", "waiting"), ("promoted", "waiting", "skipped"), ("skipped", "waiting", "rejected")
"""Outcomes that a day may have: new text is never given up for good, known text may be, and harm never serves."""


@dataclass(frozen=True)
class Day:
    """What arrives, and which outcomes are right."""

    what: str
    documents: list[Document]
    wanted: tuple[str, ...]
    grows: bool | None = None
    """Whether a promotion has to be by growth (True), must not be (False), or may be either."""


def read(path: Path) -> str:
    """A text file, perhaps compressed; empty if it is no text."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return ""


def found(patterns: Iterable[str], seed: int, clean: Callable[[str], str] = str) -> Pool:
    """Files under ``/usr/share`` by pattern, each file a source."""
    paths = sorted({path.resolve() for pattern in patterns for path in SHARE.glob(pattern) if path.is_file()})
    documents = []
    for path in paths[:1200]:
        text = clean(read(path))
        pieces = [text[i : i + 1000] for i in range(0, min(len(text), 20_000), 1000)]
        documents += [Document(piece, str(path)) for piece in pieces if len(piece) > 200]
    return Pool(documents, seed)


def manual(text: str) -> str:
    """A manual page without its markup."""
    lines = [line for line in text.splitlines() if not line.startswith(('.\\"', "'", ".de", ".ds", ".TH"))]
    return re.sub(r"\\f[A-Z(]|\\&|\\-|^\.[A-Za-z]+ ?", "", "\n".join(lines), flags=re.M)


def field_logs(seed: int) -> list[Document]:
    """Lines of one template with random fields."""
    draw = random.Random(seed)

    def line() -> str:
        at = f"2026-11-{draw.randrange(1, 29):02} {draw.randrange(24):02}:{draw.randrange(60):02}"
        asked, status = f"GET /item/{draw.randrange(10**6)}", draw.choice((200, 404))
        return f"{at} host{draw.randrange(40)} {asked} {status} {draw.randrange(9999)}ms"

    return [Document("\n".join(line() for _ in range(16)), f"log{i // 3}") for i in range(70)]


def edited(documents: list[Document], seed: int) -> list[Document]:
    """Two words of each document changed."""
    draw = random.Random(seed)
    changed = []
    for document in documents:
        words = document.text.split(" ")
        for place in draw.sample(range(len(words)), min(2, len(words))):
            words[place] = "corrected"
        changed.append(Document(" ".join(words), document.source))
    return changed


def each_its_own(documents: list[Document]) -> list[Document]:
    return [Document(d.text, f"{d.source}#{i}") for i, d in enumerate(documents)]


def one_site(documents: list[Document], others: list[Document]) -> list[Document]:
    """All of the first from one source, and the others, each of another."""
    return [*(Document(d.text, "site") for d in documents), *each_its_own(others)]


def pools(seed: int) -> dict[str, Pool]:
    """By kind, what is there."""
    languages = {"German": "de", "French": "fr", "Japanese": "ja", "Russian": "ru", "Polish": "pl", "Italian": "it"}
    manuals = {name: found([f"man/{code}/man*/*.gz"], seed, manual) for name, code in languages.items()}
    return manuals | {
        "CMake": found(["cmake*/Modules/**/*.cmake"], seed),
        "Vim script": found(["vim/**/*.vim"], seed),
        "Perl": found(["perl/**/*.pm", "perl5/**/*.pm"], seed),
        "changelogs": found(["doc/*/changelog.Debian.gz", "doc/*/changelog.gz"], seed),
        "licences": found(["doc/*/copyright"], seed),
        "Tcl": found(["tcltk/**/*.tcl", "tcl*/**/*.tcl", "git*/**/*.tcl"], seed),
        "HTML": found(["doc/**/*.html"], seed),
    }


def thirty_days(base: dict[str, Pool], new: dict[str, Pool], seed: int) -> list[Day]:
    """The days in order."""
    english, code = (base[kind] for kind in BASE_KINDS)
    german = each_its_own(new["German"].take(BYTES))[:24]
    huge = Document("\n".join(d.text for d in new["German"].take(120_000)), "one book")
    italian = new["Italian"].take(BYTES // 3)
    unequal = one_site(english.take(30_000), english.take(10_000))
    return [
        Day("24 German pages of one source each", german, LEARNS),
        Day("the same with two edits each", edited(german, seed), ("idle",)),
        Day("German pages", new["German"].take(BYTES), LEARNS),
        Day("French pages", new["French"].take(BYTES), LEARNS, True),
        Day("English and Python, both known", english.take(30_000) + code.take(30_000), CARES, False),
        Day("Latin-1 noise", noise("latin-1", seed, []), ("skipped",)),
        Day("Japanese pages", new["Japanese"].take(BYTES), LEARNS, True),
        Day("English: one site of most, and others", unequal, CARES, False),
        Day("CMake modules", new["CMake"].take(BYTES), LEARNS, True),
        Day("logs of random fields", field_logs(seed), ("promoted", "skipped", "waiting")),
        Day("one German book among Italian pages", [huge, *italian], LEARNS),
        Day("Vim script", new["Vim script"].take(BYTES), LEARNS, True),
        Day("five French pages", new["French"].take(4_000)[:5], ("idle",)),
        Day("French pages again", new["French"].take(BYTES), CARES),
        Day("Perl", new["Perl"].take(BYTES), LEARNS, True),
        Day("Python", code.take(40_000), CARES, False),
        Day("changelogs", new["changelogs"].take(BYTES), LEARNS, True),
        Day("random digits", noise("digits", seed, []), ("skipped",)),
        Day("Russian pages without sources", each_its_own(new["Russian"].take(BYTES)), LEARNS, True),
        Day("licences", new["licences"].take(BYTES), LEARNS),
        Day("nothing", [], ("idle",)),
        Day("Polish pages", new["Polish"].take(BYTES), LEARNS, True),
        Day("English, a third of its words at random", vandalised(english.take(60_000), seed), IGNORES),
        Day("Tcl", new["Tcl"].take(BYTES), LEARNS, True),
        Day("German and French, both known", new["German"].take(30_000) + new["French"].take(30_000), CARES, False),
        Day("English", english.take(40_000), CARES, False),
        Day("HTML", new["HTML"].take(BYTES), LEARNS, True),
        Day("twelve Italian pages of three sources", italian_pages(new["Italian"]), ("idle", *LEARNS)),
        Day("printable noise", noise("printable", seed, []), ("skipped",)),
        Day("changelogs again", new["changelogs"].take(BYTES), CARES),
    ]  # fmt: skip


def italian_pages(pool: Pool) -> list[Document]:
    return [Document(d.text, f"three {i % 3}") for i, d in enumerate(pool.take(BYTES)[:21])]


def tick() -> dict[str, Any]:
    """One, in this process."""
    try:
        return retrain(load_retraining("retrain.yaml"), False, None, Console(file=io.StringIO())).to_json()
    except LifelongError as error:
        return {"outcome": type(error).__name__, "reason": str(error)}


def right(day: Day, result: dict[str, Any]) -> bool:
    """Whether the outcome is one of those that were wanted."""
    if result["outcome"] not in day.wanted:
        return False
    return result["outcome"] != "promoted" or day.grows in (None, result["action"] == "grow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=3)
    options, origin = parser.parse_args(), made_with()
    silence_libraries()
    options.home.mkdir()
    os.chdir(options.home)
    base = make_base(options.seed)
    settings = yaml.safe_load(Path("retrain.yaml").read_text())
    Path("retrain.yaml").write_text(yaml.safe_dump(settings | {"trigger": {"min_tokens": 1000, "least_documents": 20}}))
    days, rows = thirty_days(base, pools(options.seed), options.seed), []
    print(
        "| day | arrived | documents | sources | wanted | found | s | reason |\n|---:|---|---:|---:|---|---|---:|---|"
    )
    for number, day in enumerate(days, 1):
        write(Path("inbox/today.jsonl"), day.documents)
        began = time.monotonic()
        result = tick()
        action = result.get("action", "") if result["outcome"] == "promoted" else ""
        wanted = " or ".join(day.wanted) + {True: ", grown", False: ", not grown", None: ""}[day.grows]
        row = {"day": number, "arrived": day.what, "documents": len(day.documents),
               "sources": len({d.source for d in day.documents}), "wanted": wanted, "right": right(day, result),
               "found": f"{result['outcome']} {action}".strip(), "seconds": round(time.monotonic() - began),
               "reason": result["reason"]}  # fmt: skip
        rows.append(row)
        with Path("ticks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"plan": result.get("plan")}) + "\n")
        cells = (number, day.what, row["documents"], row["sources"], wanted,
                 row["found"] + ("" if row["right"] else " (!)"), row["seconds"], row["reason"])  # fmt: skip
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    keep(Path("unseen.json"), {"days": rows}, origin)
    print(f"\n{sum(row['right'] for row in rows)} of {len(days)} as wanted")


if __name__ == "__main__":
    main()
