"""What calibration knows of one linear."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wina.criteria import Criterion, LinearFacts
from wina.errors import UsageError
from wina.models import Site


@dataclass(frozen=True)
class LinearStatistics:
    """Statistics of one linear's inputs over calibration tokens.

    Attributes:
        site: which linear.
        column_norm: ||W_:j||_2, shape (in_features,), float32.
        mean_square: E[x_j^2], shape (in_features,), float32.
        gradient_rms: rms of dL/dx_j (see LinearFacts), shape (in_features,), float32, or None.
        histograms: by criterion, counts of the scores |x_j| s_j over all tokens and channels,
            shape (BINS,), int64.
        usage: share of tokens that go through the linear: 1, or less for an expert's.
    """

    site: Site
    column_norm: Tensor
    mean_square: Tensor
    gradient_rms: Tensor | None
    histograms: dict[str, Tensor]
    usage: float = 1.0

    @property
    def cost(self) -> float:
        """Weights that a decoded token reads of it on average, if it drops nothing."""
        return self.site.weights * self.usage

    @property
    def facts(self) -> LinearFacts:
        """What a criterion may look at."""
        return LinearFacts(self.site.kind, self.column_norm, self.gradient_rms)

    def counts(self, criterion: Criterion) -> Tensor:
        """Return the histogram of a criterion's scores; raise UsageError if it has none."""
        if criterion.name not in self.histograms:
            raise UsageError(
                f"the calibration holds no scores of method {criterion.name!r} "
                f"(it has {', '.join(sorted(self.histograms))}); calibrate again"
            )
        return self.histograms[criterion.name]
