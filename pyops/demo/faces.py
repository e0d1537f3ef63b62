"""MTCNN, a cascade of three small networks, finds the face in a photo of an astronaut.

facenet-pytorch takes its box suppression from torchvision, whose compiled library may not load beside the installed
torch; then pyops serves it (pyops.compat.torchvision). Neither package is edited.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ..compat import torchvision as compat
from .packages import load_photo
from .times import comparison

PHOTO = ("skimage", "data/astronaut.png")
LARGEST_DIFFERENCE = 1e-2  # pixels, of box sides some hundred pixels long


def run(out: Path, device: torch.device, repeats: int) -> tuple[bool, dict[str, Any]]:
    """Finds the face with torch and with pyops; whether both agree, and the numbers for demo.json."""
    ours = compat.install()
    detector = load_detector(device)
    photo = load_photo(*PHOTO)
    both = comparison(lambda: detector.detect(photo, landmarks=True), device, repeats)

    (boxes, scores, points), (boxes_pyops, scores_pyops, _) = both.by_torch, both.by_pyops
    found = boxes is not None and boxes_pyops is not None and boxes.shape == boxes_pyops.shape
    difference = float(abs(boxes - boxes_pyops).max()) if found else float("inf")
    agreed = difference < LARGEST_DIFFERENCE
    for name, own, sure in (("torch", boxes, scores), ("pyops", boxes_pyops, scores_pyops)):
        for box, p in [] if own is None else zip(own, sure):
            print(f"{name}: face at {', '.join(f'{side:.1f}' for side in box)}, probability {p:.5f}")
    print(f"\nlargest difference of a side: {difference:.1e} pixels")
    print(f"suppression of overlapping boxes by {'pyops, through' if ours else ''} torchvision.ops.batched_nms\n")
    both.show(device, "one photo")
    if found:
        picture = out / "faces.png"
        draw(picture, photo, boxes_pyops, scores_pyops, points)
        print(f"picture: {picture}")
    if not agreed:
        print("pyops demo: torch and pyops disagree about the face, or found none", file=sys.stderr)
    sides = {name: [] if own is None else own.tolist() for name, own in (("torch", boxes), ("pyops", boxes_pyops))}
    numbers = {"largest_difference": difference, "boxes": sides, "nms_by_pyops": ours, **both.numbers()}
    return agreed and both.ran, numbers


def load_detector(device: torch.device) -> Any:
    """MTCNN with the weights in its package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about its image library
        from facenet_pytorch import MTCNN
    return MTCNN(device=device, keep_all=True)


def draw(path: Path, photo: Any, boxes: Any, scores: Any, points: Any) -> None:
    """The photo with the boxes and landmarks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(5, 5.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(photo)
    axes.set_axis_off()
    for (left, top, right, bottom), score, marks in zip(boxes, scores, points):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="lime", linewidth=2))
        axes.text(left, top - 6, f"face {score:.3f}", color="lime")
        axes.plot(marks[:, 0], marks[:, 1], "+", color="lime")
    axes.set_title("MTCNN, unmodified, under pyops.use()")
    figure.savefig(path, dpi=110)
