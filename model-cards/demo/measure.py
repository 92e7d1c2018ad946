"""How often `strata` answers right with this model, by the length of the document.

    python measure.py path/to/strata --lengths 1024 8192 --documents 200 50

Every document is fresh (a seed that training never used) and is asked four questions in one dialogue:
three that it answers and one that it does not. An answer is right if all of it is and the model stopped
by itself. The dialogue goes on with the model's own answers, right or wrong. The document is read once.
"""

import argparse
import json
import subprocess
import tempfile
import time

import text


def ask(command, document, questions):
    """The answers and why each ended."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(document)
        file.flush()
        lines = "".join(question + "\n" for question in questions)
        run = subprocess.run([*command, "--document", file.name], input=lines, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    if len(answers) != len(questions):
        raise SystemExit(f"{len(answers)} answers to {len(questions)} questions: {run.stderr}")
    return answers


def percent(results):
    return f"{100 * sum(results) / max(1, len(results)):.2f} % of {len(results)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strata", help="the program")
    parser.add_argument("--model", help="folder of the model (default: the bundled one)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192, 32768])
    parser.add_argument("--documents", type=int, nargs="+", default=[100, 100, 50, 10], help="for each length")
    parser.add_argument("--seed", type=int, default=71)
    parser.add_argument("--wrong", action="store_true", help="print the questions that were answered wrongly")
    parser.add_argument("--dtype", default="auto", help="compute type")
    options = parser.parse_args()
    if len(options.lengths) != len(options.documents):
        parser.error("as many --documents as --lengths")
    command = [options.strata, "chat", "--json", "--max-tokens", "48", "--dtype", options.dtype, *([options.model] if options.model else [])]
    print("| tokens | first question | next two | not stated | seconds a document |\n| --- | --- | --- | --- | --- |")
    for length, documents in zip(options.lengths, options.documents):
        results, begun = [], time.time()
        for index in range(documents):
            document, turns = text.evaluation_document(options.seed, length, index)
            answers = ask(command, document, [question for question, _ in turns])
            right = [got["text"] == expected and got["stop_reason"] == "eos" for got, (_, expected) in zip(answers, turns)]
            results.append(right)
            if options.wrong:
                for ok, got, (question, expected) in zip(right, answers, turns):
                    if not ok:
                        print(f"    {question} {got['text']!r}, expected {expected!r}")
        columns = [[r[0] for r in results], [ok for r in results for ok in r[1:-1]], [r[-1] for r in results]]
        print(f"| {length:,} | {' | '.join(map(percent, columns))} | {(time.time() - begun) / documents:.1f} |", flush=True)


if __name__ == "__main__":
    main()
