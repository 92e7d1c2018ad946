"""Times Strata beside llama.cpp on one CPU, in turn: Strata, llama.cpp, Strata, llama.cpp, …

    python tests/bench_peer.py --model MODEL --gguf MODEL.gguf --llama-bench PATH/llama-bench

MODEL is whatever `strata bench` takes; the GGUF must hold the same model in the same types (BF16
against BF16, say). Both get the same threads, prompt and generated length. A turn is a fresh process
of each, which warms up untimed and is then timed --repeat times; the medians over all turns count.
Both decode after the prompt: llama-bench is asked for that depth.

Before the first turn both models are read once, so that no turn waits for the disk. In every turn
the processor time that neither of the two used is taken from /proc/stat: with more than 3 % of it,
the machine was not quiet and the numbers are only provisional (the table says so).

Prints a Markdown table; --json FILE keeps every number, the commands, and both programs' own output.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time

BUSY = 3.0  # percent of the processors' time


def stop(message):
    sys.exit(f"bench_peer: {message}")


def cpu_times():
    """Seconds of all processors since boot: used, and stolen by the host. None where it is not told."""
    try:
        words = pathlib.Path("/proc/stat").read_text().split(maxsplit=9)
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


def run(command):
    """Runs a command; its JSON, its seconds, and the percent of the processors that others used or the host stole."""
    def children():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, own, start = cpu_times(), children(), time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    seconds, own, after = time.monotonic() - start, children() - own, cpu_times()
    if done.returncode != 0:
        stop(f"exit status {done.returncode} of {shlex.join(command)}\n{done.stderr[-2000:]}")
    try:
        out = json.loads(done.stdout)
    except json.JSONDecodeError:
        stop(f"no JSON from {shlex.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}")
    others = None
    if before and after:
        used, stolen = (b - a for a, b in zip(before, after))
        others = 100 * max(0.0, used - own + stolen) / (seconds * os.cpu_count())
    return out, {"seconds": seconds, "others_percent": others}


def strata(args):
    command = [args.strata, "bench", args.model, "--json", "--offline"]
    command += ["--threads", args.threads, "--prompt", args.prompt, "--generate", args.generate]
    command += ["--depth", args.depth, "--repeat", args.repeat]
    command = [str(word) for word in command] + shlex.split(args.strata_args)
    out, cost = run(command)
    return {
        "prefill": out["prefill_tokens_per_second"]["median"],
        "decode": out["decode_tokens_per_second"]["median"],
        "read_limit": out["limit"]["bytes_per_second"],
        "flops_limit": out["limit"]["flops_per_second"],
        "runs": [{"command": command, "output": out, **cost}],
    }


def llama(args):
    """Two processes: a test of llama-bench has one depth, and decoding is timed after the prompt."""
    runs, rates = [], {}
    for name, test in [
        ("prefill", ["-p", args.prompt, "-n", 0, "-d", args.depth]),
        ("decode", ["-p", 0, "-n", args.generate, "-d", args.depth + args.prompt]),
    ]:
        command = [args.llama_bench, "-m", args.gguf, "-t", args.threads, *test, "-r", args.repeat, "-o", "json"]
        command = [str(word) for word in command] + shlex.split(args.llama_args)
        out, cost = run(command)
        if len(out) != 1 or out[0]["n_threads"] != args.threads:
            stop(f"one test with {args.threads} threads was expected: {out}")
        rates[name] = statistics.median(out[0]["samples_ts"])
        runs.append({"command": command, "output": out[0], **cost})
    return {**rates, "runs": runs}


def read_once(path):
    """Brings files into the page cache; how many bytes they have."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    count = 0
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while block := opened.read(1 << 24):
                count += len(block)
    return count


def told(file, key):
    """What a file of /proc says of a key; None where it says nothing."""
    try:
        lines = pathlib.Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def cpu_name():
    """Model name, and family and model where the host hides the name."""
    name = told("/proc/cpuinfo", "model name")
    if not name:
        return platform.processor() or platform.machine()
    return f"{name} (family {told('/proc/cpuinfo', 'cpu family')}, model {told('/proc/cpuinfo', 'model')})"


