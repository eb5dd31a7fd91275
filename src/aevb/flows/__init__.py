r"""Conditionals made of normalizing flows.

A flow is an invertible map of standard normal noise, :math:`z = f(\epsilon; a)`, and its density
(Rezende and Mohamed, 2015, eq. 5)

.. math:: \log q(z | a) = \log N(\epsilon; 0, I) - \log |\det \partial z / \partial \epsilon| .

What each of them can do, with D dimensions:

================================  ===========================  =============================
flow                              a draw with its density      the density at a given point
================================  ===========================  =============================
`PlanarFlow`, `SylvesterFlow`     one pass                     none in closed form: raises
`InverseAutoregressiveFlow`       one pass                     D passes a transform
`SplineFlow`                      one pass                     two passes a transform
`FlowPrior`                       D passes a transform         one pass
================================  ===========================  =============================

Every flow starts as the Gaussian that it transforms, and stretches no direction by less than 1e-3 a step, so that
its determinants are above zero in floating point too.
"""

from aevb.flows.amortised import PlanarFlow, SylvesterFlow
from aevb.flows.masked import FlowPrior, InverseAutoregressiveFlow, SplineFlow
from aevb.flows.transformed import TransformedNormal

__all__ = [
    "FlowPrior",
    "InverseAutoregressiveFlow",
    "PlanarFlow",
    "SplineFlow",
    "SylvesterFlow",
    "TransformedNormal",
]
