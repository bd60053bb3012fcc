"""Triton 3.6's interpreter with NumPy 2.4, which no longer makes an int of an array like [3].

Loops over ranges that are known only on the device need that. To be imported before kernels run.
"""

from typing import Any

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_with_index
