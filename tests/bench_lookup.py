"""Times `strata generate --lookup` beside plain decoding, in turn, and checks that their tokens are equal.

    python tests/bench_lookup.py [--strata target/release/strata] [--lookup 16] [--turns 5]

The task is extraction from a document, with the bundled demonstration model: it reads a page
(model-cards/demo/sample.md) and one question, answers, and then, as in the text it was trained on, goes on asking
and answering: names and values are quoted from the page, questions from those before. Once greedy, and sampled at
three temperatures by one seed. The last row is six questions that are answered once each, in about ten tokens, where
there is little to gain. Short: a minute.

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
QUESTIONS = [
    "Where does Mara Tolvin live?", "What is the favourite dish of Ines Quill?", "What is the boat of Hugo?",
    "What is the instrument of Ines Quill?", "What is the password of Mara Tolvin?", "Who is the sister of Old Tamsin?",
]
ON = ["--ignore-eos"]
TASKS = [
    ("greedy", QUESTIONS[:1], ON),
    *((f"temperature {t}", QUESTIONS[:1], [*ON, "--temperature", t, "--seed", "3"]) for t in ("0.3", "0.6", "1.0")),
    ("six short answers", QUESTIONS, []),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strata", default="target/release/strata", help="[default: %(default)s]")
    parser.add_argument("--lookup", type=int, default=16, help="most tokens of a guess [default: %(default)s]")
    parser.add_argument("--generate", type=int, default=600, help="tokens [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=5, help="runs of each [default: %(default)s]")
    parser.add_argument("--least", type=float, default=1.8, help="ratio of the greedy task [default: %(default)s]")
    parser.add_argument("--threads", type=int, help="[default: all]")
    args = parser.parse_args()

    def one(prompt, words):
        command = [args.strata, "generate", "demo", "--prompt-file", prompt, "--json"]
        command += ["--max-tokens", str(args.generate), *words]
        command += ["--threads", str(args.threads)] if args.threads else []
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def run(prompts, words):
        """Tokens, tokens a second, and guesses, of all questions together."""
        done = [one(prompt, words) for prompt in prompts]
        decoded = sum(d["generated_tokens"] - 1 for d in done)
        guesses = [sum(d.get("lookup", {}).get(key, 0) for d in done) for key in ("right_tokens", "guessed_tokens")]
        return [d["token_ids"] for d in done], decoded / sum(d["decode_seconds"] for d in done), guesses

    print("| task | plain, tok/s | with guesses, tok/s | ratio, median of the turns | guessed tokens that were right |")
    print("| --- | --- | --- | --- | --- |")
    ratios, equal = {}, True
    with tempfile.TemporaryDirectory() as folder:
        for name, questions, words in TASKS:
            prompts = []
            for i, question in enumerate(questions):
                prompts.append(str(pathlib.Path(folder) / f"{i}.txt"))
                pathlib.Path(prompts[-1]).write_text(f"{PAGE.read_text()}\n\nQ: {question}\nA:")
            turns = []
            for _ in range(args.turns):
                plain, guessed = (run(prompts, words + more) for more in ([], ["--lookup", str(args.lookup)]))
                if plain[0] != guessed[0]:
                    equal = False
                    print(f"bench_lookup: {name}: tokens differ", file=sys.stderr)
                turns.append((plain[1], guessed[1], guessed[2]))
            ratios[name] = statistics.median(b / a for a, b, _ in turns)
            rates = ["{:.0f} ({:.0f} to {:.0f})".format(statistics.median(r), min(r), max(r)) for r in list(zip(*turns))[:2]]
            right, guessed = turns[0][2]
            print(f"| {name} | {rates[0]} | {rates[1]} | {ratios[name]:.2f} | {right} of {guessed} |")
    if not equal or ratios["greedy"] < args.least:
        sys.exit(1)


if __name__ == "__main__":
    main()
