"""Fill-in-the-middle: documents shown as prefix, suffix, middle (arXiv 2207.14255), chosen and cut by the row alone."""

import numpy as np

from k2jax.data.splitmix import mix


def fill_in_middle(
    tokens: np.ndarray, starts: np.ndarray, edges: tuple[int, int], rate: float, markers: tuple[int, ...], key: int
) -> tuple[np.ndarray, np.ndarray]:
    """A row's tokens and first tokens of its documents after the share `rate` of the documents is rearranged.

    A chosen document becomes bos, marker, prefix, marker, suffix, marker, middle, eos (`edges` are bos and eos, where
    it has them). Three markers make it longer, so as many tokens fall off the end of the row. The choices come from
    `key`, 64 bits, alone.
    """
    rows, new_starts, length = [], [], 0
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        chosen, one, other = (mix((key + 3 * number + i) % 2**64) for i in (1, 2, 3))
        document = tokens[start:stop]
        if len(document) and chosen < rate * 2**64:  # Megatron's files may have empty ones
            head = int(document[0] == edges[0])
            tail = len(document) - int(len(document) > head and document[-1] == edges[1])
            body = document[head:tail]
            a, b = sorted((one % (len(body) + 1), other % (len(body) + 1)))
            parts = [[markers[0]], body[:a], [markers[1]], body[b:], [markers[2]], body[a:b]]
            document = np.concatenate([document[:head], *parts, document[tail:]]).astype(tokens.dtype)
        rows.append(document)
        new_starts.append(length)
        length += len(document)
    new_starts = np.array(new_starts, np.int64)
    return np.concatenate(rows)[: len(tokens)], new_starts[new_starts < len(tokens)]
