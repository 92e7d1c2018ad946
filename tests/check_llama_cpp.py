"""Lets llama.cpp run a GGUF file that was written here, and compares greedy tokens.

    pip install llama-cpp-python
    python tests/check_llama_cpp.py model.gguf FOLDER

FOLDER is the checkpoint that the file was written from. What is expected are the greedy tokens of its
golden.safetensors, if it has one, else those of transformers on the checkpoint in f32. Instead of
llama-cpp-python a program may be given with `--logits`: it is called as `PROGRAM model.gguf OUT ID ID ...`
and writes the logits of the last position as f32.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


class Library:
    """llama-cpp-python."""

    def __init__(self, path):
        from llama_cpp import Llama

        self.model = Llama(str(path), n_ctx=512, logits_all=True, verbose=False)

    def last(self, ids):
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[len(ids) - 1])


class Program:
    """A program that writes logits."""

    def __init__(self, program, path):
        self.command = [program, str(path)]

    def last(self, ids):
        with tempfile.NamedTemporaryFile() as file:
            command = [*self.command, file.name, *map(str, ids)]
            done = subprocess.run(command, capture_output=True, timeout=60, check=False)
            if done.returncode != 0:
                sys.exit(done.stderr.decode(errors="replace")[-1000:])
            return np.fromfile(file.name, np.float32)


def expected(folder, count):
    """A prompt and the tokens that should follow it."""
    golden = folder / "golden.safetensors"
    if golden.is_file():
        from safetensors.numpy import load_file

        tensors = load_file(golden)
        return tensors["greedy_prompt"].ravel().tolist(), tensors["greedy_tokens"].ravel().tolist()[:count]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [55, 84, 35, 53, 35, 46, 35, 54, 66]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return prompt, ids[len(prompt) :]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--logits", help="a program instead of llama-cpp-python")
    parser.add_argument("--count", type=int, default=16)
    args = parser.parse_args()
    prompt, wanted = expected(args.folder, args.count)
    llama = Program(args.logits, args.file) if args.logits else Library(args.file)
    found = []
    for _ in wanted:
        found.append(int(llama.last(prompt + found).argmax()))
    print(f"{args.file.name}: {'equal' if found == wanted else 'DIFFERENT'}: {found}")
    if found != wanted:
        sys.exit(f"expected {wanted}")


if __name__ == "__main__":
    main()
