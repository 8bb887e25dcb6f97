"""Tests that hold a divergence or a term to the rules, for one's own as for the package's: each is one call."""

from align_ti.testing.divergences import check_divergence as check_divergence
from align_ti.testing.terms import check_term as check_term
