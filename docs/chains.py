"""Optimizers of one's own for the trainer; each function is named by a config:

k2jax train configs/tiny.py --simulate 1 --train.run-dir runs/adamw --optim.optimizer docs/chains.py:adamw
"""

import optax

from k2jax.optim import qk_clip, scale_by_muon


def adamw(setup):
    """AdamW for everything, with QK-Clip after it."""
    config = setup.config
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(setup.learning_rate, config.adam_b1, config.adam_b2, weight_decay=config.weight_decay),
        qk_clip(config.qk_clip_tau, setup.qk_parts),
    )


def muon_and_lion(setup):
    """Muon for the matrices, Lion for the rest: run with --optim.qk-clip-tau none."""
    return optax.chain(
        optax.partition(
            {"muon": scale_by_muon(dimension_numbers=setup.matrices), "adamw": optax.scale_by_lion()}, setup.labels
        ),
        optax.add_decayed_weights(setup.config.weight_decay),
        optax.scale_by_learning_rate(setup.learning_rate),
    )
