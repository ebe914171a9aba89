"""Tables of everything except comparisons; ``make_tables.py`` says which goes where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from table_kinds import ROOT, Row, listed, markdown, percent, read

from lifelong_moe.measures import MEASURES
from lifelong_moe.reports.report import Report
from lifelong_moe.reports.verdict import report_verdict

OTHER_MACHINE = (
    "Levels depend on the machine's floating point, differences less: on an AMD EPYC, commit `99c3eeb`, which\n"
    "selected one generation for each chunk and grew by four experts, printed 2.281\n"
    "and 2.195 (newly learned), 2.442 and 2.682 (held-out mean); the naive run learned the new text 0.09 better there."
)


def quickstart() -> list[str]:
    """What ``lifelong-moe report`` shows of the two runs, with commit, machine and versions."""
    found = read("results/quickstart")
    run = found["run"]
    made = f"Commit `{run['commit'][:7]}`"
    if "cpu" in run:
        threads = {None: "as many threads as there are", "1": "one thread"}.get(n := run["threads"], f"{n} threads")
        made += f", {threads} of {run['cpu']} ({run['cores']} cores), Python {run['python']}, torch {run['torch']}"
    return [*markdown(["", *found["runs"]], found["side_by_side"]), "", f"{made}.", *OTHER_MACHINE.splitlines()]


def verdict() -> list[str]:
    """The last words of ``lifelong-moe report`` on the quickstart's runs."""
    reports = [Report.from_json(one) for one in read("results/quickstart")["reports"]]
    return ["    " + sentence for sentence in report_verdict(reports)]


def measures() -> list[str]:
    """What runs and comparisons measure: words, unit, name in MLflow, meaning."""
    better = {"lower": "↓", "higher": "↑", "": ""}
    rows = [[m.words, m.unit, f"`{m.metric}`", better[m.better], m.meaning] for m in MEASURES.values()]
    return markdown(["measure", "unit", "in MLflow", "better", "meaning"], rows, "lllll")


def assignment() -> list[str]:
    """Shares of held-out tokens by distribution and the generation that they were assigned to."""
    found = read("results/assignment")
    names = found["distributions"]
    [tokens] = [one["tokens"] for one in found["settings"] if (one["chunk_tokens"], one["margin"]) == (8, 4)]
    rows = [[name, *(f"{100 * one / sum(row):.2f}" for one in row)] for name, row in zip(names, tokens, strict=True)]
    return markdown(["text of", *(f"→ {name}" for name in names)], rows)


def assignment_by(key: str, header: str, fixed: Mapping[str, float]) -> list[str]:
    """The share that leaves the first distribution, and of each other one its own generation's share, by a setting."""
    found = read("results/assignment")
    rows = []
    for one in sorted(found["settings"], key=lambda one: one[key]):
        if all(one[name] == value for name, value in fixed.items()):
            shares = [100 * row[i] / sum(row) for i, row in enumerate(one["tokens"])]
            own = " / ".join(f"{share:.2f}" for share in shares[1:])
            rows.append([f"{one[key]:g}", f"{100 - shares[0]:.2f}", own])
    first, *others = found["distributions"]
    return markdown([header, f"{first} to newer generations", f"own generation: {' / '.join(others)}"], rows)


def mixture_weights() -> list[str]:
    """Losses of mixtures of generations by their keys, with the generations that read a token."""
    found = read("results/mixture_weights")
    names = list(found["selected"])
    rows = [
        [words, "", *(f"{found[key][name]:.4f}" for name in names), f"{_mean(found[key].values()):.4f}"]
        for key, words in (("selected", "selected"), ("best_single", "best single"))
    ]
    for one in found["settings"]:
        by = one["found"]
        cells = [f"{by[name]['nats_per_token']:.4f} ({by[name]['readers']:.2f})" for name in names]
        nats, readers = (_mean(by[name][key] for name in names) for key in ("nats_per_token", "readers"))
        rows.append([f"{one['likelihood']:g}", f"{one['drop']:g}", *cells, f"{nats:.4f} ({readers:.2f})"])
    return markdown(["likelihood", "drop", *names, "mean"], rows)


def unknown() -> list[str]:
    """What a mixture costs on text of no generation's kind, beside the best single generation."""
    rows = []
    for one in read("results/unknown"):
        best = min(one["alone"], key=one["alone"].__getitem__)
        nats = f"{one['mixture']:.3f}", f"{one['alone'][best]:.3f} ({best})"
        more = (f"{one[f'more_than_best{of}_percent']:+.2f}" for of in ("", "_of_each_document"))
        rows.append([one["run"], one["text"], *nats, *more, f"{one['readers']:.2f}"])
    header = ["run", "text", "mixture", "best generation", "more than it, %", "than the best of each document, %"]
    return markdown([*header, "generations a token"], rows, "ll")


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def matrix(rows: Sequence[Row]) -> list[str]:
    """Losses after each stage; the distribution just learned is bold."""
    names = [key for key in rows[0] if key != "after"]
    cells = [
        [row["after"], *(f"**{row[name]:.3f}**" if name == row["after"] else f"{row[name]:.3f}" for name in names)]
        for row in rows
    ]
    return markdown(["after stage", *names], cells)


