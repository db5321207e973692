"""Weights by their path in the network, and as safetensors: names that stay while code changes."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from cmsad_jax.types import ConfigError

Weights = Mapping[str, Float[Array | np.ndarray, "..."]]
"""float32 arrays by their path in the network, joined by ``/``."""


def to_safetensors(weights: Weights) -> bytes:
    """float32 weights in the safetensors format, in the order of their names."""
    arrays = {name: np.asarray(weights[name], "<f4", order="C") for name in sorted(weights)}
    header, position = {}, 0
    for name, array in arrays.items():
        span = [position, position + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join(
        [len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())]
    )


def from_safetensors(content: bytes, name: str = "the file") -> dict[str, np.ndarray]:
    """float32 arrays of a safetensors file, read-only.

    Raises:
        ConfigError: ``content`` is something else, or holds other types.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        if 8 + length > len(content):
            raise ValueError(f"a header of {length} bytes in a file of {len(content)}")
        data = memoryview(content)[8 + length :]
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        arrays, taken = {}, 0
        for key, entry in header.items():
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not key.isprintable():
                raise ValueError(f"a name with control characters, {key!r:.80}")
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
                raise ValueError(f"{key:.80} has the shape {shape!r:.80}")
            taken += stop - start
            if taken > len(data):
                raise ValueError(f"arrays that overlap, {key:.80} among them")
            if entry["dtype"] != "F32" or not 0 <= start <= stop <= len(data):
                raise ValueError(
                    f"{key} is {entry['dtype']} at {start}:{stop} of {len(data)} bytes"
                )
            arrays[key] = np.frombuffer(data[start:stop], "<f4").reshape(shape)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"weights must be float32 in the safetensors format; got {name} with: "
            f"{first_line(error)}. Copy or export it again."
        ) from error
    return arrays


def flatten_weights(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested weights as one dictionary, keys joined by ``/`` and sorted."""
    flat = {}
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        value = tree[key]
        flat |= flatten_weights(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


LARGEST = 1e6
"""Weights of trained networks are thousands of times smaller; 1e38 overflows in the first layer."""


def check_weights(weights: Mapping[str, Any], name: str = "the weights") -> None:
    """Raise ``ConfigError`` if a weight is NaN, infinite or beyond ``LARGEST`` in size.

    Args:
        weights: arrays by their path, or nested as the ``params`` of a network.
        name: what the message calls them.

    Raises:
        ConfigError: names the first such array and says how many of its values are at fault.

    Examples:
        >>> check_weights({"encoder.kernel": np.ones(3, np.float32)})
    """
    for path, value in flatten_weights(weights).items():
        array = np.asarray(value)
        faulty = array[~(np.abs(array) <= LARGEST)]  # so is NaN
        if faulty.size:
            raise ConfigError(
                f"weights must be finite and at most {LARGEST:g} in size; got "
                f"{float(faulty[0]):g} in {path} of {name} ({faulty.size} of {array.size} values). "
                "The training diverged or the file is damaged: copy it again, or train with a "
                "lower learning rate."
            )


def unflatten_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The nested weights of a network; undoes ``flatten_weights``."""
    tree: dict[str, Any] = {}
    for path, value in weights.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
