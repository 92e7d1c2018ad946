"""The whole comparison with llama.cpp on one CPU, and what has no counterpart there; writes the tables into BENCHMARKS.md.

    python tests/bench_table.py --work FOLDER --llama-bench PATH/llama-bench            # hours, on a quiet machine
    python tests/bench_table.py --work FOLDER --rows mamba-130m-bf16 --turns 1 --prompt 16 --generate 4 --write no
    python tests/bench_table.py --work FOLDER --render                                  # from results that are there

Every row is a published shape with random weights: `strata convert --random 1` draws a folder, `strata convert`
makes a GGUF file of it, in blocks where the row says so, and both programs run that file, in turn, as
tests/bench_peer.py has it: Strata, llama.cpp, Strata, … A file that llama.cpp refuses is timed here alone, with its
reason. Each row's numbers are kept as FOLDER/results/ROW.json, with all that was run: a row that is there is not run
again unless --again, so a run that was stopped goes on. Models are removed after their last row unless --keep.

`--list` names the rows. Those of the first table: shapes. Those of the second: `length` (prefill behind 65,536 tokens),
`batch` (eight sequences together), `start` (the first token of eight), `sharing` (beside a process that is busy on one
processor), and, only if it is named, `whole` (a prompt of 262,144 tokens). The tables go between the marks in BENCHMARKS.md, with the machine, the dates and the versions.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import types

import bench_peer

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "model-cards/configs"
BEGIN, END = "<!-- bench_table: begin -->", "<!-- bench_table: end -->"

# Name: a published config, and what is changed of it.
SHAPES = {
    "jamba-3b": ("Jamba-Reasoning-3B, tied", "jamba-reasoning-3b", {"tie_word_embeddings": True}),
    "jamba-1b-moe": (
        "Jamba pattern, 16 layers, 8 experts, top 2",
        "jamba-reasoning-3b",
        {
            "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 16,
            "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "mamba_dt_rank": 64,
            "attn_layer_period": 8, "attn_layer_offset": 4,
        },
    ),
    "mamba-130m": ("mamba-130m", "mamba-130m-hf", {}),
    "mamba2-130m": ("mamba2-130m", "mamba2-130m-hf", {}),
    "granite-350m": ("Granite-4.0-H-350m", "granite-4.0-h-350m", {}),
    "nemotron-1b": (
        "Nemotron-H pattern, 30 layers",
        "nemotron-h-4b",
        {
            "hidden_size": 1536, "intermediate_size": 6144, "mamba_num_heads": 48, "num_hidden_layers": 30,
            "num_attention_heads": 12, "num_key_value_heads": 4,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        },
    ),
}

# Shape, recipe (none is BF16), least ratios of prefill and decode, least percents of the limits.
ROWS = {
    "jamba-3b-bf16": ("jamba-3b", None, (2.0, 1.0), (60, 90)),
    "jamba-3b-q8_0": ("jamba-3b", "q8_0", (2.2, 1.0), (None, 88)),
    "jamba-3b-q4_k_m": ("jamba-3b", "q4_k_m", (1.6, 1.0), (None, 80)),
    "jamba-1b-moe-bf16": ("jamba-1b-moe", None, (1.5, 1.05), (None, None)),
    "jamba-1b-moe-q4_k_m": ("jamba-1b-moe", "q4_k_m", (1.5, 1.05), (None, None)),
    "mamba-130m-bf16": ("mamba-130m", None, (4.0, 1.2), (None, None)),
    "mamba2-130m-bf16": ("mamba2-130m", None, (2.0, 1.2), (None, None)),
    "granite-350m-bf16": ("granite-350m", None, (1.5, 1.0), (None, None)),
    "granite-350m-q4_k_m": ("granite-350m", "q4_k_m", (1.5, 1.0), (None, None)),
    "nemotron-1b-bf16": ("nemotron-1b", None, (1.5, 1.0), (None, None)),
    "nemotron-1b-q4_k_m": ("nemotron-1b", "q4_k_m", (1.5, 1.0), (None, None)),
}


def say(text):
    print(f"bench_table: {text}", file=sys.stderr, flush=True)


def tool(args, *words):
    """Runs strata; what it prints. The message of one that fails is an error here."""
    command = [str(args.strata), *map(str, words)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench_table: {shlex.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def folder_of(args, shape):
    """A folder of random weights in a shape."""
    _, base, changes = SHAPES[shape]
    folder = args.work / shape
    config = args.work / f"{shape}.json"
    text = json.dumps({**json.loads((CONFIGS / f"{base}.json").read_text()), **changes}, indent=1)
    if folder.exists() and config.exists() and config.read_text() == text:
        return folder
    config.write_text(text)
    say(f"drawing {shape}")
    tool(args, "convert", config, folder, "--random", 1, "--dtype", "bf16", "--force")
    return folder


def file_of(args, shape, recipe):
    """Its GGUF file."""
    file = args.work / f"{shape}-{recipe or 'bf16'}.gguf"
    folder = folder_of(args, shape)
    if not file.exists() or file.stat().st_mtime < folder.stat().st_mtime:
        say(f"writing {file.name}")
        tool(args, "convert", folder, file, "--force", *(["--quantize", recipe] if recipe else []))
    return file


def measured(args, run):
    """What a way to run gives; the message where it ends the program."""
    try:
        return run(args), None
    except SystemExit as error:
        return None, str(error)


def row(args, name):
    shape, recipe, _, _ = ROWS[name]
    file = file_of(args, shape, recipe)
    words = {
        "strata": args.strata, "model": str(file), "gguf": file, "llama_bench": args.llama_bench, "depth": 0,
        "threads": args.threads, "prompt": args.prompt, "generate": args.generate, "repeat": args.repeat,
        "strata_args": "", "llama_args": "",
    }
    each = types.SimpleNamespace(**words)
    size = bench_peer.read_once(file)
    turns, refused = [], None
    for turn in range(args.turns):
        ours = bench_peer.strata(each)
        theirs = None
        if refused is None:
            theirs, refused = measured(each, bench_peer.llama)
        turns.append({"strata": ours, "llama.cpp": theirs})
        spoken = f"llama.cpp {theirs['prefill']:.1f}, {theirs['decode']:.2f}" if theirs else "llama.cpp refuses"
        say(f"{name} turn {turn + 1}/{args.turns}: Strata {ours['prefill']:.1f}, {ours['decode']:.2f}; {spoken}")
    return {"file_bytes": size, "turns": turns, "refused": refused}


def bench(args, *words, model=None, before=lambda: None):
    """One process of `strata bench`: its object, its peak memory, and what others used of the processors."""
    config = args.work / "measured.json"
    if model is None:
        config.write_text((CONFIGS / f"{args.shape}.json").read_text())
    command = [args.strata, "bench", model or config, "--json", "--threads", args.threads, "--repeat", args.repeat]
    command += [] if model else ["--random", 1, "--dtype", "bf16"]
    command = [str(word) for word in [*command, *words]]
    before()
    start, used = time.monotonic(), bench_peer.cpu_times()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        sys.exit(f"bench_table: {shlex.join(command)} ended with {status}")
    others = None
    if used:
        all_used, stolen = (b - a for a, b in zip(used, bench_peer.cpu_times()))
        own = usage.ru_utime + usage.ru_stime
        others = 100 * max(0.0, all_used - own + stolen) / ((time.monotonic() - start) * os.cpu_count())
    return {"command": command, "output": json.loads(out), "peak_bytes": usage.ru_maxrss * 1024, "others_percent": others}


def length(args):
    """Prefill behind a long text beside that at the beginning."""
    sizes = ["--prompt", args.prompt, "--generate", 8]
    turns = []
    for _ in range(args.turns):
        # Reading as far as the depth has warmed everything up.
        runs = [(0, []), (args.depth, ["--cold"])]
        turns.append([bench(args, *sizes, "--depth", depth, "--context", args.depth + args.prompt + 16, *cold) for depth, cold in runs])
        say(f"length: {[run['output']['prefill_tokens_per_second']['median'] for run in turns[-1]]}")
    kept = statistics.median(b["output"]["prefill_tokens_per_second"]["median"] / a["output"]["prefill_tokens_per_second"]["median"] for a, b in turns)
    more = statistics.median(b["peak_bytes"] - a["peak_bytes"] for a, b in turns)
    kv = turns[0][1]["output"]["kv_bytes_per_token"] * args.depth
    text = f"prefill {args.prompt} behind {args.depth:,} tokens keeps {100 * kept:.0f} % of its rate; {more / 1e6:.0f} MB more memory at the peak, keys and values are {kv / 1e6:.0f} MB"
    return {"turns": turns, "kept": kept, "text": text, "bar": "at least 75 %"}


def batch(args):
    """Eight sequences that decode together beside one."""
    sizes = ["--prompt", 32, "--generate", args.generate]
    turns = []
    for _ in range(args.turns):
        turns.append([bench(args, *sizes, "--batch", count) for count in (1, 8)])
        say(f"batch: {[run['output']['decode_tokens_per_second']['median'] for run in turns[-1]]}")
    ratio = statistics.median(b["output"]["decode_tokens_per_second"]["median"] / a["output"]["decode_tokens_per_second"]["median"] for a, b in turns)
    return {"turns": turns, "ratio": ratio, "text": f"eight sequences decode {ratio:.2f} times the tokens of one", "bar": "at least 4"}


def start(args):
    """The first token of a prompt of eight."""
    file = file_of(args, "mamba-130m" if args.shape.startswith("mamba-130m") else "jamba-3b", None)
    bench_peer.read_once(file)
    turns = []
    for _ in range(args.turns):
        command = [args.strata, "generate", file, "--token-ids", "1,2,3,4,5,6,7,8", "--max-tokens", 1, "--ignore-eos", "--json"]
        began = time.monotonic()
        done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=True)
        wall = time.monotonic() - began
        step = bench(args, "--prompt", 8, "--generate", 1, model=file)["output"]["prefill_tokens_per_second"]["median"]
        turns.append({"output": json.loads(done.stdout), "wall_seconds": wall, "warm_step_seconds": 8 / step})
        say(f"start: {wall:.3f} s")
    of = {key: statistics.median(t[key] for t in turns) for key in ("wall_seconds", "warm_step_seconds")}
    load = statistics.median(t["output"]["load_seconds"] for t in turns)
    first = statistics.median(t["output"]["prefill_seconds"] for t in turns)
    text = f"first token of 8: process {of['wall_seconds']:.3f} s, of which loading {load:.3f} and the prompt {first:.3f}; the same step when warm {of['warm_step_seconds']:.3f} ({file.name})"
    return {"turns": turns, "text": text, "bar": "load and one step"}


def sharing(args):
    """Throughput beside a process that is busy on one processor."""
    sizes = ["--prompt", args.prompt, "--generate", args.generate]
    processor = min(os.sched_getaffinity(0))
    turns = []
    for _ in range(args.turns):
        alone = bench(args, *sizes)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            os.sched_setaffinity(busy.pid, {processor})
            beside = bench(args, *sizes)
        finally:
            busy.kill()
            busy.wait()
        turns.append([alone, beside])
    share = (args.threads - 0.5) / args.threads
    kept = {
        key: statistics.median(b["output"][f"{key}_tokens_per_second"]["median"] / a["output"][f"{key}_tokens_per_second"]["median"] for a, b in turns)
        for key in ("prefill", "decode")
    }
    text = f"with one of {args.threads} processors shared with a busy process, prefill keeps {100 * kept['prefill']:.0f} %, decode {100 * kept['decode']:.0f} %; the processors' share is {100 * share:.0f} %"
    return {"turns": turns, "kept": kept, "share": share, "text": text, "bar": "in proportion, no cliff"}


def whole(args):
    """A prompt of 262,144 tokens, read once."""
    run = bench(args, "--prompt", 1 << 18, "--generate", 1, "--cold", "--context", (1 << 18) + 16)
    rate = run["output"]["prefill_tokens_per_second"]["median"]
    text = f"a prompt of 262,144 tokens takes {(1 << 18) / rate:,.0f} s ({rate:.1f} tok/s), {run['peak_bytes'] / 1e9:.2f} GB at the peak"
    return {"turns": [[run]], "text": text, "bar": "runs through"}


# `whole` takes more than an hour: it is measured where it is named.
OTHERS = {"length": length, "batch": batch, "start": start, "sharing": sharing, "whole": whole}


def summary(result):
    """Medians and extremes of a row, ratios of turns, percents of the limits that the same turns measured."""
    turns = result["turns"]
    first = turns[0]["strata"]["runs"][0]["output"]
    read = first["decode_bytes_per_second"] / first["decode_tokens_per_second"]["median"]
    flops = first["prefill_flops_per_second"] / first["prefill_tokens_per_second"]["median"]
    table = {}
    for key, limit, work in (("prefill", "flops_limit", flops), ("decode", "read_limit", read)):
        ours = [t["strata"][key] for t in turns]
        pairs = [(t["strata"][key], t["llama.cpp"][key]) for t in turns if t["llama.cpp"]]
        ratios = [a / b for a, b in pairs]
        spread = lambda values: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        table[key] = {
            "strata": spread(ours),
            "llama.cpp": spread([b for _, b in pairs]) if pairs else None,
            "ratio": spread(ratios) if pairs else None,
            "percent": statistics.median(100 * work * t["strata"][key] / t["strata"][limit] for t in turns),
            "limit": statistics.median(t["strata"][limit] for t in turns),
        }
    runs = [r for t in turns for side in t.values() if side for r in side["runs"]]
    others = [r["others_percent"] for r in runs if r["others_percent"] is not None]
    table["others"] = max(others) if others else None
    return table


def render(args):
    results = {}
    for name in [*ROWS, *OTHERS]:
        file = args.work / "results" / f"{name}.json"
        if file.exists():
            results[name] = json.loads(file.read_text())
    if not results:
        return "Nothing was measured yet."
    stamps = sorted(r["began"][:10] for r in results.values())
    kept = lambda key: ", ".join(sorted({str(r[key]) for r in results.values() if r.get(key)}))
    lines = [
        f"{kept('cpu')}, {kept('threads')} threads, {stamps[0]}{'' if stamps[0] == stamps[-1] else ' to ' + stamps[-1]};"
        f" {kept('strata_version')}; llama.cpp {kept('peer_version') or 'not run'}. Medians of turns (least to most); tok/s.",
        "Percents are of the limits that `strata bench` measured in the same turns.",
        "",
        "| shape | weights | | prefill | decode | prefill, ratio (bar) | decode, ratio (bar) | of peak | of read rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    spread = lambda s, digits: "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(d=digits, **s) if s else "–"
    for name, (shape, recipe, bars, percents) in ROWS.items():
        if name not in results:
            continue
        result = results[name]
        found = summary(result)
        about = f"{SHAPES[shape][0]} | {(recipe or 'bf16').upper()}, {result['file_bytes'] / 1e9:.2f} GB"
        ratio = lambda key, bar: f"**{found[key]['ratio']['median']:.2f}** ({bar})" if found[key]["ratio"] else f"– ({bar})"
        part = lambda key, bar: f"{found[key]['percent']:.0f} %" + (f" ({bar})" if bar else "")
        lines.append(
            f"| {about} | Strata | {spread(found['prefill']['strata'], 1)} | {spread(found['decode']['strata'], 2)}"
            f" | {ratio('prefill', bars[0])} | {ratio('decode', bars[1])} | {part('prefill', percents[0])} | {part('decode', percents[1])} |"
        )
        lines.append(f"| | | llama.cpp | {spread(found['prefill']['llama.cpp'], 1)} | {spread(found['decode']['llama.cpp'], 2)} | | | | |")
        settings = result["settings"]
        if result["refused"]:
            said = [line for line in result["refused"].splitlines() if line.strip()][-1]
            notes.append(f"{name}: llama.cpp does not run the file: {said.strip()[:200]}")
        sizes = f"prompt {settings['prompt']}, {settings['generate']} generated, {settings['turns']} turns"
        loud = found["others"] is None or found["others"] > bench_peer.BUSY
        load = "load of others unknown" if found["others"] is None else f"others used up to {found['others']:.1f} % of the processors"
        limits = f"limits {found['prefill']['limit'] / 1e9:.0f} GFLOP/s, {found['decode']['limit'] / 1e9:.1f} GB/s"
        notes.append(f"{name}: {sizes}; {limits}; {load}{': **provisional**' if loud else ''}")
    others = [(name, results[name]) for name in OTHERS if name in results]
    if others:
        lines += ["", "| | measured | bar |", "| --- | --- | --- |"]
        lines += [f"| {name}, {result['settings']['shape']} | {result['text']} | {result['bar']} |" for name, result in others]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def write(text):
    file = ROOT / "BENCHMARKS.md"
    before = file.read_text()
    if BEGIN not in before or END not in before:
        sys.exit(f"bench_table: {file} has no {BEGIN} and {END}")
    head, rest = before.split(BEGIN, 1)
    beside = file.with_suffix(".md.new")
    beside.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
    beside.replace(file)


def main():
    threads = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, help="a folder for models (up to 14 GB at a time) and results")
    parser.add_argument("--strata", type=pathlib.Path, default=ROOT / "target/release/strata", help="[default: %(default)s]")
    parser.add_argument("--llama-bench", type=pathlib.Path, default="llama-bench", help="[default: %(default)s]")
    parser.add_argument("--rows", help="only these, separated by commas [default: all]")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    parser.add_argument("--keep", action="store_true", help="leave the models")
    parser.add_argument("--write", choices=["yes", "no"], default="yes", help="whether BENCHMARKS.md is changed [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=5, help="[default: %(default)s]")
    parser.add_argument("--prompt", type=int, default=512, help="[default: %(default)s]")
    parser.add_argument("--generate", type=int, default=128, help="[default: %(default)s]")
    parser.add_argument("--depth", type=int, default=65536, help="of `length` [default: %(default)s]")
    parser.add_argument("--repeat", type=int, default=1, help="timed runs in a process [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=threads, help="[default: %(default)s]")
    parser.add_argument("--shape", default="jamba-reasoning-3b", help="config of the second table [default: %(default)s]")
    args = parser.parse_args()
    if args.list:
        print("\n".join([*ROWS, *OTHERS]))
        return
    if not args.work:
        parser.error("--work FOLDER is wanted")
    wanted = args.rows.split(",") if args.rows else [*ROWS, *(name for name in OTHERS if name != "whole")]
    unknown = [name for name in wanted if name not in ROWS and name not in OTHERS]
    if unknown:
        parser.error(f"no rows {', '.join(unknown)}; --list names them")
    results = args.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    for program in [] if args.render else [args.strata, args.llama_bench]:
        if not shutil.which(program):
            sys.exit(f"bench_table: no program {program}")
    left = [] if args.render else [n for n in wanted if args.again or not (results / f"{n}.json").exists()]
    for i, name in enumerate(left):
        began = datetime.datetime.now(datetime.timezone.utc)
        result = row(args, name) if name in ROWS else OTHERS[name](args)
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        peers = [t["llama.cpp"] for t in result["turns"] if isinstance(t, dict) and t.get("llama.cpp")]
        result |= {
            "began": began.isoformat(timespec="seconds"), "cpu": bench_peer.cpu_name(), "threads": args.threads,
            "strata_version": f"{tool(args, '--version').strip()} {commit}".strip(),
            "peer_version": peers[0]["runs"][0]["output"]["build_commit"] if peers else None,
            "settings": {key: getattr(args, key) for key in ("turns", "prompt", "generate", "depth", "repeat", "shape")},
        }
        beside = results / f"{name}.json.new"
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(results / f"{name}.json")
        shape = ROWS[name][0] if name in ROWS else None
        if shape and not args.keep:
            (args.work / f"{shape}-{ROWS[name][1] or 'bf16'}.gguf").unlink(missing_ok=True)
            if all(ROWS.get(later, (None,))[0] != shape for later in left[i + 1 :]) and "start" not in left[i + 1 :]:
                shutil.rmtree(args.work / shape, ignore_errors=True)
    text = render(args)
    print(text)
    if args.write == "yes":
        write(text)


if __name__ == "__main__":
    main()
