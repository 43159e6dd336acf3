"""Application binary interface of the compiled loops: numbers, structs and signatures, checked when the library loads.

``csrc/abi.h`` has the same numbers and structs. :func:`bind` compares every value, size and offset with the library's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

#: Columns of a gradient that share a scale in ``gemm_w8a8_grouped.c``.
GROUP = 64
#: Columns. Distance over which a rounding error is carried forward (error feedback).
FEEDBACK = 16
#: Largest rank of a low-rank product that ``gemm_w8a16.c`` adds in its epilogue.
MAX_FUSED_RANK = 64
#: Values of an attention head, at most; its width is a multiple of :data:`HEAD_STEP` (``attention.c``).
MAX_HEAD_WIDTH, HEAD_STEP = 128, 16
#: Linear layers of a decoder layer that adapters update: q, k, v, o, gate, up, down.
LINEARS = 7
#: Tokens of a page are a multiple of this (``paged_attention.c``).
PAGE_STEP = 16
#: Products in training: of int8 with 16-bit gradients, 8-bit ones, or these in tiles of AMX; of stored bf16 and fp16.
PAIRS, VNNI, AMX, BF16, FP16 = 0, 1, 2, 3, 4
#: Kinds of work of a decoder layer in training whose time C measures, in its order (``training.h``).
WORK = ("product", "gradient", "rounding", "low_rank", "attention", "elementwise")
#: The sixteen values of NF4, by code (QLoRA, appendix E); ``nf4.h`` has them too.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

#: Values of ``abi.h`` by their names there.
CONSTANTS = {
    "LK_GROUP": GROUP,
    "LK_FEEDBACK": FEEDBACK,
    "LK_MAX_FUSED_RANK": MAX_FUSED_RANK,
    "LK_MAX_HEAD_WIDTH": MAX_HEAD_WIDTH,
    "LK_HEAD_STEP": HEAD_STEP,
    "LK_LINEARS": LINEARS,
    "LK_PAGE_STEP": PAGE_STEP,
    "LK_PAIRS": PAIRS,
    "LK_VNNI": VNNI,
    "LK_AMX": AMX,
    "LK_BF16": BF16,
    "LK_FP16": FP16,
    "LK_WORK": len(WORK),
}

_POINTER, _SIZE, _INT, _FLOAT, _UINT32 = (
    ctypes.c_void_p,
    ctypes.c_ssize_t,
    ctypes.c_int,
    ctypes.c_float,
    ctypes.c_uint32,
)


class Linear(ctypes.Structure):
    """``lk_linear``: a linear layer of a decoder and its low-rank update."""

    _fields_ = [
        *[(name, _POINTER) for name in ("weight", "absmax", "nested", "row_scale", "column_scale")],
        *[(name, _POINTER) for name in ("outlier_positions", "outlier_values", "bias", "a", "b", "output")],
        *[(name, _SIZE) for name in ("out", "in", "rank", "outliers")],
        ("scaling", _FLOAT),
    ]


class Norm(ctypes.Structure):
    """``lk_norm``: the weight and epsilon of an RMS norm; a null weight for no norm."""

    _fields_ = [("weight", _POINTER), ("eps", _FLOAT)]


class Layer(ctypes.Structure):
    """``lk_layer``: a decoder layer of the Llama family."""

    _fields_ = [
        *[(name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        *[(name, Norm) for name in ("before", "after", "of_q", "of_k")],
        *[(name, _SIZE) for name in ("heads", "kv_heads", "head_width")],
        ("scaling", _FLOAT),
    ]


class Update(ctypes.Structure):
    """``lk_update``: the low-rank update of a linear layer, as ``lk_pack_update`` lays it out."""

    _fields_ = [("codes", _POINTER), ("scale", _POINTER), ("output", _POINTER), ("rank", _SIZE)]


class Paged(ctypes.Structure):
    """``lk_paged``: rows of a step, each a token of a sequence whose keys and values lie in pages."""

    _fields_ = [
        *[(name, _POINTER) for name in ("layers", "keys", "values", "tables", "starts", "positions")],
        *[(name, _POINTER) for name in ("cosine", "sine", "updates")],
        *[(name, _SIZE) for name in ("count", "pages", "page_tokens", "n", "length", "rank")],
        ("amx", _INT),
    ]


class Heads(ctypes.Structure):
    """``lk_heads``: a tensor [total, heads, width] with its strides in floats."""

    _fields_ = [("data", _POINTER), ("token_stride", _SIZE), ("head_stride", _SIZE)]


class Attention(ctypes.Structure):
    """``lk_attention``: the shape, mask and scale of attention."""

    _fields_ = [
        *[(name, _SIZE) for name in ("heads", "kv_heads", "head_width", "window")],
        ("causal", _INT),
        ("scale", _FLOAT),
    ]


class TrainedLinear(ctypes.Structure):
    """``lk_trained_linear``: a frozen linear layer whose low-rank update may learn."""

    _fields_ = [
        ("linear", Linear),
        *[(name, _POINTER) for name in ("da", "db")],
        *[(name, _UINT32) for name in ("low", "high", "levels")],
        ("keep", _FLOAT),
        *[(name, _INT) for name in ("learns", "product")],
    ]


class TrainingLayer(ctypes.Structure):
    """``lk_training_layer``: a decoder layer of the Llama family in training."""

    _fields_ = [
        ("linears", TrainedLinear * LINEARS),
        *[(name, Norm) for name in ("before", "after")],
        ("attention", Attention),
        *[(name, _POINTER) for name in ("x", "cosine", "sine", "starts", "lengths", "packed", "seconds")],
        *[(name, _SIZE) for name in ("n", "samples")],
        *[(name, _INT) for name in ("activation", "narrow")],
    ]


#: Structs of ``abi.h`` by their names there.
STRUCTS = {
    "lk_linear": Linear,
    "lk_norm": Norm,
    "lk_layer": Layer,
    "lk_update": Update,
    "lk_paged": Paged,
    "lk_heads": Heads,
    "lk_attention": Attention,
    "lk_trained_linear": TrainedLinear,
    "lk_training_layer": TrainingLayer,
}

_HEADS, _ATTENTION, _TRAINING = map(ctypes.POINTER, (Heads, Attention, TrainingLayer))
_SAMPLES = [_POINTER, _POINTER, _SIZE]

#: Arguments of every function that returns nothing.
ARGUMENTS: dict[str, list[Any]] = {
    "lk_gemv_w8": [_POINTER] * 6 + [_SIZE] * 3,
    "lk_gated": [_POINTER] * 5 + [_SIZE, _INT],
    "lk_gated_backward": [_POINTER] * 5 + [_SIZE, _INT, _INT],
    "lk_rms_norm": [_POINTER] * 4 + [_SIZE] * 2 + [_FLOAT] * 2,
    "lk_rms_norm_backward": [_POINTER] * 5 + [_SIZE] * 2 + [_FLOAT],
    "lk_rotary": [_POINTER] * 4 + [_SIZE] * 3 + [_INT],
    "lk_dropout": [_POINTER] * 2 + [_SIZE] + [_UINT32] * 3 + [_FLOAT, _INT],
    "lk_cross_entropy": [_POINTER] * 3 + [_SIZE] * 2 + [_FLOAT, _INT],
    "lk_attention_forward": [*[_HEADS] * 4, _POINTER, *_SAMPLES, _ATTENTION],
    "lk_attention_backward": [*[_HEADS] * 5, _POINTER, *[_HEADS] * 3, *_SAMPLES, _ATTENTION],
    "lk_before_attention": [_POINTER] * 4 + [_SIZE] + [_POINTER] * 4 + [_SIZE],
    "lk_after_attention": [_POINTER] * 8 + [_SIZE] * 2,
    "lk_pack_a16": [_POINTER] * 4 + [_SIZE] * 2 + [_INT],
    "lk_gemm_w8a16": [_POINTER] * 7 + [_SIZE, _POINTER] + [_SIZE] * 3 + [_INT],
    "lk_pack_a16_amx": [_POINTER] * 4 + [_SIZE] * 2 + [_INT],
    "lk_gemm_w8a16_amx": [_POINTER] * 7 + [_SIZE, _POINTER] + [_SIZE] * 3,
    "lk_gemv_w8a16": [_POINTER] * 7 + [_SIZE] * 3,
    "lk_paged_layers": [ctypes.POINTER(Paged), _POINTER, _POINTER],
    "lk_pack_update": [_POINTER] * 2 + [_FLOAT] + [_POINTER] * 2 + [_SIZE] * 3,
    "lk_outlier_dgrad": [_POINTER] * 4 + [_SIZE] * 4,
    "lk_pack_a8_grouped": [_POINTER] * 5 + [_SIZE] * 2 + [_INT],
    "lk_gemm_w8a8_grouped_dgrad": [_POINTER] * 6 + [_SIZE] * 3,
    "lk_pack_a8_amx": [_POINTER] * 4 + [_SIZE] * 2 + [_INT],
    "lk_gemm_w8a8_amx_dgrad": [_POINTER] * 5 + [_SIZE] * 3,
    "lk_gemm_f32": [_POINTER] * 5 + [_SIZE] * 3 + [_INT] * 3,
    "lk_gemm_half": [_POINTER] * 5 + [_SIZE] * 3 + [_INT] * 2,
    "lk_gemm_half_amx": [_POINTER] * 5 + [_SIZE] * 3 + [_INT],
    "lk_gemv_half": [_POINTER] * 4 + [_SIZE] * 3 + [_INT],
    "lk_gemv_nf4": [_POINTER] * 6 + [_SIZE] * 3,
    "lk_gemm_nf4": [_POINTER] * 7 + [_SIZE] * 3 + [_INT],
    "lk_head_f32": [_POINTER] * 6 + [_SIZE] * 4 + [_FLOAT],
    "lk_training_forward": [_TRAINING] + [_POINTER] * 3,
    "lk_training_backward": [_TRAINING] + [_POINTER] * 4,
}
#: Arguments of every function that returns a size.
SIZE_ARGUMENTS: dict[str, list[Any]] = {
    "lk_abi": [ctypes.c_char_p],
    "lk_peak": [_INT, _SIZE],
    "lk_packed_a16_size": [_SIZE] * 2,
    "lk_packed_a16_rows": [_SIZE] * 2,
    "lk_paged_workspace": [ctypes.POINTER(Paged)],
    "lk_packed_update_size": [_SIZE] * 3,
    "lk_packed_a8_groups": [_SIZE] * 2,
    "lk_packed_a16_amx_size": [_SIZE] * 2,
    "lk_packed_a8_amx_groups": [_SIZE] * 2,
    "lk_packed_f32_size": [_SIZE],
    "lk_packed_half_amx_size": [_SIZE] * 2,
    "lk_head_f32_size": [_SIZE] * 3,
    "lk_training_kept": [_TRAINING],
    "lk_training_packed": [_TRAINING],
    "lk_training_workspace": [_TRAINING, _INT],
}
_AVX2_PREFIXES = (
    "lk_gemm",
    "lk_gemv_w8a16",
    "lk_gemv_half",
    "lk_head",
    "lk_pack",
    "lk_paged",
    "lk_outlier",
    "lk_training",
)
#: Functions that the library has on processors with AVX2 only.
AVX2_FUNCTIONS = frozenset(name for name in (*ARGUMENTS, *SIZE_ARGUMENTS) if name.startswith(_AVX2_PREFIXES))


def expected() -> Iterator[tuple[str, int]]:
    """Yield every name that ``abi.c`` must know, with the value, size or offset that Python uses."""
    yield from CONSTANTS.items()
    for name, struct in STRUCTS.items():
        yield name, ctypes.sizeof(struct)
        for field in struct._fields_:
            yield f"{name}.{field[0]}", getattr(struct, field[0]).offset


def bind(loaded: Any) -> Any:
    """Set the signatures of a loaded library, and compare its numbers and structs with those of this module.

    Raises:
        RuntimeError: C and Python disagree. That is a mistake in this package, not of the machine.
    """
    for name, arguments in (*ARGUMENTS.items(), *SIZE_ARGUMENTS.items()):
        if name in AVX2_FUNCTIONS and not hasattr(loaded, name):
            continue
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _SIZE if name in SIZE_ARGUMENTS else None
    loaded.lk_cpu_features.argtypes, loaded.lk_cpu_features.restype = [], ctypes.c_char_p
    loaded.lk_emulates_amx.argtypes, loaded.lk_emulates_amx.restype = [], _INT
    found = {name: loaded.lk_abi(name.encode()) for name, _ in expected()}
    wrong = [f"{name} is {found[name]} in C, {value} in Python" for name, value in expected() if found[name] != value]
    if wrong:
        raise RuntimeError(f"csrc/abi.h and cpu/abi.py disagree: {'; '.join(wrong)}")
    return loaded