def main():
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model for `strata bench`: folder, Hub id or bundled name")
    parser.add_argument("--gguf", required=True, type=pathlib.Path, help="the same model for llama.cpp")
    parser.add_argument("--strata", type=pathlib.Path, default="target/release/strata", help="[default: %(default)s]")
    parser.add_argument("--llama-bench", type=pathlib.Path, default="llama-bench", help="[default: %(default)s]")
    parser.add_argument("--threads", type=int, default=threads, help="of both [default: %(default)s]")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens [default: %(default)s]")
    parser.add_argument("--generate", type=int, default=32, help="generated tokens [default: %(default)s]")
    parser.add_argument("--depth", type=int, default=0, help="tokens before the prompt, untimed [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=5, help="processes of each [default: %(default)s]")
    parser.add_argument("--repeat", type=int, default=1, help="timed runs in a process [default: %(default)s]")
    parser.add_argument("--strata-args", default="", metavar="WORDS", help="more arguments for `strata bench`")
    parser.add_argument("--llama-args", default="", metavar="WORDS", help="more arguments for llama-bench, such as '-fa on'")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="keep every number here")
    args = parser.parse_args()
    if min(args.threads, args.prompt, args.generate, args.turns, args.repeat) < 1 or args.depth < 0:
        stop("counts begin at 1")
    for program in (args.strata, args.llama_bench):
        if not shutil.which(program):
            stop(f"no program {program}")
    if not args.gguf.is_file():
        stop(f"no file {args.gguf}")

    began = datetime.datetime.now(datetime.timezone.utc)
    room = told("/proc/meminfo", "MemAvailable")
    sizes = [read_once(path) for path in (pathlib.Path(args.model), args.gguf) if path.exists()]
    if room and sum(sizes) > 1024 * int(room.split()[0]):
        print(f"bench_peer: the models have {sum(sizes) >> 20} MiB, of memory only {room} are available", file=sys.stderr)

    ours, theirs = [], []
    for turn in range(args.turns):
        for name, times, bench in [("strata", ours, strata), ("llama.cpp", theirs, llama)]:
            try:
                times.append(bench(args))
            except OSError as error:
                stop(error)
            last = times[-1]
            others = max((r["others_percent"] or 0.0 for r in last["runs"]))
            print(
                f"turn {turn + 1}/{args.turns} {name:9} prefill {last['prefill']:8.2f} tok/s, decode {last['decode']:7.2f} tok/s,"
                f" others used {others:.1f} % of the processors",
                file=sys.stderr,
            )

    first, peer = ours[0]["runs"][0]["output"], theirs[0]["runs"][0]["output"]
    read = first["decode_bytes_per_second"] / first["decode_tokens_per_second"]["median"]  # a token
    flops = first["prefill_flops_per_second"] / first["prefill_tokens_per_second"]["median"]
    # Where the types differ, llama.cpp reads other bytes than we do.
    same = abs(peer["model_size"] / first["weights_bytes"] - 1) < 0.05

    def rate(times, key):
        values = [t[key] for t in times]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def share(times, key, limit, work):
        """In percent; the limit of a turn is the one that Strata measured in it."""
        of = statistics.median(100 * work * t[key] / turn[limit] for t, turn in zip(times, ours))
        highest = max(turn[limit] for turn in ours)
        return {"median": of, "of_highest_limit": 100 * work * statistics.median(t[key] for t in times) / highest}

    def summary(times):
        return {
            "prefill": rate(times, "prefill"),
            "decode": rate(times, "decode"),
            "prefill_percent_of_flops": share(times, "prefill", "flops_limit", flops),
            "decode_percent_of_read": share(times, "decode", "read_limit", read),
        }

    both = {"strata": summary(ours), "llama.cpp": summary(theirs)}
    ratios = {key: statistics.median(a[key] / b[key] for a, b in zip(ours, theirs)) for key in ("prefill", "decode")}
    others = [r["others_percent"] for t in ours + theirs for r in t["runs"] if r["others_percent"] is not None]
    quiet = bool(others) and max(others) <= BUSY
    limit = {key: statistics.median(turn[key] for turn in ours) for key in ("read_limit", "flops_limit")}

    lines = [
        f"{first['model']}, {cpu_name()}, {args.threads} threads, {began:%Y-%m-%d}: prompt {args.prompt}, then {args.generate} generated"
        + (f", after {args.depth}" if args.depth else "")
        + f"; medians of {args.turns} turns (least to most)."
        + ("" if quiet else f" **Provisional**: up to {max(others):.0f} % of the processors went to others." if others else " Load unknown."),
        "",
        "| | prefill, tok/s | of the arithmetic limit | decode, tok/s | of the read limit |",
        "| --- | --- | --- | --- | --- |",
    ]
    labels = {
        "strata": f"Strata, {first['dtype']}",
        "llama.cpp": f"llama.cpp {peer['build_commit']}, {peer['model_type']}",
    }
    for name, result in both.items():
        speeds = ["{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(d=d, **result[key]) for key, d in [("prefill", 1), ("decode", 2)]]
        of_read = f"{result['decode_percent_of_read']['median']:.0f} %" if name == "strata" or same else "–"
        of_flops = f"{result['prefill_percent_of_flops']['median']:.0f} %"
        lines.append(f"| {labels[name]} | {speeds[0]} | {of_flops} | {speeds[1]} | {of_read} |")
    lines += [
        f"| Strata / llama.cpp, median of the turns | {ratios['prefill']:.2f} | | {ratios['decode']:.2f} | |",
        "",
        f"Limits measured by `strata bench` in the same turns, medians: {limit['flops_limit'] / 1e9:.0f} GFLOP/s,"
        f" {limit['read_limit'] / 1e9:.1f} GB/s read. Against the highest read limit of any turn"
        f" ({max(t['read_limit'] for t in ours) / 1e9:.1f} GB/s) Strata decodes at"
        f" {both['strata']['decode_percent_of_read']['of_highest_limit']:.0f} %.",
        f"llama-bench: batch {peer['n_batch']}, micro-batch {peer['n_ubatch']}, keys and values {peer['type_k']}/{peer['type_v']},"
        f" flash attention {({-1: 'auto', 0: 'off', 1: 'on'}).get(peer['flash_attn'], peer['flash_attn'])}, loading {peer['load_mode']};"
        f" Strata: {first['kv_bytes_per_token']} bytes of keys and values a token.",
    ]
    print("\n".join(lines))
    if args.json:
        arguments = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()}
        kept = {
            "began": began.isoformat(timespec="seconds"), "cpu": cpu_name(), "quiet": quiet, "arguments": arguments,
            "bytes_per_decoded_token": read, "flops_per_prompt_token": flops, "same_weight_bytes": same,
            "summary": both, "ratios": ratios, "limits": limit, "turns": [{"strata": a, "llama.cpp": b} for a, b in zip(ours, theirs)],
        }
        args.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
