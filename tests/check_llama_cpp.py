"""Lets llama.cpp run GGUF files that are written here, and runs here what llama.cpp's own tools make.

    pip install llama-cpp-python numpy safetensors
    python tests/check_llama_cpp.py --strata target/release/strata [--llama-cpp DIR] [--quantize PROGRAM] [NAME ...]

Each case is a checkpoint: the demonstration model or a golden. `strata convert` writes its GGUF file, in F32
for goldens and as it is for the demonstration model; llama.cpp loads it through its Python package and
says the logits of a prompt's last position and 16 greedy tokens, which are compared with those of strata on the
checkpoint. The demonstration model is also written with each of QUANTISED. A golden whose prompt
strata continues by a near tie may end with another token: the line then says how near.

With `--llama-cpp`, the source folder of llama.cpp, and `--quantize`, its llama-quantize, its own
files of the demonstration model are run by both: of its converter in BF16 and of its quantiser. The
converter needs torch and transformers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
DEMO = ROOT.parent / "model-cards" / "demo"
COUNT = 16

# Goldens that llama.cpp can run, by the name of their folders, and the keys of config.json that are changed.
CASES = {
    "demo": {},
    "jamba/moe-shards": {},
    "jamba/dense-tied-bf16": {},
    "jamba/fused-experts": {},
    "jamba/published-config": {},
    "mamba/tied": {},
    "mamba2/tied": {},
    "granite-moe-hybrid/dense-nope": {},
    "nemotron-h/moe-groups-shards": {},
    "falcon-h1/norm-groups-shards": {},
    "falcon-h1/rope-linear": {},
    # llama.cpp knows no window.
    "plamo2/step4-untied": {"attention_window_size": 1048576},
    "plamo2/window": {"attention_window_size": 1048576},
}
QUANTISED = ["q8_0", "q4_k_m"]

# llama.cpp rounds keys and values to F16, the inputs of BF16 products to BF16, and those of blocks to blocks
# of its own. In standard deviations of the logits.
TOLERANCE = {"f32": 0.02, "bf16": 0.1, "blocks": 0.6}


def llama(path, ids):
    """The last position's logits, and greedy tokens. In a process of its own: it may abort."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", str(path), json.dumps(ids)],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
        raise RuntimeError((said or lines or ["it ended"])[0])
    logits, tokens = json.loads(done.stdout.decode().splitlines()[-1])
    return np.array(logits, np.float32), tokens


def run(path, ids):
    from llama_cpp import Llama

    model = Llama(path, n_ctx=512, n_threads=2, logits_all=True, verbose=True)
    model.eval(ids)
    logits = np.array(model.scores[len(ids) - 1])
    tokens = [int(logits.argmax())]
    while len(tokens) < COUNT:
        model.eval(tokens[-1:])
        tokens.append(int(np.array(model.scores[len(ids) + len(tokens) - 1]).argmax()))
    print()
    print(json.dumps([logits.tolist(), tokens]))


def strata(args, model, ids, *flags):
    """The same of strata: the logits before every greedy token, and the tokens."""
    from safetensors.numpy import load_file

    def call(command, ids, *more):
        text = ",".join(map(str, ids))
        line = [args.strata, command, str(model), "--token-ids", text, *more, *flags]
        return subprocess.run(line, check=True, capture_output=True).stdout

    greedy = ["--temperature", "0", "--max-tokens", str(COUNT), "--ignore-eos", "--json"]
    tokens = json.loads(call("generate", ids, *greedy))["token_ids"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.safetensors"
        call("logits", ids + tokens, "--output", str(out))
        return load_file(out)["logits"][len(ids) - 1 :], tokens


def prompt(folder):
    from safetensors.numpy import load_file

    if folder == DEMO:
        return [55, 84, 35, 53, 35, 46, 35, 54, 66]
    return load_file(folder / "golden.safetensors")["token_ids"][0].tolist()[:24]


def compare(name, rows, ours, logits, theirs, tolerance):
    worst = float(np.abs(rows[0] - logits).max() / rows[0].std())
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), COUNT)
    line = f"{name:44} logits within {worst:.1e}, {same} of {COUNT} greedy tokens"
    good = worst < tolerance
    if same < COUNT:
        best = np.sort(rows[same])
        tie = float((best[-1] - best[-2]) / rows[same].std())
        line += f", then a tie within {tie:.1e}"
        good &= tie < tolerance
    print(line if good else f"{line}  DIFFERENT", flush=True)
    return good


