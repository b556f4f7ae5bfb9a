"""Tied weights: find the sites that see one and the same matrix, wherever the model stores it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnxq.graph.sites import Site
from onnxq.graph.tensors import constant_tensor, read_array

HASH_CHUNK = 16 << 20
"""Bytes of a matrix hashed at a time; the peak memory of looking for tied copies (of external weights)."""

_PROBES = 256  # elements compared before a full hash: it tells untied matrices apart without reading them


def tied_groups(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites by the matrix they see, every group and the list of groups in walking order.

    1. Sites that read the same view of one stored tensor see the same matrix; no data is read to know it.
    2. So do sites whose matrices have equal shape, type and content. They are compared by a sample of
       elements, then, where samples agree, by a hash of all of it.
    """
    by_view: dict[tuple[object, ...], list[Site]] = defaultdict(list)
    for site in sorted(sites, key=lambda s: (s.order, s.weight_input)):
        by_view[(site.root, site.layout, site.batch)].append(site)
    by_shape: dict[tuple[object, ...], list[list[Site]]] = defaultdict(list)
    for group in by_view.values():
        site = group[0]
        by_shape[(site.batch, site.n, site.k, stored_tensor(site.root).dtype)].append(group)
    merged = []
    for alike in by_shape.values():
        for same_sample in _split(alike, _sample):
            merged += [
                sorted((s for group in same for s in group), key=lambda s: (s.order, s.weight_input))
                for same in _split(same_sample, _digest)
            ]
    return sorted(merged, key=lambda group: (group[0].order, group[0].weight_input))


def stored_tensor(root: ir.Value) -> ir.TensorProtocol:
    """The tensor of a site's root."""
    tensor = constant_tensor(root)
    if tensor is None:
        raise RuntimeError(f"'{root.name}' is no longer constant: find the weights again after changing the graph")
    return tensor


def matrix_view(site: Site) -> np.ndarray:
    """The matrix [batch * n, k] of a site in its stored type.

    It is a view of the memory map unless a reshape forces a copy.
    """
    return site.layout.apply(read_array(stored_tensor(site.root)))


def _split(groups: list[list[Site]], key: Callable[[Site], bytes]) -> list[list[list[Site]]]:
    if len(groups) == 1:
        return [groups]
    parts: dict[bytes, list[list[Site]]] = defaultdict(list)
    for group in groups:
        parts[key(group[0])].append(group)
    return list(parts.values())


def _sample(site: Site) -> bytes:
    view = matrix_view(site)
    rows, columns = view.shape
    # Strides that share no factor with the usual widths, so that the probes spread over rows and columns.
    index = np.arange(_PROBES)
    probes: np.ndarray = view[index * 7919 % rows, index * 104729 % columns]
    return probes.tobytes()


def _digest(site: Site) -> bytes:
    view = matrix_view(site)
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, HASH_CHUNK // (view.shape[1] * view.itemsize))
    for start in range(0, view.shape[0], step):
        digest.update(np.ascontiguousarray(view[start : start + step]).view(np.uint8).data)
    return digest.digest()
