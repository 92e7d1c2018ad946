"""GGUF files of small checkpoints, by llama.cpp's own converter and quantiser.

    python tests/make_gguf_golden.py --llama-cpp DIR [--quantize PROGRAM] [--logits PROGRAM] [NAME ...]

DIR is the source folder of llama.cpp (its `conversion` is used), PROGRAM its `llama-quantize`; `--logits`
is a program that is called as `PROGRAM model.gguf OUT ID ID ...` and writes the logits of the last
position as f32, which are kept as llama.cpp's word. It needs torch, transformers, numpy, safetensors.

Each case is a golden of `tests/golden`, perhaps with other keys in its config.json: GGUF cannot say
everything. Only the vocabulary is left out (tokenizer model "none"), unless the case has one.
`tests/golden/gguf/<case>.gguf` comes with `<case>.json`: which golden it is, the keys that were changed,
and llama.cpp's logits, where llama.cpp runs such a model.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent
OUT = ROOT / "golden" / "gguf"

# name: (golden, changed keys, type of the matrices)
CASES = {
    "jamba": ("jamba/moe-shards", {}, "f32"),
    "jamba-dense": ("jamba/dense-tied-bf16", {}, "bf16"),
    "mamba": ("mamba/tied", {}, "f32"),
    "mamba2": ("mamba2/tied", {}, "f32"),
    "falcon-mamba": ("falcon-mamba/wide-expand", {}, "f32"),
    # The converter knows no "auto".
    "granite-dense": ("granite-moe-hybrid/dense-nope", {"mamba_d_head": 8}, "f32"),
    # Rotated positions beside Mamba-2 are what the converter never says.
    "granite-moe": (
        "granite-moe-hybrid/moe-rope-shards",
        {"position_embedding_type": "nope", "layer_types": ["mamba", "attention", "mamba", "mamba"]},
        "f32",
    ),
    "granite-attention": ("granite-moe-hybrid/attention-only", {"num_key_value_heads": 3}, "bf16"),
    # A key that only the converter's checks read.
    "nemotron-dense": ("nemotron-h/dense", {"mamba_d_head": 8}, "f32"),
    # How many groups of experts are chosen is not told.
    "nemotron-moe": ("nemotron-h/moe-groups-shards", {"n_group": 1, "topk_group": 1, "mamba_d_head": 6}, "f32"),
    "nemotron-latent": ("nemotron-h/latent-experts", {"mamba_d_head": 10}, "f32"),
    "nemotron-puzzle": ("nemotron-h/puzzle", {"mamba_d_head": 8}, "f16"),
    "falcon-h1": ("falcon-h1/norm-groups-shards", {}, "f32"),
    # llama.cpp knows no window.
    "plamo2": ("plamo2/step4-untied", {"attention_window_size": 1048576}, "f32"),
}


def converter(source):
    sys.path.insert(0, str(source))
    sys.path.insert(1, str(source / "gguf-py"))
    import conversion

    conversion.load_all_models()
    return conversion


def without_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


def with_bytes(self):
    """A vocabulary over bytes, with whatever way to cut words: this one has no merges."""
    self.get_vocab_base_pre = lambda tokenizer: "gpt-2"
    self._set_vocab_gpt2()


def convert(args, folder, outtype, out, vocabulary, *flags):
    import conversion
    import convert_hf_to_gguf

    config = json.loads((folder / "config.json").read_text())
    conversion.get_model_class(config["architectures"][0]).set_vocab = vocabulary
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", outtype, "--outfile", str(out), *flags]
    if config.get("num_nextn_predict_layers"):
        sys.argv.append("--no-mtp")
    convert_hf_to_gguf.main()


def tokens_of(golden):
    from safetensors.numpy import load_file

    return load_file(ROOT / "golden" / golden / "golden.safetensors")["token_ids"][0].tolist()


def last_logits(args, gguf, tokens):
    """llama.cpp's logits, if it runs the model."""
    if args.logits is None:
        return None
    with tempfile.NamedTemporaryFile() as file:
        command = [args.logits, str(gguf), file.name, *map(str, tokens)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode != 0:
            print("llama.cpp:", done.stderr.decode(errors="replace").strip().splitlines()[-3:])
            return None
        return np.fromfile(file.name, np.float32)


def case(args, name):
    golden, changed, outtype = CASES[name]
    source = ROOT / "golden" / golden
    out = OUT / f"{name}.gguf"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for file in source.iterdir():
            if file.is_file() and file.name != "golden.safetensors":
                shutil.copy(file, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        config.update(changed)
        (folder / "config.json").write_text(json.dumps(config))
        convert(args, folder, outtype, out, without_vocabulary)
    told = {"golden": golden, "changed": changed}
    # The converter computes with the elements' own type: A of an F16 checkpoint is rounded to F16.
    halves = json.loads((source / "config.json").read_text())
    if "float16" in (halves.get("dtype"), halves.get("torch_dtype")):
        told["tolerance"] = 0.02
    tokens = tokens_of(golden)
    # llama.cpp has one eps for all norms of FalconMamba, which counts where values are as small as here, and
    # does not come back from loading this PLaMo-2.
    logits = None if name in ("falcon-mamba", "plamo2") else last_logits(args, out, tokens)
    if logits is not None:
        told["tokens"] = tokens
        told["logits"] = [float(f"{x:.6g}") for x in logits]
    (OUT / f"{name}.json").write_text(json.dumps(told) + "\n")


# Of each tensor of the mixed file, the format. Between them they have all that are run in blocks; small
# matrices have the larger ones, as rows of blocks of 256 make the smallest file large.
MIXED = {
    "token_embd": "q8_0",
    "blk.0.ssm_in": "q2_k",
    "blk.0.ssm_out": "iq4_nl",
    "blk.0.ssm_x": "q5_0",
    "blk.0.ffn_gate": "q4_k",
    "blk.0.ffn_up": "q5_k",
    "blk.0.ffn_down": "q4_0",
    "blk.1.attn_q": "iq4_xs",
    "blk.1.attn_k": "q6_k",
    "blk.1.attn_v": "q5_1",
    "blk.1.attn_output": "q4_1",
    "blk.1.ffn_gate_exps": "q2_k",
    "blk.1.ffn_up_exps": "q3_k",
    "blk.1.ffn_down_exps": "q2_k",
}


def mixed(args):
    """A model with a matrix of each format, by llama.cpp's quantiser. What it should say is what
    transformers says of the weights as gguf-py widens them."""
    import torch
    from safetensors.torch import save_file
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(5)
    config = JambaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, mamba_dt_rank=8, mamba_expand=1, initializer_range=0.06, use_mamba_kernels=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = JambaForCausalLM(config).eval()
    plain, out = OUT / "mixed-f32.gguf", OUT / "mixed.gguf"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_pretrained(folder)
        # One tensor an expert, as the converter wants them.
        from safetensors.torch import load_file

        tensors = {}
        for name, x in load_file(folder / "model.safetensors").items():
            if name.endswith("experts.gate_up_proj"):
                for e in range(x.shape[0]):
                    gate, up = x[e].chunk(2)
                    base = name.removesuffix("gate_up_proj")
                    tensors[f"{base}{e}.gate_proj.weight"] = gate.clone()
                    tensors[f"{base}{e}.up_proj.weight"] = up.clone()
            elif name.endswith("experts.down_proj"):
                for e in range(x.shape[0]):
                    tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = x[e].clone()
            else:
                tensors[name] = x
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        convert(args, folder, "f32", plain, without_vocabulary)
    types = [word for name, kind in MIXED.items() if name != "token_embd" for word in ("--tensor-type", f"{name}={kind}")]
    subprocess.run([args.quantize, *types, "--token-embedding-type", "q8_0", str(plain), str(out), "q8_0"], check=True)
    plain.unlink()

    import gguf

    found = {t.name: t for t in gguf.GGUFReader(out).tensors}
    for name, kind in MIXED.items():
        assert found[name + ".weight"].tensor_type.name.lower() == kind, (name, found[name + ".weight"].tensor_type)

    def widened(name):
        t = found[name]
        return torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32))

    ours = {
        "model.embed_tokens.weight": widened("token_embd.weight"),
        "lm_head.weight": widened("token_embd.weight"),
    }
    state = model.state_dict()
    for i, names in (
        (0, {"mamba.in_proj": "ssm_in", "mamba.out_proj": "ssm_out", "mamba.x_proj": "ssm_x",
             "mamba.dt_proj": "ssm_dt",
             "feed_forward.gate_proj": "ffn_gate", "feed_forward.up_proj": "ffn_up",
             "feed_forward.down_proj": "ffn_down"}),
        (1, {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "feed_forward.router": "ffn_gate_inp"}),
    ):  # fmt: skip
        for theirs, name in names.items():
            ours[f"model.layers.{i}.{theirs}.weight"] = widened(f"blk.{i}.{name}.weight")
    gate, up = widened("blk.1.ffn_gate_exps.weight"), widened("blk.1.ffn_up_exps.weight")
    ours["model.layers.1.feed_forward.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
    ours["model.layers.1.feed_forward.experts.down_proj"] = widened("blk.1.ffn_down_exps.weight")
    for name, x in ours.items():
        assert state[name].shape == x.shape, (name, state[name].shape, x.shape)
        state[name].copy_(x)
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"token_ids": tokens, "logits": logits.contiguous()}, OUT / "mixed.safetensors")