def check(args, name, folder, path, tolerance, *flags, model=None):
    ids = prompt(folder)
    rows, ours = strata(args, model or folder, ids, "--dtype", "f32", *flags)
    try:
        logits, theirs = llama(path, ids)
    except (RuntimeError, subprocess.TimeoutExpired) as why:
        print(f"{name:44} llama.cpp: {why}", flush=True)
        return False
    return compare(name, rows, ours, logits, theirs, TOLERANCE[tolerance])


def changed(folder, keys, room):
    if not keys:
        return folder
    copy = room / "-".join(folder.parts[-2:])
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **keys}))
    return copy


def written(args, folder, out, *flags):
    command = [args.strata, "convert", str(folder), str(out), "--force", *flags]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        return done.stderr.decode().strip().splitlines()[-1]
    return None


def main():
    if sys.argv[1:2] == ["--run"]:
        return run(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strata", default=str(ROOT.parent / "target/release/strata"))
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--quantize")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        for name in args.names or CASES:
            folder = DEMO if name == "demo" else changed(ROOT / "golden" / name, CASES.get(name), room)
            out = room / f"{name.replace('/', '-')}.gguf"
            flags = [] if name == "demo" else ["--dtype", "f32"]
            why = written(args, folder, out, *flags)
            if why:
                print(f"{name:44} not written: {why}", flush=True)
                good = False
                continue
            good &= check(args, name, folder, out, "bf16" if name == "demo" else "f32")
        if not args.names or "demo" in args.names:
            for quantised in QUANTISED:
                out = room / f"demo-{quantised}.gguf"
                good &= written(args, DEMO, out, "--quantize", quantised) is None
                good &= check(args, f"demo, {quantised}", DEMO, out, "blocks", model=out)
        if args.llama_cpp:
            good &= own(args, room)
    sys.exit(0 if good else 1)


def own(args, room):
    """Files of llama.cpp's converter and quantiser; without the vocabulary, which has no merges, as which
    llama.cpp does not load what its converter writes."""
    plain = room / "theirs.gguf"
    script = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; import conversion, convert_hf_to_gguf; "
        "conversion.load_all_models(); c = conversion.get_model_class(sys.argv[2])\n"
        "def vocab(self): self._set_vocab_none(); self.gguf_writer.add_vocab_size(self.hparams['vocab_size'])\n"
        "c.set_vocab = vocab; sys.argv = ['x', *sys.argv[3:]]; convert_hf_to_gguf.main()"
    )
    architecture = json.loads((DEMO / "config.json").read_text())["architectures"][0]
    command = [sys.executable, "-c", script, str(args.llama_cpp), architecture, str(DEMO), "--outtype", "bf16", "--outfile"]
    subprocess.run([*command, str(plain)], check=True, capture_output=True, env={**os.environ, "NO_LOCAL_GGUF": "1"})
    good = check(args, "demo, llama.cpp's converter, bf16", DEMO, plain, "bf16", model=plain)
    for kind in ["Q8_0", "Q4_K_M"] if args.quantize else []:
        out = room / f"theirs-{kind}.gguf"
        subprocess.run([args.quantize, str(plain), str(out), kind], check=True, capture_output=True)
        good &= check(args, f"demo, llama.cpp's quantiser, {kind.lower()}", DEMO, out, "blocks", model=out)
    return good


if __name__ == "__main__":
    main()
