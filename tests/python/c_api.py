"""The C interface through ctypes, its structs read from blasst.h so that they cannot differ."""

import ctypes
import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "size_t": ctypes.c_size_t,
}


def _read_header() -> dict[str, type]:
    """Every struct and enum of the header by name."""
    text = (_ROOT / "include/blasst/blasst.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"BLASST_DEFAULT\((?:[^()]|\([^()]*\))*\)", "", text)
    types = dict(_SCALARS)
    for name in re.findall(r"typedef BLASST_ENUM\((\w+)\)", text):
        types[name] = ctypes.c_int32
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, re.DOTALL):
        fields = []
        for member in filter(None, map(str.strip, body.split(";"))):
            type_name, pointer, field = re.fullmatch(
                r"(?:const )?(\w+)\s*(\*?)\s*(\w+)", member
            ).groups()
            fields.append((field, ctypes.c_void_p if pointer else types[type_name]))
        types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return types


_types = _read_header()
AttentionParams = _types["blasst_attention_params"]
View = _types["blasst_view"]
_library = ctypes.CDLL(_ROOT / "build/release/libblasst.so")
_library.blasst_last_error.restype = ctypes.c_char_p


def new_params() -> ctypes.Structure:
    """The C structure with its defaults."""
    params = AttentionParams()
    _library.blasst_attention_params_init(ctypes.byref(params))
    return params


def run(phase: str, params: ctypes.Structure) -> None:
    """blasst_prefill or blasst_decode; an error is a RuntimeError."""
    if getattr(_library, f"blasst_{phase}")(ctypes.byref(params)) != 0:
        raise RuntimeError(_library.blasst_last_error().decode())
