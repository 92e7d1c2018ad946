"""`strata serve` and llama-server in turn, on the same GGUF file under the same traffic, what is known reused by both.

    python tests/bench_serving.py --gguf FILE.gguf --llama-server PATH [--strata target/release/strata] [--turns 3]

Two kinds of traffic, by tests/load.py: prompts that come again and share beginnings, and questions about documents, no
question twice. llama-server has as many slots as there are clients, a context of --context tokens for each, its prompt
cache and its checkpoints as they are by default; `strata serve` its defaults and as many sequences. Both have
--threads. The file wants a tokenizer. Prints a Markdown table: medians of the turns, least to most.
"""

import argparse
import json
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

LOAD = pathlib.Path(__file__).parent / "load.py"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(command, port):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        try:
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200:
                return process
        except OSError:
            if process.poll() is not None:
                sys.exit(f"it ended: {command}")
        time.sleep(0.1)
    sys.exit(f"it is not ready: {command}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--strata", default="target/release/strata", help="[default: %(default)s]")
    parser.add_argument("--clients", type=int, default=8, help="[default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=60, help="of traffic [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="[default: %(default)s]")
    parser.add_argument("--context", type=int, default=16384, help="of a sequence [default: %(default)s]")
    parser.add_argument("--shapes", type=int, default=48, help="different prompts [default: %(default)s]")
    parser.add_argument("--most-prompt", type=int, default=2000, help="bytes [default: %(default)s]")
    parser.add_argument("--most-tokens", type=int, default=64, help="of an answer [default: %(default)s]")
    parser.add_argument("--documents", type=int, default=4, help="0 leaves them out [default: %(default)s]")
    parser.add_argument("--document", type=int, default=8000, help="bytes of each [default: %(default)s]")
    parser.add_argument("--prefix", default="", help="command that the traffic is run by, to keep the machine quiet")
    args = parser.parse_args()
    threads, clients = str(args.threads), str(args.clients)

    def strata(port):
        return [args.strata, "serve", args.gguf, "--name", "demo", "--port", str(port), "--max-sequences", clients,
                "--context", str(args.context), "--threads", threads]

    def llama(port):
        return [args.llama_server, "-m", args.gguf, "--port", str(port), "-np", clients, "-t", threads, "-tb", threads,
                "-c", str(args.context * args.clients)]

    traffic = {"prompts that come again": ["--shapes", str(args.shapes), "--most-prompt", str(args.most_prompt)]}
    if args.documents:
        traffic[f"questions about {args.documents} documents of {args.document:,} bytes"] = [
            "--documents", str(args.documents), "--most-prompt", str(args.document)]
    measured = {}
    for turn in range(args.turns):
        for what, more in traffic.items():
            for kind, command in [("strata", strata), ("llama", llama)][:: 1 if turn % 2 == 0 else -1]:
                port = free_port()
                process = serve(command(port), port)
                said = subprocess.run(
                    [*args.prefix.split(), sys.executable, LOAD, f"http://127.0.0.1:{port}", "--kind", kind, "--clients", clients, "--seconds",
                     str(args.seconds), "--bad", "0", "--leave", "0", "--rest", "0", "--most-tokens",
                     str(args.most_tokens), "--pid", str(process.pid), *more], capture_output=True, text=True)
                process.send_signal(signal.SIGTERM)
                process.wait(120)
                print(f"{kind}, {what}: {said.stdout.strip()} {said.stderr.strip()}", file=sys.stderr, flush=True)
                told = json.loads(said.stdout)
                if told["errors"]:
                    sys.exit("there were errors")
                measured.setdefault((what, kind), []).append(told)

    def cell(all_told, key, form):
        values = [told[key] for told in all_told]
        middle = form.format(statistics.median(values))
        spread = f" ({form.format(min(values))} to {form.format(max(values))})"
        return middle + (spread if len(values) > 1 else "")

    print("| traffic | server | answers/s | tokens/s | first token, median, s | 99 of 100 within, s | memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (what, kind), told in measured.items():
        name = {"strata": "`strata serve`", "llama": "`llama-server`"}[kind]
        cells = [cell(told, "answers_per_second", "{:.2f}"), cell(told, "tokens_per_second", "{:.0f}"),
                 cell(told, "first_token_p50", "{:.3f}"), cell(told, "first_token_p99", "{:.3f}"),
                 cell(told, "resident_mb_after", "{:.0f}")]
        print(f"| {what} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
