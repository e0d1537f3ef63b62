"""Results as a terminal table, as JSON, as plots and as one self-contained HTML page."""

import base64
import dataclasses
import datetime
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine
from .harness import OK, Row
from .machine import Ceilings

Document = dict[str, Any]
SCHEMA = 1
COLUMNS = (
    "case",
    "threads",
    "floor, predicted",
    "provider",
    "median",
    "min",
    "rate",
    "% of ceiling",
    "pyops is",
    "by min",
)


def document(rows: Sequence[Row], device: str, quick: bool, ceilings: Sequence[Ceilings]) -> Document:
    """Everything one run found, ready for JSON."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "torch_threads": torch.get_num_threads(),
        "ceilings": [dataclasses.asdict(ceiling) for ceiling in ceilings],
        "rows": [dataclasses.asdict(row) for row in rows],
        "summary": summary([dataclasses.asdict(row) for row in rows]),
    }


def by_case(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows grouped by what was measured side by side."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["stem"], row["case"], row["threads"]), []).append(row)
    return groups


BASELINES = {
    "torch in the same layout": ("torch",),
    "torch in its best layout": ("torch", "torch channels_last"),
    "torch.compile": ("torch.compile",),
}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per baseline and number of threads: geometric mean of the speedup, the cases lost, and the worst case."""
    result: list[dict[str, Any]] = []
    previous: list[tuple[float, float, str]] = []
    for threads in sorted({row["threads"] for row in rows}):
        for baseline, providers in BASELINES.items():
            pairs = []
            for (_, case, count), group in by_case(rows).items():
                timed = [r for r in group if r["provider"] in providers and r["pyops_speedup"]]
                if count == threads and timed:
                    fastest = min(timed, key=lambda row: row["median_s"])
                    pairs.append((fastest["pyops_speedup"], fastest["pyops_speedup_of_min"], case))
            # Where no other layout was measured, its line would repeat the one above.
            if pairs and not (result and pairs == previous):
                result.append(verdict(baseline, threads, pairs))
            previous = pairs
    return result


