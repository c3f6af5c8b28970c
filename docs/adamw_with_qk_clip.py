"""QK-Clip after AdamW, on a transformer of one's own: python docs/adamw_with_qk_clip.py

The attention returns each head's largest logit, the parameters' q and k are declared once, and the chain does the rest.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from k2jax.optim import QKPart, qk_clip

HEADS, HEAD_DIM, WIDTH, VOCAB, LENGTH, TAU = 4, 16, 64, 32, 24, 10.0


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def weight(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / WIDTH**0.5)

        self.q, self.k, self.v = (weight(WIDTH, HEADS, HEAD_DIM) for _ in range(3))
        self.o = weight(HEADS, HEAD_DIM, WIDTH)

    def __call__(self, x):
        q, k, v = (jnp.einsum("btw,whd->bhtd", x, w[...]) for w in (self.q, self.k, self.v))
        logits = jnp.einsum("bhsd,bhzd->bhsz", q, k) / HEAD_DIM**0.5
        logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
        out = jnp.einsum("bhsz,bhzd,hdw->bsw", jax.nn.softmax(logits), v, self.o[...])
        return out, jax.lax.stop_gradient(logits).max((0, 2, 3))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.head = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.position = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.attention = nnx.List([Attention(rngs), Attention(rngs)])

    def __call__(self, tokens):
        x, maxima = self.embed(tokens) + self.position(jnp.arange(LENGTH)), []
        for layer in self.attention:
            y, max_logits = layer(x)
            x, maxima = x + y, [*maxima, max_logits]
        return self.head(x), jnp.stack(maxima)


def train(num_steps: int = 200, learning_rate: float = 1e-2, tau: float = TAU) -> tuple[list[float], list[float]]:
    """Learn to repeat the token before the last; gives the loss and the largest logit of each step."""
    graph, params = nnx.split(Model(nnx.Rngs(0)))
    parts = jax.tree.map(lambda _: None, nnx.to_pure_dict(params))
    for layer in parts["attention"]:  # heads are the last dim but one of q and k; each takes the root of the factor
        parts["attention"][layer] |= {name: QKPart(layer, ((HEAD_DIM, 0.5),)) for name in ("q", "k")}
    tx = optax.chain(optax.adamw(learning_rate), qk_clip(tau, parts))

    @jax.jit
    def step(params, state, key):
        tokens = jax.random.randint(key, (16, LENGTH), 0, VOCAB)

        def loss(params):
            logits, max_logits = nnx.merge(graph, params)(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, 2:], tokens[:, :-2]).mean(), max_logits

        (value, max_logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), state, value, max_logits.max()

    params = nnx.to_pure_dict(params)
    state, losses, maxima = tx.init(params), [], []
    for number in range(num_steps):
        params, state, value, largest = step(params, state, jax.random.key(number))
        losses.append(float(value))
        maxima.append(float(largest))
    return losses, maxima


if __name__ == "__main__":
    for name, tau in (("clipped at 10", TAU), ("not clipped", 1e9)):
        losses, maxima = train(tau=tau)
        print(f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.2f}, largest logit of all steps {max(maxima):.1f}")
