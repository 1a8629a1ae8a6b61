"""The matrix product over any number of rows, made of tiles of up to six."""

from functools import cache
from typing import Any

from numba import cfunc, types

from specdec.forward.jit import rows as kernels


@cache
def make_product(kind: str) -> Any:
    """out[r, :COLUMNS] (+)= x[r] @ w for every row, in tiles of one to six rows.

    Arguments: w, bytes per step of w, x, bytes per row of x, rows, steps, out, bytes per row of
    out, resume: rows.make_tile names them. A row is computed alike in every tile.
    """
    t1, t2, t3, t4, t5, t6 = (kernels.make_tile(n, kind) for n in range(1, kernels.MAX_ROWS + 1))

    @cfunc(types.void(*([types.intp] * 9)))
    def product(w, w_step, x, x_row, rows, steps, out, out_row, resume):  # type: ignore[no-untyped-def]
        r = 0
        while r < rows:
            tiles = (rows - r + 5) // 6
            n = (rows - r + tiles - 1) // tiles  # tiles of about one size
            xr, to = x + r * x_row, out + r * out_row
            if n == 1:
                t1(w, w_step, xr, x_row, steps, to, out_row, resume)
            elif n == 2:
                t2(w, w_step, xr, x_row, steps, to, out_row, resume)
            elif n == 3:
                t3(w, w_step, xr, x_row, steps, to, out_row, resume)
            elif n == 4:
                t4(w, w_step, xr, x_row, steps, to, out_row, resume)
            elif n == 5:
                t5(w, w_step, xr, x_row, steps, to, out_row, resume)
            else:
                t6(w, w_step, xr, x_row, steps, to, out_row, resume)
            r += n

    return product.ctypes  # by address, so that it is compiled once and not into every caller
