"""Seeds for the fuzzers: what the project holds of each format, whole and in small pieces."""

import json
import re
import struct
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent.parent
name, out = sys.argv[1], Path(sys.argv[2])

PLAN = """plan: 1
name: t
vocab: 16
d_model: 8
context: 64
init_std: 0.02
embed: {scale: 2.0}
shared:
  s0:
    - concat: [x, x0]
    - norm: {eps: 1.0e-5, name: first}
    - attention: {heads: 2, kv_heads: 2, head_dim: 8, window: 4, rope: {theta: 10000, dims: 4}}
    - linear: {name: narrow, d_out: 8, bias: true}
    - norm: {name: ff_norm, eps: 1.0e-5}
    - mlp: {d_ff: 12, act: gelu}
blocks:
  h:
    - let: {t: [use: s0, linear: {}]}
    - residual: [add: t, norm: {eps: 1.0e-5}, mamba1: {d_inner: 16, d_state: 4, d_conv: 4, dt_rank: 2, conv_bias: true, bias: false, inner_norm: {eps: 1.0e-6, weight: true}}]
  p:
    - residual:
        - norm: {eps: 1.0e-5}
        - parallel:
            - [attention: {heads: 2, kv_heads: 1, head_dim: 4}]
            - [mlp: {d_ff: 16, act: silu}, scale: {by: 0.5}]
  e: [residual: [norm: &n {eps: 1.0e-6}, moe: {experts: 4, top_k: 2, d_ff: 20, act: silu, router: {score: softmax, normalize: false}}]]
stack: [h, p*2, h@0, e*2@3]
head: {norm: *n, tie: false, scale: 0.5}
"""


def rust_texts():
    """Texts of the tests: what was thought of by hand."""
    for path in [*root.glob("layers/src/*.rs"), *root.glob("converters/**/*.rs"), *root.glob("engine/src/**/*.rs")]:
        for text in re.findall(r'(?s)r#"(.*?)"#|"((?:[^"\\]|\\.)*)"', path.read_text()):
            yield text[0] or text[1].replace("\\n", "\n").replace('\\"', '"').replace("\\\n", "")


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


seeds = []
if name == "plan":
    seeds += [PLAN, *(t for t in rust_texts() if "d_model:" in t)]
    lines = PLAN.splitlines(keepends=True)
    seeds += ["".join(lines[:i] + lines[i + 1 :]) for i in range(len(lines))]
elif name == "card":
    cards = [p.read_text() for p in root.glob("model-cards/*.yaml")]
    seeds += [*cards, *(t for t in rust_texts() if "card: 1" in t)]
    seeds += [re.sub(r"(?m)^ *#.*\n", "", c) for c in cards]
elif name == "config":
    seeds += [p.read_text() for p in root.glob("tests/golden/*/*/config.json")]
    seeds += [p.read_text() for p in root.glob("model-cards/*/config.json")]
    seeds += [t for t in rust_texts() if t.startswith("{")]
elif name == "gguf":
    # Without tensors' bytes: the headers are what is read.
    seeds += [p.read_bytes()[:16384] for p in root.glob("tests/golden/gguf/*.gguf")]
    texts = {"general.architecture": "mamba", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    text = lambda t: struct.pack("<Q", len(t)) + t.encode()
    entries = [text(k) + struct.pack("<I", 8) + text(v) for k, v in texts.items()]
    tokens = struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    entries.append(text("tokenizer.ggml.tokens") + tokens)
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 2, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entries) + tensor
    seeds.append(head + bytes(-len(head) % 32 + 32))
elif name == "safetensors":
    for path in root.glob("tests/golden/**/*.safetensors"):
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        seeds.append(data[: 8 + length])
    f = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    seeds += [
        safetensors({"a": f}, bytes(8)),
        safetensors({"__metadata__": {"a": "b"}, "a": f, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]}}, bytes(12)),
        safetensors({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)),
        safetensors({"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, bytes(1)),
        safetensors({"a": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}),
    ]
elif name == "index":
    seeds += [p.read_text() for p in root.glob("tests/golden/**/*.index.json")]
    seeds += ['{"metadata": {}, "weight_map": {"a": "b.safetensors"}}']
elif name in ("pytorch", "pickle"):
    import zipfile
    for path in [*root.glob("tests/pytorch/**/*.pt"), *root.glob("tests/pytorch/**/*.bin")]:
        data = path.read_bytes()
        if name == "pytorch":
            seeds.append(data)
        elif zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            seeds += [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
for i, seed in enumerate(seeds):
    data = seed if isinstance(seed, bytes) else seed.encode()
    (out / f"seed-{i}").write_bytes(data)
