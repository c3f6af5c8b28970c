"""Between the published tensors (one per layer and expert, [outputs, inputs]) and our stacked parameters."""

import itertools
from collections.abc import Iterator

import numpy as np

from k2jax.config import ModelConfig
from k2jax.interop.safetensor_files import StoredTensor
from k2jax.model.transformer import bias_declarations, declarations
from k2jax.model.weights import Weight

SCALE = "_scale_inv"  # suffix of the scales of a block-FP8 weight


def all_weights(config: ModelConfig) -> dict:
    """{"params", "router_bias"}: pytrees of Weight."""
    return {"params": declarations(config), "router_bias": bias_declarations(config)}


def published_names(weight: Weight) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into the stack dims, published name) of each tensor of a weight, in the stack's order."""
    sizes = weight.shape[: weight.num_stack]
    for index in itertools.product(*map(range, sizes)):
        place = dict(zip(weight.stack, index, strict=True))
        yield index, weight.hf.format(L=weight.first_layer + place.get("L", 0), E=place.get("E", 0))


def published_shape(weight: Weight) -> tuple[int, ...]:
    """Shape of each published tensor of a weight: [outputs, inputs], a vector, or a table as it is."""
    inputs, outputs = _dims(weight)
    if not inputs:
        return outputs
    n, m = int(np.prod(inputs)), int(np.prod(outputs))
    return (n, m) if weight.hf_as_declared else (m, n)


def _dims(weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rest = weight.shape[weight.num_stack :]
    return rest[: weight.num_inputs], rest[weight.num_inputs :]


def to_published(weight: Weight, value: np.ndarray) -> np.ndarray:
    """One entry of the stack, [inputs..., outputs...], as its published tensor."""
    inputs, _ = _dims(weight)
    if not inputs or weight.hf_as_declared:
        return value.reshape(published_shape(weight))
    return value.reshape(published_shape(weight)[::-1]).T


def whole_value(tensor: StoredTensor, scale: StoredTensor | None, block: tuple[int, int]) -> np.ndarray:
    """A published tensor; one in FP8 times its block scales, in float32 (DeepSeek-V3 report 3.3.1)."""
    value = tensor.read()
    if scale is None:
        return value
    scales = scale.read().astype(np.float32)
    rows, columns = (min(b, n) for b, n in zip(block, value.shape, strict=True))  # a block may exceed the tensor
    scales = np.repeat(np.repeat(scales, rows, 0), columns, 1)[: value.shape[0], : value.shape[1]]
    return value.astype(np.float32) * scales


def read_part(
    weight: Weight,
    part: tuple[slice, ...],
    tensors: dict[str, StoredTensor],
    block: tuple[int, int],
    dtype: np.dtype,
) -> np.ndarray:
    """`parameter[part]` put together from the files; no more than this part, and one tensor of it, is in memory."""
    bounds = [s.indices(size) for s, size in zip(part, weight.shape, strict=True)]
    out = np.empty([stop - start for start, stop, _ in bounds], dtype)
    inputs, outputs = _dims(weight)
    stack_bounds, inner = bounds[: weight.num_stack], part[weight.num_stack :]
    for index, name in published_names(weight):
        if not all(start <= i < stop for i, (start, stop, _) in zip(index, stack_bounds, strict=True)):
            continue
        value = whole_value(tensors[name], tensors.get(name + SCALE), block)
        if inputs and not weight.hf_as_declared:  # [outputs..., inputs...] -> [inputs..., outputs...]
            order = (*range(len(outputs), len(outputs) + len(inputs)), *range(len(outputs)))
            value = value.reshape(*outputs, *inputs).transpose(order)
        out[tuple(i - start for i, (start, _, _) in zip(index, stack_bounds, strict=True))] = value.reshape(
            *inputs, *outputs
        )[inner]
    return out
