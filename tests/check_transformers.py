"""Lets transformers load what `strata convert` writes, and compares logits.

    pip install torch transformers safetensors compressed-tensors
    python tests/check_transformers.py --strata target/release/strata [NAME ...]

Each model, the demonstration model or a golden, is converted as it is, to F32, to shards, to int8, and by edited plans: without
a block, with its blocks in another order, with one twice. transformers loads the folder; its logits in F32
are compared with those of strata on the same folder. Where config.json cannot say an edited stack, which
strata then says, transformers is not asked.

Of int8 the weights are compared: the rounding of inputs, which config.json says too, is switched off in transformers, as
`--dtype f32` does here. Experts that a family publishes one by one are put together by transformers while it loads, which it does not do with scales.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent
MODELS = [
    "demo",
    "jamba/moe-shards",
    "mamba/tied",
    "mamba2/tied",
    "falcon-mamba/wide-expand",
    "falcon-h1/norm-groups-shards",
    "granite-moe-hybrid/dense-nope",
    "bamba/half-rotary-shards",
    "nemotron-h/moe-groups-shards",
]
# transformers does not load their experts in int8.
APART = ["demo", "jamba/moe-shards", "nemotron-h/moe-groups-shards"]
# In standard deviations of the logits.
TOLERANCE = 1e-4
IDS = list(range(3, 27))


def call(args, *words):
    done = subprocess.run([args.strata, *map(str, words)], capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode().strip().splitlines()[-1])
    return done.stdout.decode() + done.stderr.decode()


def difference(args, folder, room):
    out = room / "logits.safetensors"
    call(args, "logits", folder, "--dtype", "f32", "--token-ids", ",".join(map(str, IDS)), "--output", out)
    ours = load_file(out)["logits"]
    config = json.loads((folder / "config.json").read_text())
    # The class that the weights are of: some goldens have another model_type.
    kind = getattr(transformers, config["architectures"][0])
    model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    lost = {k: v for k, v in told.items() if v and "mismatched" not in k} | dict(mismatched=told["mismatched_keys"])
    lost = {k: sorted(v) for k, v in lost.items() if v}
    for module in model.modules():
        # What rounds inputs in int8.
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
        # Bounds of dt that transformers sets to prompts of Nemotron-H, and training did not.
        if hasattr(module, "time_step_limit") and config["model_type"] == "nemotron_h":
            module.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([IDS]), use_cache=False).logits[0]
    return float((ours - theirs).abs().max() / theirs.std()), lost


def edits(plan):
    """Edited plans, by what is done."""
    head, stack, rest = plan.partition("stack:\n")[0], [], ""
    for line in plan.partition("stack:\n")[2].splitlines():
        if line.startswith("  - ") and not rest:
            stack.append(line)
        else:
            rest += line + "\n"

    def made(stack):
        used = {place.removeprefix("  - ").split("@")[0] for place in stack}
        lines, keep, inside = [], True, False
        for line in head.splitlines():
            if not line.startswith(" "):
                inside, keep = line.startswith("blocks:"), True
            elif inside and line.startswith("  ") and line[2] != " ":
                keep = line.strip().rstrip(":") in used
            if keep:
                lines.append(line)
        return "\n".join([*lines, "stack:", *stack, rest])

    yield "without the first", made(stack[1:])
    yield "without the last", made(stack[:-1])
    yield "last block first", made([stack[-1], *stack[:-1]])
    yield "first block twice", made([stack[0], *stack])
    yield "all twice", made(stack + stack)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strata", default=str(ROOT.parent / "target/release/strata"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    good = True
    for name in args.names or MODELS:
        source = ROOT.parent / "model-cards" / "demo" if name == "demo" else ROOT / "golden" / name
        with tempfile.TemporaryDirectory() as room:
            room = Path(room)
            ways = [("copy", []), ("f32", ["--dtype", "f32"]), ("shards", ["--shard-size", "40KB"])]
            if name not in APART:
                ways.append(("int8", ["--quantize", "int8"]))
            for i, (way, plan) in enumerate(edits(call(args, "plan", "show", source))):
                file = room / f"{i}.yaml"
                file.write_text(plan)
                ways.append((way, ["--plan", file]))
            for i, (way, flags) in enumerate(ways):
                to = room / f"model{i}"
                line = f"{name:32} {way:20}"
                try:
                    said = call(args, "convert", source, to, *flags)
                except RuntimeError as why:
                    print(f"{line} not converted: {why}", flush=True)
                    good = False
                    continue
                if (to / "plan.yaml").exists():
                    print(f"{line} config.json cannot say it", flush=True)
                    continue
                files = len(list(to.glob("*.safetensors")))
                keys = [part for part in said.splitlines() if "new values of" in part]
                line += f" {files} files" if files > 1 else ""
                line += f" ({keys[0].split('new values of ')[1]})" if keys else ""
                try:
                    worst, lost = difference(args, to, room)
                except Exception as why:  # what transformers refuses is what is asked
                    print(f"{line} transformers: {str(why).splitlines()[0]}", flush=True)
                    good = False
                    continue
                fine = worst < TOLERANCE and not lost
                good &= fine
                print(f"{line} within {worst:.1e}{'' if fine else f'  DIFFERENT {json.dumps(lost)[:300]}'}", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
