"""Writes tests/golden/s4d: a tiny language model of S4D layers, as a plan, and the logits of the authors' S4D.

    make_s4d_golden.py --source DIR [--out tests/golden/s4d/convolution]

DIR is a checkout of https://github.com/state-spaces/s4 (commit e757cef). Its S4D computes a convolution over the
whole text, so that a runtime that walks token by token is compared with quite another computation. No checkpoint
of this kind is published: embedding, norms and head are ours, and so are the tensors' names.
Needs torch and einops.
"""

import argparse
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB, WIDTH, STATES, LAYERS, EPS = 61, 24, 6, 3, 1e-5
PLAN = f"""\
plan: 1
name: s4d
vocab: {VOCAB}
d_model: {WIDTH}
context: 1024
blocks:
  s4d:
    - residual:
        - norm: {{eps: {EPS:.1e}}}
        - s4d: {{d_state: {STATES}}}
        - activate: {{act: gelu}}
        - linear: {{d_out: {2 * WIDTH}, bias: true}}
        - let: {{g: [slice: {{from: {WIDTH}, to: {2 * WIDTH}}}]}}
        - slice: {{from: 0, to: {WIDTH}}}
        - gate: {{by: g, act: sigmoid}}
stack: [s4d*{LAYERS}]
head: {{norm: {{eps: {EPS:.1e}}}, tie: true}}
"""


def norm(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden" / "s4d" / "convolution")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = types.ModuleType("src.models.nn")
    package.DropoutNd = torch.nn.Identity
    sys.modules.update({"src": types.ModuleType("src"), "src.models": types.ModuleType("src.models"), "src.models.nn": package})
    sys.path.insert(0, str(options.source / "models" / "s4"))
    from s4d import S4D

    rng = torch.Generator().manual_seed(77)
    draw = lambda *shape: torch.randn(shape, generator=rng)
    embed, head_norm = 0.5 * draw(VOCAB, WIDTH), 1 + 0.2 * draw(WIDTH)
    weights, layers = {"embed": embed, "head.norm": head_norm}, []
    for i in range(LAYERS):
        layer, w = S4D(WIDTH, 2 * STATES).eval(), 1 + 0.2 * draw(WIDTH)
        kernel, linear = layer.kernel, layer.output_linear[0]
        kernel.log_dt.copy_(math.log(0.01) + math.log(30) * torch.rand(WIDTH, generator=rng))
        kernel.log_A_real.add_(0.5 * draw(WIDTH, STATES))
        kernel.A_imag.add_(0.3 * draw(WIDTH, STATES))
        kernel.C.copy_(draw(WIDTH, STATES, 2))
        layer.D.copy_(draw(WIDTH))
        linear.weight.copy_(draw(2 * WIDTH, WIDTH, 1) / 3)
        linear.bias.copy_(0.3 * draw(2 * WIDTH))
        layers.append((layer, w))
        own = {"log_dt": kernel.log_dt, "a_log": kernel.log_A_real, "a_im": kernel.A_imag, "c": kernel.C, "d": layer.D}
        weights |= {f"blocks.{i}.s4d.{k}": v for k, v in own.items()}
        weights |= {f"blocks.{i}.norm": w, f"blocks.{i}.linear": linear.weight[..., 0], f"blocks.{i}.linear.bias": linear.bias}

    def forward(ids):
        x = F.embedding(ids, embed)
        for layer, w in layers:
            x = x + layer(norm(x, w).transpose(1, 2))[0].transpose(1, 2)
        return norm(x, head_norm) @ embed.T

    ids = torch.randint(VOCAB, (2, 53), generator=rng)
    logits = forward(ids)
    for _ in range(1000):
        prompt = torch.randint(VOCAB, (1, 7), generator=rng)
        text, smallest = prompt, math.inf
        for _ in range(32):
            best = forward(text)[0, -1].topk(2)
            smallest = min(smallest, ((best.values[0] - best.values[1]) / logits.std()).item())
            text = torch.cat([text, best.indices[:1, None]], dim=1)
        if smallest > 0.03 and len(set(text[0, 7:].tolist())) >= 10:
            break
    else:
        raise SystemExit("no prompt without near-ties: choose another seed")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "plan.yaml").write_text(PLAN)
    save_file({k: v.contiguous() for k, v in weights.items()}, options.out / "model.safetensors")
    golden = {"token_ids": ids, "logits": logits, "greedy_prompt": prompt[0], "greedy_tokens": text[0, 7:]}
    save_file({k: v.contiguous() for k, v in golden.items()}, options.out / "golden.safetensors")
    print("logits", logits.std().item(), "smallest margin", smallest)


if __name__ == "__main__":
    main()
