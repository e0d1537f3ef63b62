"""Plots of a results document: ratio bars and the roofline, as PNG files."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter, NullFormatter

from .report import Document, by_case, on_threads

COLOURS = ("#1f6feb", "#e3702d", "#2da44e", "#8250df", "#bf8700", "#57606a")
DPI = 130


def plot_all(doc: Document, out: Path) -> list[Path]:
    """Writes every plot that the document has data for; needs no display."""
    matplotlib.use("Agg")
    written = []
    for threads in sorted({row["threads"] for row in doc["rows"]}):
        rows = [row for row in doc["rows"] if row["threads"] == threads and row["median_s"]]
        suffix = f"_{threads}_threads" if threads else ""
        if any(row["pyops_speedup"] and not row["ours"] for row in rows):
            written.append(ratio_bars(doc, rows, out / f"ratios{suffix}.png"))
        ceiling = next((c for c in doc["ceilings"] if c["threads"] == threads), None)
        if rows and ceiling:
            written.append(roofline(doc, rows, ceiling, out / f"roofline{suffix}.png"))
    return written


def title(doc: Document, what: str, rows: list[dict[str, Any]]) -> str:
    return f"{what} · {doc['machine']['name']}{on_threads(rows[0]['threads'], ', ')}"


def ratio_bars(doc: Document, rows: list[dict[str, Any]], path: Path) -> Path:
    """Time of each peer over the time of pyops, per case; right of the line pyops is faster."""
    rows = [row for row in rows if row["pyops_speedup"]]
    groups = by_case(rows)
    peers = list(dict.fromkeys(row["provider"] for row in rows if not row["ours"] and row["pyops_speedup"]))
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.22 * len(groups) * (len(peers) + 1)), layout="constrained")
    height = 0.8 / len(peers)
    for place, group in enumerate(groups.values()):
        shown = [row for row in group if row["provider"] in peers and row["pyops_speedup"]]
        for line, row in enumerate(shown):
            index = peers.index(row["provider"])
            y = place + (line + 0.5 - len(shown) / 2) * height
            axis.barh(y, row["pyops_speedup"], height, color=COLOURS[index % len(COLOURS)])
            axis.text(row["pyops_speedup"], y, f" {row['pyops_speedup']:.2f}×", va="center", fontsize=7)
    for index, peer in enumerate(peers):
        axis.barh(0, 0, color=COLOURS[index % len(COLOURS)], label=peer)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(groups)), [case for _, case, _ in groups], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("time of the peer / time of pyops (medians)")
    axis.set_title(title(doc, "pyops against its peers", rows), fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(peers))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def roofline(doc: Document, rows: list[dict[str, Any]], ceiling: dict[str, Any], path: Path) -> Path:
    """Achieved arithmetic against arithmetic intensity, under the ceilings measured on this machine."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ridge = ceiling["fma_rate"] / ceiling["copy_bandwidth"]
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    roof = [(x, min(x * ceiling["copy_bandwidth"], ceiling["fma_rate"]) / 1e9) for x in (low, ridge, high)]
    axis.plot([x for x, _ in roof], [y for _, y in roof], color="black", label="measured ceiling")
    providers = list(dict.fromkeys(row["provider"] for row in sorted(rows, key=lambda row: not row["ours"])))
    for index, provider in enumerate(providers):
        own = [row for row in rows if row["provider"] == provider]
        axis.scatter(
            [row["flops"] / row["bytes"] for row in own],
            [row["flops"] / row["min_s"] / 1e9 for row in own],
            color=COLOURS[index % len(COLOURS)],
            marker="o" if own[0]["ours"] else "x",
            label=provider,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("flop / byte")
    axis.set_ylabel("GFLOP/s (fastest call)")
    axis.set_title(title(doc, "roofline", rows), fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
