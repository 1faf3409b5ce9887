"""Golden frequencies, 50 digits, straight from the papers' formulas. Imports nothing of e2llm.

Run `python tests/goldens/make_frequencies.py` (needs mpmath) to rewrite frequencies.json beside this file.

theta_j = base^(-2j/D), j = 0 ... D/2 - 1                              RoFormer, arXiv 2104.09864, Eq. 15
linear  theta_j / g                                                    Chen et al., arXiv 2306.15595, Eq. 4
ntk     (base * g^(D/(D-2)))^(-2j/D)                                   YaRN, arXiv 2309.00071, Eq. 16
yarn    (1 - gamma_j) theta_j / g + gamma_j theta_j                    YaRN, Eqs. 17-20
        gamma_j falls linearly over the channel index from floor(c(32)) to ceil(c(1)), where
        c(r) = D ln(L / (2 pi r)) / (2 ln base) is the channel that turns r times in the native window L: the ramp of
        the authors' released code; the paper's Eq. 18 is linear in the number of turns between the same two channels
        attention scale 0.1 ln g + 1                                   YaRN, Eq. 22
"""

from __future__ import annotations

import json
from pathlib import Path

from mpmath import ceil, floor, log, mp, mpf, nstr, pi

mp.dps = 50

MODELS = [  # base, D, L
    ("10000", 128, 4096),
    ("10000", 16, 64),
    ("100000", 64, 8192),
    ("500000", 128, 8192),
    ("1000000", 64, 32768),
    ("1000000", 16, 512),
]
SCALES = ["1.5", "3", "16"]


def plain(base, dim):
    return [base ** (-mpf(2 * j) / dim) for j in range(dim // 2)]


def linear(base, dim, window, scale):
    return [theta / scale for theta in plain(base, dim)], mpf(1)


def ntk(base, dim, window, scale):
    return plain(base * scale ** (mpf(dim) / (dim - 2)), dim), mpf(1)


def yarn(base, dim, window, scale):
    def channel(turns):
        return dim * log(window / (2 * pi * turns)) / (2 * log(base))

    low = max(floor(channel(32)), mpf(0))
    high = min(ceil(channel(1)), mpf(dim - 1))
    result = []
    for j, theta in enumerate(plain(base, dim)):
        gamma = 1 - min(max((j - low) / (high - low), mpf(0)), mpf(1))
        result.append((1 - gamma) * theta / scale + gamma * theta)
    return result, mpf("0.1") * log(scale) + 1


def main() -> None:
    cases = [
        {
            "method": method.__name__,
            "base": float(base),
            "rotary_dim": dim,
            "native_window": window,
            "scale": float(scale),
            "inv_freq": [float(nstr(value, 25)) for value in method(mpf(base), dim, mpf(window), mpf(scale))[0]],
            "attention_scale": float(nstr(method(mpf(base), dim, mpf(window), mpf(scale))[1], 25)),
        }
        for base, dim, window in MODELS
        for scale in SCALES
        for method in (linear, ntk, yarn)
    ]
    text = ",\n".join(json.dumps(case) for case in cases)
    source = json.dumps("make_frequencies.py: mpmath, 50 digits. " + __doc__.split("\n\n", 2)[2].strip())
    path = Path(__file__).with_name("frequencies.json")
    path.write_text(f'{{"source": {source},\n"cases": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
