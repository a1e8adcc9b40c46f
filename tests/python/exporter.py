"""A DLPack producer of which every field can be set: device, version, flags, NULL strides, ..."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CPU, CUDA, ROCM = 1, 2, 10
READ_ONLY, IS_COPIED = 1, 2
FLOAT, BFLOAT = 2, 4


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


_destructor_type = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _destructor_type]


class Exporter:
    """Speaks DLPack, and nothing else, for an array of float32 or of another type: its code and bits."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        versioned: bool = True,
        major: int = 1,
        flags: int = 0,
        device: int = CPU,
        strides: bool = True,
        byte_offset: int = 0,
        refuses: bool = False,
        dtype: tuple[int, int] = (FLOAT, 32),
    ) -> None:
        self.array, self.device, self.refuses = array, device, refuses
        self.exported = self.given_back = 0
        steps = [step // array.itemsize for step in array.strides]
        self._shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self._strides = (ctypes.c_int64 * array.ndim)(*steps)
        tensor = DLTensor(
            array.ctypes.data - byte_offset, device, 0, array.ndim, *dtype, 1, self._shape, None, byte_offset
        )
        if strides:
            tensor.strides = self._strides
        self._managed = (
            ManagedVersioned(major, 0, None, None, flags, tensor) if versioned else Managed(tensor, None, None)
        )
        self._destructor = _destructor_type(self._give_back)
        self.versioned = versioned

    def _give_back(self, capsule: int) -> None:
        self.given_back += 1

    def _export(self) -> Any:
        if self.refuses:
            raise BufferError("not today")
        self.exported += 1
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return _new_capsule(ctypes.addressof(self._managed), name, self._destructor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, copy: bool | None = None) -> Any:
        assert stream is None and max_version >= (1, 0) and copy is False
        return self._export()


class OldExporter(Exporter):
    """A producer from before DLPack 1.0, which knows neither versions nor copies."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array, versioned=False)

    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        return self._export()


class Namespaced(Exporter):
    """An array of the array API, of a library of its own."""

    def __array_namespace__(self) -> Any:
        return type(self)

    @classmethod
    def from_dlpack(cls, array: Any) -> Namespaced:
        """Of a float32 array; bfloat16, which NumPy does not import, is kept as it comes."""
        if isinstance(array, np.ndarray):
            return cls(np.from_dlpack(array))
        kept = cls.__new__(cls)
        kept.array = array
        return kept
