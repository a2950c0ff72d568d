"""Loops over arrays as machine code, by numba.

It is cached beside the file that holds the function or, where that is read-only, in the user's
cache folder (numba's rules; NUMBA_CACHE_DIR overrides them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile when first called; cached on disk where any cache folder can be written.

    The code holds no lock. Reassociation and contraction only: infinities and NaN of a diverging
    network stay.
    """
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba found no folder to cache in
        return cast(F, numba.njit(**options)(function))
