"""Times `strata generate --lookup` beside plain decoding, in turn, and checks that their tokens are equal.

    python tests/bench_lookup.py [--strata target/release/strata] [--lookup 16] [--turns 5]

The task is extraction from a document, with the bundled demonstration model: it reads a page
(model-cards/demo/sample.md) and one question, answers, and then, as in the text it was trained on, goes on asking
and answering: names and values are quoted from the page, questions from those before. Once greedy, and sampled at
three temperatures by one seed. Short: a few seconds.

Prints a Markdown table; exit status 1 if tokens differ, or if the greedy task gains less than --least.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

PAGE = pathlib.Path(__file__).parent.parent / "model-cards/demo/sample.md"
QUESTION = "\n\nQ: Where does Mara Tolvin live?\nA:"
TASKS = [("greedy", []), *((f"temperature {t}", ["--temperature", t, "--seed", "3"]) for t in ("0.3", "0.6", "1.0"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strata", default="target/release/strata", help="[default: %(default)s]")
    parser.add_argument("--lookup", type=int, default=16, help="most tokens of a guess [default: %(default)s]")
    parser.add_argument("--generate", type=int, default=600, help="tokens [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=5, help="runs of each [default: %(default)s]")
    parser.add_argument("--least", type=float, default=1.8, help="ratio of the greedy task [default: %(default)s]")
    parser.add_argument("--threads", type=int, help="[default: all]")
    args = parser.parse_args()

    def run(prompt, words):
        command = [args.strata, "generate", "demo", "--prompt-file", prompt, "--ignore-eos", "--json"]
        command += ["--max-tokens", str(args.generate), *words]
        command += ["--threads", str(args.threads)] if args.threads else []
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print("| task | plain, tok/s | with guesses, tok/s | ratio, median of the turns | guessed tokens that were right |")
    print("| --- | --- | --- | --- | --- |")
    ratios, equal = {}, True
    with tempfile.TemporaryDirectory() as folder:
        prompt = pathlib.Path(folder) / "prompt.txt"
        prompt.write_text(PAGE.read_text() + QUESTION)
        for name, words in TASKS:
            turns = []
            for _ in range(args.turns):
                plain, guessed = (run(str(prompt), words + more) for more in ([], ["--lookup", str(args.lookup)]))
                if plain["token_ids"] != guessed["token_ids"]:
                    equal = False
                    print(f"bench_lookup: {name}: tokens differ", file=sys.stderr)
                turns.append((plain["decode_tokens_per_second"], guessed["decode_tokens_per_second"], guessed["lookup"]))
            ratios[name] = statistics.median(b / a for a, b, _ in turns)
            rates = ["{:.0f} ({:.0f} to {:.0f})".format(statistics.median(r), min(r), max(r)) for r in list(zip(*turns))[:2]]
            said = turns[0][2]
            share = f"{said['right_tokens']} of {said['guessed_tokens']}"
            print(f"| {name} | {rates[0]} | {rates[1]} | {ratios[name]:.2f} | {share} |")
    if not equal or ratios["greedy"] < args.least:
        sys.exit(1)


if __name__ == "__main__":
    main()
