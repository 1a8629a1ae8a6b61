"""Rates with their standard errors, where what is counted comes in clusters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, pi, sqrt, tan
from statistics import NormalDist
from typing import Any

from specdec.errors import InvalidArgumentError

CONFIDENCE = 0.95
_ROUNDING = 1e-9  # an error that is less than this of the scale is none


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio of sums over clusters; error: its standard error, nan where one cluster is all.

    bounds: between which it must lie; effective: how many clusters of one size weigh as much;
    counted: the tries that it is a share of, scaled to its bounds; infinite where it is of none.
    """

    value: float
    error: float
    clusters: int  # that had something to count
    bounds: tuple[float, float] | None = None
    effective: float = 1.0
    counted: float = inf

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """By Student's law; unbounded, or the bounds, where the error is unknown.

        With bounds it is Wilson's, of a share of so many independent tries as would have this
        error: near a bound the simple interval covers too little (Brown, Cai and DasGupta 2001,
        section 3). Where tries were counted, Student's quantile is divided by what it would be if
        each were a cluster of its own, and the normal one by none: what is uncertain is how tries
        hang together, and single ones cannot (Korn and Graubard 1998, Survey Methodology 24,
        section 2). No share of n equal clusters has fewer than n tries; an error that large is that
        of bounds which differ from cluster to cluster, and Student's law is taken.

        Clusters that all agree do not make it certain: so many leave room for others, up to the
        share that Wilson's interval gives to what was seen in none of them (0.18 of 20 clusters;
        the rule of three says 0.15), and those could have any value inside the bounds.
        """
        if self.error != self.error:
            return self.bounds or (-inf, inf)
        upper = (1 + confidence) / 2
        reach = student_quantile(upper, self.clusters - 1)
        scale = abs(self.value) if self.bounds is None else self.bounds[1] - self.bounds[0]
        if self.error <= _ROUNDING * scale:
            return self._of_agreeing(reach)
        simple = self.value - reach * self.error, self.value + reach * self.error
        if self.bounds is None:
            return simple
        low, high = self.bounds
        share, error = (self.value - low) / (high - low), self.error / (high - low)
        spread = share * (1 - share)
        tries = spread / error**2
        if tries < self.effective / 2:  # of which half, since the error is an estimate
            return simple
        single = student_quantile(upper, max(self.counted, self.clusters) - 1)
        square = (reach * NormalDist().inv_cdf(upper) / single) ** 2 / tries
        middle = (share + square / 2) / (1 + square)
        half = sqrt(square * (spread + square / 4)) / (1 + square)
        return low + (high - low) * (middle - half), low + (high - low) * (middle + half)

    def _of_agreeing(self, reach: float) -> tuple[float, float]:
        if self.bounds is None:
            return -inf, inf
        others = reach**2 / (self.effective + reach**2)
        low, high = self.bounds
        return self.value - others * (self.value - low), self.value + others * (high - self.value)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is unknown becomes None."""
        low, high = self.interval()
        known = self.error == self.error
        return {
            "value": round(self.value, 6),
            "standard_error": round(self.error, 6) if known else None,
            "interval": [round(low, 6), round(high, 6)] if known and isfinite(high) else None,
            "clusters": self.clusters,
        }  # fmt: skip


def ratio(
    numerators: Sequence[float], denominators: Sequence[float],
    bounds: tuple[float, float] | None = None,
) -> Estimate | None:  # fmt: skip
    """sum of numerators over sum of denominators, one of each per cluster; None where nothing was
    counted.

    Tokens of one text depend on each other, so the text is the cluster. The error is the
    jackknife's over the n clusters with a denominator, sqrt((n - 1) / n sum (r_i - r)^2), r_i being
    the ratio without cluster i: that of a ratio estimator (Cochran, Sampling Techniques, section
    6.3) takes the residuals of few, unequal clusters for smaller than they are (Efron and Stein
    1981: the jackknife errs upwards).
    """
    pairs = [(a, b) for a, b in zip(numerators, denominators, strict=True) if b > 0]
    if not pairs:
        return None
    above, total, n = sum(a for a, _ in pairs), sum(b for _, b in pairs), len(pairs)
    value = above / total
    if n == 1:
        return Estimate(value, nan, 1, bounds)
    effective = total**2 / sum(b * b for _, b in pairs)  # Kish 1965, Survey Sampling, 8.2
    squares = sum(((above - a) / (total - b) - value) ** 2 for a, b in pairs)
    counted: float = inf
    if bounds is not None and all(float(a).is_integer() for a, _ in pairs):
        counted = round(
            total * (bounds[1] - bounds[0])
        )  # one above the line for each that succeeds
    return Estimate(value, sqrt((n - 1) / n * squares), n, bounds, effective, counted)


def student_quantile(probability: float, degrees: float) -> float:
    """Of Student's law, by the expansion around the normal one (Abramowitz and Stegun, 26.7.5);
    within 1 % from 3 degrees on, exact for 1 and 2."""
    if not 0 < probability < 1 or degrees < 1:
        raise InvalidArgumentError(
            f"probability={probability}, degrees={degrees}: expected inside 0..1, and at least 1"
        )
    if degrees <= 2:
        return _few_degrees(probability, degrees)
    z, n = NormalDist().inv_cdf(probability), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _few_degrees(probability: float, degrees: float) -> float:
    if degrees == 1:
        return tan(pi * (probability - 0.5))
    a = 4 * probability * (1 - probability)
    return 2 * (probability - 0.5) * sqrt(2 / a)
