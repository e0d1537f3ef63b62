"""Mends Triton's interpreter, which runs the kernels where there is no GPU.

Up to Triton 3.9 its ``tl.dot`` of bfloat16 multiplies the raw bits, and float32 becomes bfloat16 by cutting bits off,
where a GPU rounds to nearest even. It also spends a sixth of its time on questions whose answers never change. Imported
by ``_toolbox``, hence before any kernel runs.
"""

from __future__ import annotations

from functools import cache
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

    cut = interpreter._convert_float

    def rounded(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if (input_dtype, output_dtype, rounding_mode) != (tl.float32, tl.bfloat16, None):
            return cut(input, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(input).view(np.uint32)
        nearest = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        return np.where(np.isnan(input), np.uint32(0x7FC0), nearest).astype(np.uint16)

    interpreter._convert_float = rounded

    @cache
    def builtins_of(package: Any) -> list[tuple[str, Any]]:
        return interpreter.inspect.getmembers(package, tl.core.is_builtin)

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    numpy_type_of_scalar = cache(interpreter._get_np_dtype)

    def numpy_type(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else numpy_type_of_scalar(scalar)

    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = numpy_type


if triton.knobs.runtime.interpret:
    _mend()
