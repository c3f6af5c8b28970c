"""Continue texts with a trained model: latents of past tokens are kept, so each new token costs one token's work."""

import math
from collections.abc import Container, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.errors import UserError
from k2jax.inference.load import LoadedModel
from k2jax.inference.mesh import DATA_AXES, padded_to
from k2jax.model.transformer import Cache, build_model
from k2jax.sharding.place import whole
from k2jax.train.compiling import compiled_when_called
from k2jax.train.phases import rope_after


class Decoder:
    """Tokens in, tokens out, for a batch of contexts of any lengths; at most `loaded.context_length` tokens are seen.

    longest: tokens that a context may grow to. temperature 0 is greedy. A context that has filled the window goes on
    with its newer half. On a mesh contexts are cut over its data axes: the first is repeated until these divide their
    number, and what follows the repetitions is dropped again. The choice among a row's logits is made alike on every
    device, by a key that is a function of seed, token and row: so tokens are those of one device, but where rounding
    decides between logits that are nearly equal.
    """

    def __init__(self, loaded: LoadedModel, batch: int, longest: int, temperature: float, seed: int):
        config, self._values = loaded.config, (loaded.state.params, loaded.state.router_bias)
        self._loaded, self._window, self._seed = loaded, min(loaded.context_length, longest), np.uint32(seed)
        self._batch, num_rows = batch, padded_to(loaded.mesh, DATA_AXES, batch)
        self._added = num_rows - batch
        rope = rope_after(config, int(loaded.state.step))
        dtype = jnp.dtype(config.train.compute_dtype)

        def model(values):
            return build_model(config.model, *values, dtype, rope=rope, kernels=config.kernels)

        def choose(logits_BV, seed, index):
            if temperature == 0:
                return jnp.argmax(logits_BV, -1)
            key = jax.random.fold_in(jax.random.key(seed), index)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows))
            return jax.vmap(jax.random.categorical)(keys, logits_BV / temperature)

        def advance(values, tokens_BT, start_B, last_B, seed, index, cache: Cache):
            logits_BV, cache = model(values).decode(tokens_BT, start_B, last_B, cache)
            return choose(whole(logits_BV), seed, index), cache

        self._advance = compiled_when_called(jax.jit(advance, donate_argnums=6))
        self._new_cache = jax.jit(lambda values: model(values).init_cache(num_rows, self._window))

    def _prefill(self, contexts: list[list[int]], index: int):
        """All contexts at once, padded to one length; lengths are rounded up, so that few programs are compiled."""
        lengths = np.array([len(c) for c in contexts])
        padded = np.zeros((len(contexts), min(self._window, 1 << int(lengths.max() - 1).bit_length())), np.int32)
        for row, context in zip(padded, contexts, strict=True):
            row[: len(context)] = context
        start, cache = np.zeros(len(contexts), np.int32), self._new_cache(self._values)
        return self._advance(self._values, padded, start, lengths - 1, self._seed, np.uint32(index), cache)

    def run(self, contexts: list[list[int]], num_tokens: int) -> Iterator[np.ndarray]:
        """Yield the next token of every context [B], `num_tokens` times. Contexts must not be empty."""
        contexts, cache = [list(context) for context in [*contexts, *contexts[:1] * self._added]], None
        for index in range(num_tokens):
            lengths = np.array([len(c) for c in contexts])
            if cache is None or lengths.max() > self._window:
                keep = self._window if cache is None else max(self._window // 2, 1)
                contexts = [context[-keep:] for context in contexts]
                with self._loaded.on_mesh():
                    tokens, cache = self._prefill(contexts, index)
            else:
                newest, last = np.array([context[-1:] for context in contexts], np.int32), np.zeros_like(lengths)
                with self._loaded.on_mesh():
                    arguments = newest, lengths - 1, last, self._seed, np.uint32(index)
                    tokens, cache = self._advance(self._values, *arguments, cache)
            tokens = np.asarray(tokens)
            for context, token in zip(contexts, tokens, strict=True):
                context.append(int(token))
            yield tokens[: self._batch]


def continue_tokens(
    loaded: LoadedModel,
    contexts: list[list[int]],
    num_tokens: int,
    temperature: float,
    seed: int,
    stops: Container[int],
) -> list[list[int]]:
    """Up to `num_tokens` token ids after each context, ending before the first of `stops`."""
    continued: list[list[int]] = [[] for _ in contexts]
    open_rows = set(range(len(contexts)))
    longest = max(map(len, contexts)) + num_tokens
    for tokens in Decoder(loaded, len(contexts), longest, temperature, seed).run(contexts, num_tokens):
        open_rows = {row for row in open_rows if int(tokens[row]) not in stops}
        for row in open_rows:
            continued[row].append(int(tokens[row]))
        if not open_rows:
            break
    return continued


def check_sampling(num_tokens: int, temperature: float, seed: int) -> None:
    """Raise UserError with every value that is out of its range."""
    problems = []
    if not (math.isfinite(temperature) and temperature >= 0):
        problems.append(f"temperature = {temperature}: must be a number of at least 0; 0 is greedy")
    if num_tokens < 0:
        problems.append(f"tokens = {num_tokens}: must be at least 0")
    if not 0 <= seed < 2**32:
        problems.append(f"seed = {seed}: must be at least 0 and below 2**32")
    if problems:
        raise UserError(*problems)


def generate(loaded: LoadedModel, prompts: list[str], num_tokens: int, temperature: float, seed: int) -> list[str]:
    """Each prompt continued by `num_tokens` tokens or to the end of the document; the texts of the continuations alone.

    Raises UserError as `check_sampling` does, and where the model brings no tokenizer.
    """
    check_sampling(num_tokens, temperature, seed)
    tokenizer = loaded.need_tokenizer()
    contexts = [[tokenizer.bos, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
    if (largest := max(map(max, contexts))) >= (rows := loaded.config.model.vocab_size):
        raise UserError(f"{loaded.source}: its tokenizer gives the id {largest}, its embedding has {rows} rows")
    continued = continue_tokens(loaded, contexts, num_tokens, temperature, seed, tokenizer.stops)
    return [tokenizer.decode(ids) for ids in continued]
