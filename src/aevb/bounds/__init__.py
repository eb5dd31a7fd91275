"""Bounds on log p(x): one pass over both networks gives every term, a bound reduces the terms."""

from aevb.bounds.boundary import evaluating, holes_in, keeping_buffers, prepare
from aevb.bounds.estimators import (
    elbo,
    estimate,
    free_bits_kl,
    iwae,
    label_weight,
    log_mean,
    log_q,
    log_weights,
    mean_bound,
    mean_log_bound,
    refuse_shared,
    total_correlation,
    with_classifier,
)
from aevb.bounds.integrand import MAX_STATES, Kl, Terms, draw_latents, terms

__all__ = [
    "MAX_STATES",
    "Kl",
    "Terms",
    "draw_latents",
    "elbo",
    "estimate",
    "evaluating",
    "free_bits_kl",
    "holes_in",
    "iwae",
    "keeping_buffers",
    "label_weight",
    "log_mean",
    "log_q",
    "log_weights",
    "mean_bound",
    "mean_log_bound",
    "prepare",
    "refuse_shared",
    "terms",
    "total_correlation",
    "with_classifier",
]