def verdict(baseline: str, threads: int, pairs: list[tuple[float, float, str]]) -> dict[str, Any]:
    worst = min(pairs)
    return {
        "baseline": baseline,
        "threads": threads,
        "cases": len(pairs),
        "geometric_mean": geometric_mean([median for median, _, _ in pairs]),
        "geometric_mean_of_min": geometric_mean([fastest for _, fastest, _ in pairs]),
        "losses": sum(median < 1 for median, _, _ in pairs),
        "worst": worst[0],
        "worst_case": worst[2],
    }


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def on_threads(count: int, before: str) -> str:
    """The number of threads in words, after `before`; nothing for a GPU."""
    return f"{before}{count} thread{'s' * (count > 1)}" if count else ""


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, in the order of `COLUMNS`."""
    limits = f"{seconds(row['floor_s'])}, {seconds(row['predicted_s'])}" if row.get("floor_s") else ""
    provider = f"{row['provider']} ({row['algorithm']})" if row.get("algorithm") else row["provider"]
    start = [row["case"], str(row["threads"] or ""), limits, provider]
    if row["status"] != OK:
        return [*start, row["status"], "", row["note"], "", "", ""]
    rate = f"{row['gb_per_s']:.1f} GB/s" if row["bound"] == "memory" else f"{row['gflop_per_s']:.1f} GFLOP/s"
    ratios = ["", ""]
    if row["pyops_speedup"] and not (row["ours"] and row["pyops_speedup"] == 1):
        ratios = [f"{row['pyops_speedup']:.2f}× as fast", f"{row['pyops_speedup_of_min']:.2f}×"]
    return [
        *start,
        seconds(row["median_s"]) + " ~" * row["noisy"],
        seconds(row["min_s"]),
        rate,
        f"{row['percent_of_ceiling']:.0f}",
        *ratios,
    ]


def headline(doc: Document) -> list[str]:
    """Machine, versions, ceilings, and the verdict."""
    versions = " ".join(f"{name} {version}" for name, version in doc["versions"].items())
    lines = [f"{doc['machine']['name']} · {versions} · {doc['date']}"]
    for c in doc["ceilings"]:
        lines.append(
            f"ceiling{on_threads(c['threads'], ' on ')}: copy {c['copy_bandwidth'] / 1e9:.1f} GB/s, "
            f"FMA {c['fma_rate'] / 1e9:.0f} GFLOP/s ({c['source']})"
        )
    for e in doc["summary"]:
        lines.append(
            f"pyops against {e['baseline']}{on_threads(e['threads'], ', ')}, {e['cases']} cases: geometric mean "
            f"{e['geometric_mean']:.2f}× by medians, {e['geometric_mean_of_min']:.2f}× by fastest calls; "
            f"{e['losses']} below 1, least {e['worst']:.2f}× ({e['worst_case']})"
        )
    if any(row["noisy"] for row in doc["rows"]):
        lines.append("~ the median is far above the fastest call: the machine was busy; compare by min, or repeat")
    return lines


def table(doc: Document) -> str:
    """The terminal's view: one line per provider, a blank line between cases."""
    body: list[list[str]] = []
    for group in by_case(doc["rows"]).values():
        texts = [cells(row) for row in group]
        body += [texts[0], *(["", "", "", *text[3:]] for text in texts[1:]), []]
    widths = [max([len(title), *(len(line[i]) for line in body if line)]) for i, title in enumerate(COLUMNS)]
    # A long reason in the rate column must not widen the table of numbers.
    widths[6] = min(widths[6], 16)
    lines = ["  ".join(title.ljust(w) for title, w in zip(COLUMNS, widths))]
    lines.append("  ".join("-" * w for w in widths))
    lines += ["  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip() for line in body]
    return "\n".join([*lines, *headline(doc)])


def write_json(doc: Document, path: Path) -> Path:
    """Writes the document; into a directory as ``<machine>.json``, keeping the rows of cases it did not measure."""
    if path.is_dir() or path.suffix != ".json":
        path = path / f"{machine.slug(doc['machine']['name'])}.json"
        doc = merged(read_json(path), doc) if path.exists() else doc
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(doc, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_json(path: Path) -> Document:
    """Reads what `write_json` wrote; raises ValueError for another schema."""
    doc: Document = json.loads(path.read_text(encoding="utf-8"))
    if doc.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {doc.get('schema')!r}")
    return doc


def merged(old: Document, new: Document) -> Document:
    """The new run, plus the old rows of cases that it did not measure; every row carries its own date."""
    fresh = {key for key, group in by_case(new["rows"]).items() if any(row["status"] == OK for row in group)}
    kept = [row for key, group in by_case(old["rows"]).items() if key not in fresh for row in group]
    replaced = {(row["stem"], row["case"], row["threads"]) for row in kept}
    current = [r for r in new["rows"] if (r["stem"], r["case"], r["threads"]) not in replaced]
    rows = sorted(kept + current, key=lambda row: row["stem"])
    return new | {"rows": rows, "summary": summary(rows)}


def write_all(doc: Document, out: Path) -> list[Path]:
    """bench.json, the plots if matplotlib is there, and bench.html with the plots inside."""
    out.mkdir(parents=True, exist_ok=True)
    written = [write_json(doc, out / "bench.json")]
    try:
        from .plots import plot_all
    except ImportError as missing:
        print(f"no plots: {missing}")
        plots: list[Path] = []
    else:
        plots = plot_all(doc, out)
    page = out / "bench.html"
    page.write_text(html_page(doc, plots), encoding="utf-8")
    return [*written, *plots, page]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; } p { margin: .2rem 0; } img { max-width: 100%; margin: 1.2rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; cursor: pointer; border-bottom: 2px solid #1c2430; user-select: none; }
td, th { padding: .2rem .7rem .2rem 0; } td.n { text-align: right; } tr.ours td { font-weight: 600; }
tbody tr:hover { background: #eef2f7; } tr.bad td { color: #a40e26; }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #dde3ea; } th { border-color: #dde3ea; }
  tbody tr:hover { background: #222a35; } tr.bad td { color: #ff7b86; } img { background: #fff; }
}
"""
SCRIPT = """
document.querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], up = th.dataset.up !== "1";
  th.dataset.up = up ? "1" : "0";
  const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
    : (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (up ? 1 : -1);
  [...body.rows].sort((a, b) => compare(key(a), key(b))).forEach(row => body.append(row));
}));
"""


def html_page(doc: Document, plots: Sequence[Path]) -> str:
    """One page without outside resources: the verdict, the plots, and a table that sorts on a click."""
    images = "".join(
        f'<img alt="{html.escape(p.stem)}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">'
        for p in plots
    )
    head = "".join(f"<th>{html.escape(title)}</th>" for title in COLUMNS)
    body = "".join(html_row(row) for row in doc["rows"])
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in headline(doc))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>pyops bench</title><style>{STYLE}</style>'
        f"</head><body><h1>pyops bench</h1>{lines}{images}<table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><script>{SCRIPT}</script></body></html>\n"
    )


def html_row(row: dict[str, Any]) -> str:
    numbers = [row["median_s"], row["min_s"], row["gb_per_s"], row["percent_of_ceiling"]]
    numbers += [row["pyops_speedup"], row["pyops_speedup_of_min"]]
    keys: list[Any] = [None, None, None, None, *numbers] if row["status"] == OK else [None] * len(COLUMNS)
    parts = []
    for text, key in zip(cells(row), keys):
        value = f' class="n" data-v="{key:.6g}"' if key is not None else ""
        parts.append(f"<td{value}>{html.escape(text)}</td>")
    kind = "ours" if row["ours"] else ""
    kind += " bad" if row["status"] in ("WRONG", "ERROR") else ""
    return f'<tr class="{kind.strip()}">{"".join(parts)}</tr>'