def presets(notes: Mapping[str, str]) -> list[str]:
    """Published parameters beside those counted from each preset's configuration."""
    from lifelong_moe.config.load import read_config
    from lifelong_moe.plan.published import published_count

    rows = []
    for name, note in notes.items():
        config = read_config(ROOT / f"configs/presets/{name}.yaml").config
        said, counted = config.published, published_count(config)
        assert said is not None
        published = " / ".join(f"{figure:,g} B" for figure in (said.total, said.active) if figure is not None)
        ours = f"{counted.total / 1e9:,.2f} B / {counted.active / 1e9:,.2f} B"
        size, _, remark = note.partition("|")
        rows.append([f"`{name}`{size}", published, ours + remark])
    return markdown(["preset", "published, total / active", "counted"], rows)


def gate_coverage() -> list[str]:
    """How often bounds miss, before → now."""
    rows = []
    for row in read("results/gate")["coverage"]:
        cells = []
        for noise in ("normal", "heavy", "skewed"):
            now = row[f"{noise}/now"]
            cells.append(f"{percent(row[f'{noise}/before'])} → {'none' if now is None else percent(now)}")
        rows.append([row["sources"], f"{row['effective']:.1f}", *cells])
    return markdown(["sources", "effective", "normal", "heavy", "skewed"], rows)


def gate_passing() -> list[str]:
    """Which candidates pass, before → now."""
    rows = []
    for row in read("results/gate")["passing"]:
        cells = [
            f"{percent(row[f'{lost}/before'])} → {percent(row[f'{lost}/now'])}" for lost in ("0.0", "0.02", "0.05")
        ]
        rows.append([str(row[key]) for key in ("sources", "distributions", "checks")] + cells)
    return markdown(["sources each", "K", "checks", "harmless", "one loses 0.02", "one loses 0.05"], rows, "r")


