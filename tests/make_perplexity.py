"""What `strata perplexity` should say, by transformers: writes tests/golden/perplexity.json.

    make_perplexity.py [--check]    --check only compares what is written

Mean negative log-likelihoods of model-cards/demo/sample.md under the demonstration model in F32, in windows
of some tokens every some tokens as in transformers' guide to perplexity: the labels of a window's tokens that an
earlier window scored are left out. Beside it, in one window, how far the same model without the fourth of
its eight blocks (the first, P) is from the whole one (the second, Q). Needs torch and transformers; seconds on one CPU thread.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests/golden/perplexity.json"
TEXT = "model-cards/demo/sample.md"
# context, stride; the first holds the whole text.
WINDOWS = [(4096, 2048), (256, 128), (200, 70), (128, 128)]
# Left out of the first of two models.
LEFT_OUT = 3


def load():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "model-cards/demo", dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    return model.eval()


def windowed(model, ids, context, stride):
    """(sum of -ln p, tokens) by the guide's loop."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        logits = model(ids[None, begin:end]).logits[0].double()
        nll = -torch.log_softmax(logits[:-1], -1).gather(1, ids[begin + 1 : end, None])[:, 0]
        nll = nll[max(done - begin - 1, 0) :]
        total, count, done = total + nll.sum().item(), count + len(nll), end
        if end == len(ids):
            break
    return total, count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load()
    ids = torch.tensor(AutoTokenizer.from_pretrained(ROOT / "model-cards/demo")((ROOT / TEXT).read_text()).input_ids)
    found = {"text": TEXT, "tokens": len(ids), "windows": []}
    with torch.no_grad():
        for context, stride in WINDOWS:
            total, count = windowed(model, ids, context, stride)
            found["windows"].append({"context": context, "stride": stride, "scored_tokens": count, "nll": total / count})
        first = load()
        # A block that hands on what it is given.
        first.model.layers[LEFT_OUT].register_forward_hook(lambda _, given, __: given[0])
        p, q = (torch.log_softmax(m(ids[None]).logits[0, :-1].double(), -1) for m in (first, model))
    kl = (p.exp() * (p - q)).sum(-1)
    back = (q.exp() * (q - p)).sum(-1)
    found["compared"] = {
        "left_out": LEFT_OUT,
        "nll": -p.gather(1, ids[1:, None]).mean().item(),
        "kl_divergence": {
            "mean": kl.mean().item(),
            "standard_error": (kl.std() / math.sqrt(len(kl))).item(),
            "median": kl.quantile(0.5).item(),
            "p99": kl.quantile(0.99).item(),
            "max": kl.max().item(),
            "max_position": kl.argmax().item() + 1,
        },
        "reverse_kl_divergence": back.mean().item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }
    if options.check:
        before = json.loads(OUT.read_text())
        flat = lambda v: [v] if not isinstance(v, (dict, list)) else [x for e in (v.values() if isinstance(v, dict) else v) for x in flat(e)]
        for a, b in zip(flat(before), flat(found), strict=True):
            if a != b and not math.isclose(a, b, rel_tol=1e-6):
                raise SystemExit(f"{OUT} has {a}, the reference says {b}")
        return
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
