"""Makes kernels/tests/formats/: what other programs make of blocks and of rows.

    gcc -O2 -ffp-contract=off -fPIC -shared -I GGML/include -I GGML/src GGML/src/ggml-quants.c \
        -o libquants.so -Wl,--unresolved-symbols=ignore-all -lm
    python kernels/tests/make_formats.py libquants.so        # PyPI: gguf, numpy

GGML is `vendor/llama.cpp/ggml` of the source distribution of llama-cpp-python 0.3.36. Compiled so, its C
rounds every product, as it is written; a compiler that may fuse multiply-adds gives other bits.

rows.bin    five rows of 512 f32, then an importance for each column
NAME.bin    random blocks of 512 elements; what `gguf.quants.dequantize` makes of them; the rows quantised by
            GGML without importance, and with it
"""

import ctypes
import pathlib
import sys

import gguf
import numpy as np

COLUMNS, ROWS = 512, 5
HALVES = {
    "q8_0": [0], "q6_k": [208], "q5_k": [0, 2], "q5_1": [0, 2], "q5_0": [0], "q4_k": [0, 2], "q4_1": [0, 2],
    "q4_0": [0], "iq4_nl": [0], "iq4_xs": [0], "q3_k": [108], "q2_k": [80, 82],
}
TO = pathlib.Path(__file__).parent / "formats"


def rows(rng):
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) * np.float32(0.05)
    # An outlier; only positive numbers; runs of zeros, of tiny and of equal numbers; a few large ones.
    x[1, 100], x[1, 300] = 1.5, -2.25
    x[2] = np.abs(x[2]) + np.float32(0.01)
    x[3, :256], x[3, 256:272], x[3, 272:304], x[3, 320:352] = 0, 1e-20, 0.125, -0.5
    x[4] = rng.laplace(size=COLUMNS).astype(np.float32) ** 3
    return x


def quantize(c, name, x, importance):
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    out = ctypes.create_string_buffer(x.size // elements * size)
    pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p)
    if name == "iq4_nl" or name == "iq4_xs":
        weights = pointer(importance) if importance is not None else None
        getattr(c, f"quantize_{name}")(pointer(x), out, 1, ctypes.c_int64(x.size), weights)
    elif importance is None or name == "q8_0":
        getattr(c, f"quantize_row_{name.replace('_k', '_K')}_ref")(pointer(x), out, ctypes.c_int64(x.size))
    else:
        # ggml_row_size, which these functions call, is not in the library: one row needs no right answer.
        getattr(c, f"quantize_{name.replace('_k', '_K')}")(
            pointer(x), out, 1, ctypes.c_int64(x.size), pointer(importance)
        )
    return out.raw


def main(library):
    c = ctypes.CDLL(library)
    rng = np.random.default_rng(4)
    x = rows(rng)
    importance = rng.gamma(0.5, size=COLUMNS).astype(np.float32)
    TO.mkdir(exist_ok=True)
    (TO / "rows.bin").write_bytes(x.tobytes() + importance.tobytes())
    for name, halves in HALVES.items():
        kind = getattr(gguf.GGMLQuantizationType, name.upper())
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (COLUMNS // elements, size), dtype=np.uint8)
        for at in halves:
            scales = rng.normal(0, 0.01, len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        widened = gguf.quants.dequantize(blocks.reshape(1, -1), kind).astype(np.float32)
        assert widened.size == COLUMNS
        plain = b"".join(quantize(c, name, row.copy(), None) for row in x)
        if name in ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]:
            assert plain == gguf.quants.quantize(x, kind).tobytes(), name
        weighted = b"".join(quantize(c, name, row.copy(), importance) for row in x)
        (TO / f"{name}.bin").write_bytes(blocks.tobytes() + widened.tobytes() + plain + weighted)


main(sys.argv[1])
