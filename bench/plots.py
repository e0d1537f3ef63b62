"""Plots of a results document: ratio bars and the roofline, as PNG files."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter, NullFormatter, NullLocator

from .report import Document, by_case, on_threads

COLOURS = ("#1f6feb", "#e3702d", "#2da44e", "#8250df", "#bf8700", "#57606a")
MARKERS = ("o", "D", "^", "v", "s", "P", "*", "h")
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
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
        rows = [row for row in rows if row["flops"]]  # a copy has no place under a roof
        ceiling = next((c for c in doc["ceilings"] if c["threads"] == threads), None)
        if rows and ceiling:
            written.append(roofline(doc, rows, ceiling, out / f"roofline{suffix}.png"))
    return written


def title(doc: Document, what: str, rows: list[dict[str, Any]]) -> str:
    return f"{what} · {doc['machine']['name']}{on_threads(rows[0]['threads'], ', ')}"


def ratio_bars(doc: Document, rows: list[dict[str, Any]], path: Path) -> Path:
    """Time of each peer over the time of pyops, per case, on a log scale; right of the line pyops is faster."""
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
            ratio = row["pyops_speedup"]
            axis.barh(y, ratio - 1, height, left=1, color=COLOURS[index % len(COLOURS)])
            side = "left" if ratio >= 1 else "right"
            axis.annotate(
                f"{ratio:.2f}×", (ratio, y), (3 if ratio >= 1 else -3, 0),
                textcoords="offset points", ha=side, va="center", fontsize=7,
            )  # fmt: skip
    for index, peer in enumerate(peers):
        axis.barh(0, 0, left=1, color=COLOURS[index % len(COLOURS)], label=peer)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.margins(x=0.12)
    ticks = [tick for tick in TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_axisbelow(True)
    axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    axis.set_yticks(range(len(groups)), [case for _, case, _ in groups], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("slower  ←   time of the peer / time of pyops (medians)   →  faster")
    axis.set_title(title(doc, "pyops against its peers", rows), fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(peers))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def roofline(doc: Document, rows: list[dict[str, Any]], ceiling: dict[str, Any], path: Path) -> Path:
    """Achieved arithmetic against arithmetic intensity, under the ceilings measured on this machine."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ridge = ceiling["fma_rate"] / ceiling["copy_bandwidth"]
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    roof = [(x, min(x * ceiling["copy_bandwidth"], ceiling["fma_rate"]) / 1e9) for x in (low, ridge, high)]
    axis.plot([x for x, _ in roof], [y for _, y in roof], color="black", label="measured ceiling")
    # an op has a colour, a provider a shape; what belongs to pyops is filled
    ops = list(dict.fromkeys(row["op"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in sorted(rows, key=lambda row: not row["ours"])))
    for row in rows:
        colour = COLOURS[ops.index(row["op"]) % len(COLOURS)]
        axis.scatter(
            row["flops"] / row["bytes"],
            row["flops"] / row["min_s"] / 1e9,
            marker=MARKERS[providers.index(row["provider"]) % len(MARKERS)],
            facecolors=colour if row["ours"] else "none",
            edgecolors=colour,
            s=36,
        )
    for index, op in enumerate(ops):
        axis.scatter([], [], marker="s", color=COLOURS[index % len(COLOURS)], label=op)
    for index, provider in enumerate(providers):
        ours = any(row["ours"] for row in rows if row["provider"] == provider)
        face = "black" if ours else "none"
        marker = MARKERS[index % len(MARKERS)]
        axis.scatter([], [], marker=marker, facecolors=face, edgecolors="black", label=provider)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("flop / byte")
    axis.set_ylabel("GFLOP/s (fastest call)")
    axis.set_title(title(doc, "roofline", rows), fontsize=10)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
