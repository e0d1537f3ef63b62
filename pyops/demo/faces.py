"""MTCNN, a cascade of three small networks, finds the face in a photo of an astronaut.

Twice: by facenet-pytorch as it is, with torch and under ``pyops.use()``, and by its networks in the cascade of
``cascade.py``, which leaves torch no indexing between them; that one is timed and its table printed. facenet-pytorch
takes its box suppression from torchvision, whose compiled library may not load beside the installed torch; then pyops
serves it (pyops.compat.torchvision). Neither package is edited.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compat import torchvision as compat
from ..core.intercept import use
from . import cascade
from .packages import load_photo
from .times import comparison

Found = tuple[Any, Any, Any]  # boxes, probabilities and landmarks, or None, [None] and None
PHOTO = ("skimage", "data/astronaut.png")
LARGEST_DIFFERENCE = 1e-2  # pixels, of box sides some hundred pixels long


def run(out: Path, device: torch.device, repeats: int) -> tuple[bool, dict[str, Any]]:
    """Finds the face with torch and with pyops; whether both agree, and the numbers for demo.json."""
    ours = compat.install()
    detector = load_detector(device)
    photo = load_photo(*PHOTO)
    planes = torch.from_numpy(np.ascontiguousarray(np.asarray(photo).transpose(2, 0, 1))).to(device)
    found: dict[str, Found] = {"torch": detector.detect(photo, landmarks=True)}
    with use():
        found["pyops"] = detector.detect(photo, landmarks=True)
    own = cascade.Cascade(detector)
    both = comparison(lambda: own.detect(planes), device, repeats)
    found["torch, own cascade"], found["pyops, own cascade"] = by_size(*both.by_torch), by_size(*both.by_pyops)

    difference = max(largest_difference(found["torch"], other) for other in found.values())
    agreed = difference < LARGEST_DIFFERENCE
    for name, (boxes, probabilities, _) in found.items():
        for box, p in [] if boxes is None else zip(boxes, probabilities):
            print(f"{name}: face at {', '.join(f'{side:.1f}' for side in box)}, probability {p:.5f}")
    print(f"\nlargest difference of a side or landmark: {difference:.1e} pixels")
    print(f"suppression in facenet-pytorch by {'pyops, through ' if ours else ''}torchvision.ops.batched_nms\n")
    both.show(device, "one photo, own cascade")
    if agreed:
        picture = out / "faces.png"
        draw(picture, photo, *found["pyops"])
        print(f"picture: {picture}")
    else:
        print("pyops demo: torch and pyops disagree about the face, or found none", file=sys.stderr)
    sides = {name: [] if boxes is None else boxes.tolist() for name, (boxes, *_) in found.items()}
    numbers = {"largest_difference": difference, "boxes": sides, "nms_by_pyops": ours, **both.numbers()}
    return agreed and both.ran, numbers


def by_size(boxes: torch.Tensor, probabilities: torch.Tensor, marks: torch.Tensor) -> Found:
    """As facenet-pytorch hands out what it found: NumPy, the largest face first; None where there is none."""
    corners, p, points = boxes.flatten(1).cpu().numpy(), probabilities.cpu().numpy(), marks.cpu().numpy()
    if not len(corners):
        return None, [None], None
    order = np.argsort((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]))[::-1]
    return corners[order], p[order], points[order]


def largest_difference(one: Found, other: Found) -> float:
    """Of a side or a coordinate of a landmark, in pixels; infinite where they did not find as many faces, or none."""
    if one[0] is None or other[0] is None or len(one[0]) != len(other[0]):
        return float("inf")
    return max(float(abs(a.astype(float) - b.astype(float)).max()) for a, b in ((one[0], other[0]), (one[2], other[2])))


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
