"""Mends Triton's interpreter, which runs the kernels where there is no GPU.

Up to Triton 3.9 its ``tl.dot`` of bfloat16 multiplies the raw bits. Imported by every module that uses ``tl.dot``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl


def _mend() -> None:
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    plain = builder.create_dot
    if getattr(plain, "widens_bfloat16", False):
        return

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = interpreter._convert_float(operand.data, operand.dtype, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    create_dot.widens_bfloat16 = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot


if triton.knobs.runtime.interpret:
    _mend()
