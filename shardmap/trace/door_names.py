"""The calls by which a value can leave a recording without an operator, and what to do instead."""

from __future__ import annotations

from typing import Any

import torch

from shardmap._torch import set_data, typed_storage

Tensor = torch.Tensor

FROM_DATA = {torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, Tensor.new_tensor: 1}
"""Functions that make a tensor from python data, and the position of that data."""

SET_DATA: Any = set_data
CHANGES_GRAD = {getattr(Tensor.grad, name) for name in ("__set__", "__delete__")}
"""What `zero_grad` and `p.grad = ...` call."""
READS: dict[Any, tuple[str, str]] = {
    Tensor.tolist: ("tolist()", "keep the value in a tensor"),
    Tensor.numpy: (
        "numpy()",
        "use torch's operators instead of numpy's, or make the part in numpy an operator "
        "(torch.library.custom_op)",
    ),
    Tensor.__array__: (
        "a numpy function on a tensor",
        "use torch's operators instead of numpy's, such as torch.sin for np.sin",
    ),
    Tensor.apply_: ("apply_", "use torch's operators on the whole tensor"),
    Tensor.map_: ("map_", "use torch's operators on the whole tensor"),
    Tensor.map2_: ("map2_", "use torch's operators on the whole tensor"),
    Tensor.__deepcopy__: ("copy.deepcopy", "use clone()"),
    Tensor.__reduce_ex__: ("pickling", "return the tensor instead"),
    Tensor.data_ptr: (
        "data_ptr()",
        "use torch's operators (torch.autograd.graph.allow_mutation_on_saved_tensors calls it too: "
        "write to a clone in its place, or enter it around the map and its gradient)",
    ),
    Tensor.untyped_storage: ("untyped_storage()", "use torch's operators"),
    Tensor.storage: ("storage()", "use torch's operators"),
    typed_storage: ("a Storage", "use torch's operators"),
    Tensor.set_: ("set_", "build the tensor with torch's operators"),
    Tensor.share_memory_: ("share_memory_()", "return the tensor instead"),
    SET_DATA: (".data = ", "use copy_ under torch.no_grad()"),
    Tensor.__dlpack__: ("DLPack", "use torch's operators"),
}

WRITES = {Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.set_}
"""Doors by which python writes to a tensor."""
REACHES = {
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage,
    Tensor.storage, typed_storage,
}  # fmt: skip
"""Doors that give python the memory of a tensor, to read and to write."""
VALUE_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
"""Doors by which python reads a value; torch itself reads storages."""
