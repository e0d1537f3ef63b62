"""What the demo reads out of installed packages: photos, and files beside code that is not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def package_folder(module: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(module)
    return Path(next(iter(spec.submodule_search_locations)))


def load_photo(package: str, file: str) -> Any:
    """One photo as an RGB PIL image."""
    from PIL import Image

    return Image.open(package_folder(package) / file).convert("RGB")
