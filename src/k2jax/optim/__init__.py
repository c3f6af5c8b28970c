"""MuonClip for optax: each part works alone, with any model and any other transformation. Imports no model.

optax.chain(optax.adamw(3e-4), qk_clip(100.0, parts))           QK-Clip after another optimizer
scale_by_muon(dimension_numbers=...)                            Muon, as a part of a chain of your own
muonclip(2e-4, labels, parts)                                   all of K2's optimizer
"""

from k2jax.optim.assignment import Assignment, make_assignment, make_assignments
from k2jax.optim.by_path import by_path
from k2jax.optim.multi_steps import multi_steps
from k2jax.optim.muon import MatrixView, scale_by_muon
from k2jax.optim.muonclip import group_labels, matrix_labels, muonclip
from k2jax.optim.newton_schulz import COEFFICIENTS, newton_schulz
from k2jax.optim.qk_clip import QKPart, clip_factors, qk_clip
from k2jax.optim.rounding import lost_updates
from k2jax.optim.setup import Setup, muonclip_of

__all__ = [
    "COEFFICIENTS",
    "MatrixView",
    "Assignment",
    "QKPart",
    "Setup",
    "by_path",
    "clip_factors",
    "group_labels",
    "lost_updates",
    "make_assignment",
    "make_assignments",
    "matrix_labels",
    "multi_steps",
    "muonclip",
    "muonclip_of",
    "newton_schulz",
    "qk_clip",
    "scale_by_muon",
]
