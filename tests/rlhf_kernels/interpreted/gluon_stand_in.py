"""Gluon for the interpreter, which has none: layouts mean nothing, and shared memory is as late as it may be.

`load(path, name)` imports a module of Gluon kernels on top of this. A copy to shared memory spoils its place at once
and arrives only when a wait asks for its group: a kernel that reads too early, or asks too early, gets NaN.
"""

import importlib.util
import sys
import types

import numpy as np
import pytest
import triton
import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

WARPS = 1
SPOILT = 0x7FFF7FFF
"""NaN as a float32, and twice as a number of 16 bits."""


class Copies:
    """Those of the program that runs."""

    def __init__(self):
        self.uncommitted, self.groups = [], []

    def commit(self):
        self.groups.append(self.uncommitted)
        self.uncommitted = []

    def wait(self, outstanding):
        while len(self.groups) > outstanding:
            for place, numbers, mask in self.groups.pop(0):
                place[mask] = numbers[mask]


copies = Copies()


class Shared:
    def __init__(self, numbers):
        self.numbers, self.shape = numbers, numbers.shape

    def index(self, number):
        place = int(number.handle.data.item() if isinstance(number, tl.tensor) else number)
        assert 0 <= place < len(self.numbers)
        return Shared(self.numbers[place])

    def slice(self, start, length):
        return Shared(self.numbers[start : start + length])

    def load(self, layout):
        return tl.tensor(TensorHandle(self.numbers.copy(), tl.int32), tl.block_type(tl.int32, list(self.numbers.shape)))


def allocate_shared_memory(element, shape, layout):
    copies.__init__()  # a program begins
    return Shared(np.full([int(size) for size in shape], SPOILT, dtype=np.int32))


def async_load(place, pointers, mask):
    numbers = tl.load(pointers, mask=mask, other=0).handle.data
    mask = np.broadcast_to(mask.handle.data, numbers.shape)
    place.numbers[mask] = SPOILT
    copies.uncommitted.append((place.numbers, numbers, mask))


def masked(name):
    """tl.load or tl.store, with masks that the interpreter does not take: one for all, and None."""

    def use(pointers, *args, mask=None, **options):
        if mask is None:
            return getattr(tl, name)(pointers, *args, **options)
        if pointers.type.is_block() and not mask.type.is_block():
            shape = list(pointers.shape)
            every = np.full(shape, bool(mask.handle.data.item()))
            mask = tl.tensor(TensorHandle(every, tl.int1), tl.block_type(tl.int1, shape))
        return getattr(tl, name)(pointers, *args, mask=mask, **options)

    return use


def language():
    """What the kernels use of triton.experimental.gluon.language."""
    gl = types.ModuleType("gluon_language")
    gl.load, gl.store = masked("load"), masked("store")
    for name in ("where", "join", "program_id", "num_programs"):
        setattr(gl, name, lambda *args, _name=name, **kwargs: getattr(tl, _name)(*args, **kwargs))
    for name in ("constexpr", "pointer_type", "int16", "int32", "int64", "float32", "bfloat16", "float16"):
        setattr(gl, name, getattr(tl, name))
    for name in ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout"):
        setattr(gl, name, lambda *args: None)
    gl.static_range = range
    gl.to_tensor = lambda x: x
    gl.num_warps = lambda: WARPS
    gl.arange = lambda start, end, layout: tl.arange(start, end)
    gl.full = lambda shape, value, element, layout: tl.full(shape, value, element)
    gl.zeros = lambda shape, element, layout: tl.zeros(shape, element)
    gl.convert_layout = lambda x, layout, assert_trivial: x
    gl.inline_asm_elementwise = lambda asm, constraints, args, **options: args[0]
    gl.allocate_shared_memory = allocate_shared_memory
    return gl


def load(path, name):
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = triton.jit, lambda function: function, language()
    ampere = types.ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.async_copy = types.SimpleNamespace(
        async_load=async_load, commit_group=lambda: copies.commit(), wait_group=lambda n: copies.wait(int(n))
    )
    with pytest.MonkeyPatch.context() as patch:
        for stand_in in (gluon, ampere):
            patch.setitem(sys.modules, stand_in.__name__, stand_in)
        patch.setattr(triton.experimental, "gluon", gluon, raising=False)  # there, if anyone has imported it
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for function in list(vars(module).values()):
        if hasattr(function, "rewrite"):  # the interpreter knows what `tl.constexpr` means by its name
            types_of = function.rewrite().__annotations__
            types_of.update({key: str(value).replace("gl.", "tl.") for key, value in types_of.items()})
    return module