def tokenizers(args):
    """The tokenizers of `golden/text` and of the demonstration model, as metadata alone."""
    import gguf

    demo = ROOT.parent / "model-cards" / "demo"
    convert(args, demo, "bf16", OUT / "text-demo.gguf", with_bytes, "--vocab-only")

    for name, model in (("byte_level", "gpt2"), ("sentencepiece", "llama")):
        source = json.loads((ROOT / "golden" / "text" / name / "tokenizer.json").read_text())
        special = {t["id"]: t for t in source["added_tokens"]}
        vocab = {**source["model"]["vocab"], **{t["content"]: i for i, t in special.items()}}
        tokens = sorted(vocab, key=vocab.get)
        merges = source["model"]["merges"]
        kinds = [
            2 if t == "<unk>" else 3 if i in special else 6 if t.startswith("<0x") else 1
            for i, t in enumerate(tokens)
        ]
        writer = gguf.GGUFWriter(OUT / f"text-{name}.gguf", "none")
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        if model == "gpt2":
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges([" ".join(m) for m in merges])
        else:
            # The earlier a token is made the better it is; those that no merge makes come last.
            made = {}
            for rank, (a, b) in enumerate(merges):
                made.setdefault(a + b, rank)
            writer.add_token_scores([-float(made.get(t, 10**6)) for t in tokens])
            writer.add_add_bos_token(True)
        writer.add_bos_token_id(vocab["<s>"])
        writer.add_eos_token_id(vocab["</s>"])
        writer.add_unk_token_id(vocab["<unk>"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--quantize")
    parser.add_argument("--logits")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    converter(args.llama_cpp)
    OUT.mkdir(exist_ok=True)
    for name in args.names or [*CASES, "mixed", "tokenizers"]:
        if name == "mixed":
            mixed(args)
        elif name == "tokenizers":
            tokenizers(args)
        else:
            case(args, name)


if __name__ == "__main__":
    main()