def waiting(part: str, by: str, columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """What becomes of a gain, in percent; sizes for which it makes no difference share a line."""
    rows = read("results/waiting")[part]
    blocks = [list(block) for _, block in groupby(rows, key=lambda row: row[by])]
    shown: list[dict[str, Any]] = []
    for same, group in groupby(blocks, key=lambda block: block[0]["wait"] == 1 == min(r["wait"] for r in block)):
        some = list(group)
        if same:
            sizes = ", ".join(str(block[0][by]) for block in some)
            spans = {key: _span(block[0][key] for block in some) for key in some[0][0] if key.startswith("held_out")}
            shown.append({**some[0][0], **spans, by: sizes, "gain": "any"})
        else:
            shown += [row | {k: _span([row[k]]) for k in row if k.startswith("held_out")} for b in some for row in b]
    for row in shown:
        row |= {key: f"{100 * row[key]:.0f}" for key in ("grow", "wait", "skip", "skipped_before")}
    return listed(shown, columns, "r")


def _span(spans: Iterable[str]) -> str:
    ends = [int(end) for span in spans for end in span.split(" to ")]
    return str(ends[0]) if len(set(ends)) == 1 else f"{min(ends)} to {max(ends)}"


def unseen() -> list[str]:
    """The expected outcome of each day, and the outcomes before and now."""
    rows = []
    for day in read("results/unseen")["days"]:
        found = [day[f"found{when}"] + ("" if day[f"right{when}"] else " **(!)**") for when in ("_before", "")]
        rows.append([str(day["day"]), day["arrived"], str(day["sources"]), day["wanted"], *found])
    return markdown(["day", "arrived", "sources", "expected", "before", "now"], rows, "rlrlll")


def fingerprints(found: Mapping[str, Row]) -> list[str]:
    """Fingerprints of training and held-out text, by distribution."""
    rows = [
        [
            f"`{name}`",
            *(f"`{one[part][:12]}`" for part in ("train", "heldout")),
            str(one["duplicates"]),
            str(one["near_copies"]),
        ]
        for name, one in found.items()
    ]
    return markdown(["distribution", "train", "held out", "duplicates", "near copies"], rows, "lll")


class Goal(NamedTuple):
    """A row of the table of speed goals."""

    name: str
    part: str
    key: str
    scale: float = 1
    digits: int = 2
    unit: str = "×"
    gpu_goal: str = ""
    gpu: str = "not measured"


def goals(lines: Iterable[Goal]) -> list[str]:
    """Figures beside their goals on a CPU, and the goals on a GPU."""
    rows = []
    for line in lines:
        found = read("performance/cpu")["parts"][line.part]["goals"][line.key]
        figures = [found["value"], found.get("low"), found.get("high")]
        value, low, high = ("" if f is None else f"{line.scale * f:.{line.digits}f}" for f in figures)
        sign, limit = found["goal"].split()
        limit = limit if line.scale == 1 else f"{line.scale * float(limit):g}"
        spread = "" if figures[1] == figures[2] else f"{low} – {high}{line.unit if line.unit == ' %' else ''}"
        goal = f"{'≥' if sign == '>=' else '≤'} {limit}{line.unit}"
        met = "yes" if found["met"] else "**no**"
        rows.append([line.name, value + line.unit, spread, goal, met, line.gpu_goal, line.gpu])
    return markdown(["measurement", "CPU", "quartiles", "goal", "met", "H200: goal", "H200"], rows, "lrrrlll")


def attention() -> list[str]:
    """Time by document over time with the mask."""
    found = read("performance/cpu")["parts"]["attention_by_document"]["detail"]
    rows = [
        [documents, one["kernel"].replace("_", " "), f"{one['ratio']:.2f}"]
        for documents, one in found.items()
        if not documents.endswith(", by length")
    ]
    return markdown(["documents", "computed by", "time"], rows, "ll")


def generation() -> list[str]:
    """Speed over transformers, and the share of routing with eight experts."""
    rows = []
    for batch, one in read("performance/cpu")["parts"]["inference"]["detail"].items():
        speed = [f"{one['over_transformers'][phase]['ratio']:.2f}" for phase in ("prefill", "decode", "both")]
        rows.append(
            [
                batch.removeprefix("batch "),
                *speed,
                f"{one['routing_share']['8 experts']['ratio']:.0%}".replace("%", " %"),
            ]
        )
    return markdown(["texts", "prefill", "decoding", "both", "routing's share of decoding"], rows, "r")


def waiting_threads() -> list[str]:
    """Two threads by their way of waiting, alone and beside a busy process."""
    rows, settings = [], {one["waiting"]: one for one in read("results/waiting_threads")["settings"]}
    labels = {"one thread": "one thread", "default": "two, default", "passive": "two, `OMP_WAIT_POLICY=PASSIVE`"}
    for name, one in settings.items():
        polls = f"{int(name.split()[0]):,} polls" if name not in labels else ""
        label = labels.get(name) or "two, " + (f"**{polls}**" if name == "2000 spins" else polls)
        alone, beside = one["idle"], one["beside"]
        over = alone / settings["default"]["idle"], beside / settings["one thread"]["beside"]
        values = alone, over[0], one["idle_processor_seconds"], beside, over[1], one["beside_processor_seconds"]
        rows.append([label, *(f"{value:.2f}" for value in values)])
    header = ["waiting", "steps/s, idle", "over default", "processor s a step", "steps/s beside a busy process"]
    return markdown([*header, "over one thread", "processor s a step"], rows)


def idle() -> list[str]:
    """Commands that train nothing, of two checkouts."""
    found = read("results/idle")["checkouts"]
    now, before = (found[name]["seconds"] for name in ("now", "before"))
    torch = now["import torch"]["median"]
    rows = []
    for what, one in now.items():
        old, new, (low, high) = before[what]["median"], one["median"], one["quartiles"]
        label = "`python -c 'import torch'`" if what == "import torch" else f"`{what.split(',')[0]}`"
        detail = what.partition(",")[2]
        rows.append(
            [label + ("," if detail else "") + detail, f"{old:.2f} s", f"{new:.2f} s", f"{low:.2f} – {high:.2f}"]
        )
        rows[-1].append(f"{new / torch:.2f}")
    return markdown(["command", "before", "now", "quartiles, now", "over importing torch"], rows, "lrrlr")


def ticks() -> list[str]:
    """Ticks that find too little new text, of two checkouts."""
    checkouts = read("results/ticks")["checkouts"]
    rows = [
        [what, *(f"{checkouts[name][what]['seconds']:.2f}" for name in ("before", "now"))]
        for what in checkouts["now"]
        if what != "run"
    ]
    return markdown(["tick", "processor s, before", "now"], rows)


LONG_LIFE = {
    "training": ("training", 2, "s"),
    "evaluation": ("evaluation", 2, "s"),
    "records": ("records in MLflow", 2, "s"),
    "record bytes": ("its `config.json`", 1, "kB"),
    "evaluation bytes": ("its evaluation", 1, "kB"),
    "logged bytes": ("notes of what MLflow has", 1, "kB"),
    "pointer bytes": ("the pointer in MLflow's registry", 1, "kB"),
    "readings bytes": ("readings, in the cache", 0, "kB"),
    "mlflow.db bytes": ("MLflow's database", 0, "kB"),
    "files": ("files", 0, ""),
}


def long_life() -> list[str]:
    """What a stage costs and leaves, early and late in a long run, of two checkouts."""
    result, rows = read("results/long_life"), []
    found = {name: result["checkouts"][name]["summary"] for name in ("before", "now")}
    for key, (words, digits, unit) in LONG_LIFE.items():
        row = [f"{words}, {unit}" if unit else words]
        for one in found.values():
            early, late = (one[key][when] / (1000 if unit == "kB" else 1) for when in ("early", "late"))
            row += [f"{early:,.{digits}f}", f"{late:,.{digits}f}", f"{late / early:.2f}"]
        rows.append(row)
    late = result["stages"] - 3
    times = [f"{when}, {stage}" for when in ("before", "now") for stage in ("stage 5", f"stage {late}", "ratio")]
    return markdown([f"a stage of {result['stages']}", *times], rows, "lrrrrrr")


def long_life_start() -> list[str]:
    """What commands cost on that run, of two checkouts."""
    found = read("results/long_life")["checkouts"]
    now, before = found["now"]["seconds"], found["before"]["seconds"]
    torch = now["import torch"]
    rows = [
        [what, f"{before[what]:.2f} s", f"{seconds:.2f} s", f"{seconds / torch:.2f}"] for what, seconds in now.items()
    ]
    return markdown(["command", "before", "now", "over importing torch"], rows, "lrrr")


def reading() -> list[str]:
    """What starts of `prepare` take, by the size of the text."""
    rows = [
        [
            f"{one['megabytes']:,} MB" if not i else "",
            start,
            f"{taken['seconds']:.1f}",
            f"{taken['processor_seconds']:.1f}",
            f"{one['megabytes'] / taken['seconds']:.1f}" if start == "first" else "",
            f"{taken['most_private_megabytes']:.0f}",
            f"{taken['most_memory_megabytes']:.0f}",
        ]
        for one in read("results/reading")["sizes"]
        for i, (start, taken) in enumerate(one["starts"].items())
    ]
    heads = ["text in 20 files", "start", "seconds", "processor seconds", "MB/s", "private memory, MB", "with maps, MB"]
    return markdown(heads, rows, "llrrrrr")


def phase_starts() -> list[str]:
    """What the start of a phase takes, of text whose generations are or are not known."""
    rows = [
        [one["what"], f"{one['processor_seconds']:.1f}", str(one["peak_private_megabytes"])]
        for one in read("results/phase_starts")["rows"]
    ]
    return markdown(["start of a phase", "processor seconds", "most memory above the start's, MB"], rows, "lrr")


def waits() -> list[str]:
    """How often the host waits for the device in a step, by kind of router; kinds with equal numbers share a row."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for kind, one in read("results/waits")["waits"].items():
        kinds.setdefault((one["step"], one["step_with_teacher"]), []).append(kind.replace("_", " "))
    rows = [[", ".join(names), *map(str, numbers)] for numbers, names in sorted(kinds.items())]
    return markdown(["waits in a step of two layers, bfloat16", "a step", "with a teacher"], rows, "lrr")


def launches() -> list[str]:
    """Kernels of a step of the default method, by its text and the number of its generations."""
    ways = read("results/launches")["default"]
    numbers = [*next(iter(ways.values()))]
    rows = [
        [f"{text}, {way}", *(f"{found[number][way]:,}" for number in numbers)]
        for text, found in ways.items()
        for way in found[numbers[0]]
    ]
    return markdown(["generations", *numbers], rows, "l" + "r" * len(numbers))


def router_launches() -> list[str]:
    """Kernels of a step by kind of router, fewest first; kinds with equal numbers share a row."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for kind, one in read("results/launches")["routers"].items():
        kinds.setdefault((one["step"], one["step_with_teacher"]), []).append(kind.replace("_", " "))
    rows = [[", ".join(names), *(f"{one:,}" for one in numbers)] for numbers, names in sorted(kinds.items())]
    return markdown(["kernels in a step of two layers", "a step", "with a teacher"], rows, "lrr")


def idle_writes() -> list[str]:
    """What a run of many stages writes, of two checkouts."""
    result = read("results/idle")
    now, before = (result["checkouts"][name] for name in ("now", "before"))
    lines = {
        "flushes": "waits for the disk, all stages",
        "flushes_of_a_run_with_nothing_to_do": "waits for the disk, a second `run`",
        "head_bytes": "bytes of `head.json`",
        "files": "files below `mlruns`",
    }
    rows = [[text, f"{before[key]:,}", f"{now[key]:,}"] for key, text in lines.items()]
    return markdown([f"{result['stages']} stages and distributions", "before", "now"], rows, "lrr")
