"""The filters of wavelets."""

import importlib
import math
import re
from typing import Any

import numpy as np

from peftc.errors import RuleError

# peft's config takes more names, and has no wavelets for them: its coif4 and coif5 are none.
WAVELETS = "db([1-9]|10)|sym([2-9]|10)|coif[1-3]"


def filter_length(wavelet: str) -> int:
    """How many coefficients the filter has."""
    number = int(re.sub(r"\D", "", wavelet))
    return (6 if wavelet.startswith("coif") else 2) * number


def low_pass(wavelet: str) -> list[float]:
    """The filter that the transform goes back by. Raises RuleError without PyWavelets, for others than Daubechies'."""
    if wavelet.startswith("db"):
        return daubechies(int(wavelet[2:]))
    try:
        wavelets: Any = importlib.import_module("pywt")
    except ImportError:
        raise RuleError(f"wavelet_family={wavelet!r} comes from PyWavelets: pip install 'peftc[wavelets]'") from None
    return list(wavelets.Wavelet(wavelet).rec_lo)


def daubechies(moments: int) -> list[float]:
    """The low-pass filter with so many vanishing moments.  Daubechies 1988, section 4: spectral factorisation."""
    powers = [math.comb(moments - 1 + k, k) for k in range(moments)]
    found = np.ones(1)
    for root in np.roots(powers[::-1]):
        # Of the pair z, 1/z with z + 1/z = 2 − 4y the one inside of the unit circle.
        pair = np.roots([1, 4 * root - 2, 1])
        found = np.convolve(found, [1, -pair[np.abs(pair).argmin()]])
    for _ in range(moments):
        found = np.convolve(found, [1, 1])
    return [float(value) for value in (found * math.sqrt(2) / found.sum()).real]
