"""Writes what transformers computes of a checkpoint, block by block, for `strata verify --against`.

    make_reference.py CHECKPOINT --prompt "The tide tables say" --output run.safetensors
    strata verify CHECKPOINT --against run.safetensors

CHECKPOINT is a folder or a Hub id. The tokens run in one shot, in F32 unless --dtype says otherwise (compare
with `strata verify --dtype f32`). The file holds

    token_ids    I64 (tokens)
    hidden.0     F32 (tokens, d_model)   what the first block reads: the embedding, scaled if the model does that
    hidden.{i}   F32 (tokens, d_model)   behind block i, counted from 1
    norm         F32 (tokens, d_model)   behind the final norm
    logits       F32 (tokens, vocab)

`output_hidden_states` would not do: its last entry is behind the final norm, so that the last block's own is
missing. Hooks on the blocks see all of them. Needs torch, transformers and safetensors.
"""

import argparse

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# What models call the list of their blocks, and the norm behind the last.
BLOCKS = ("layers", "h", "blocks")
NORMS = ("norm", "norm_f", "final_layernorm", "final_norm", "ln_f")


def child(module, names, what):
    """The first of the names that the decoder has."""
    found = [getattr(module, name) for name in names if isinstance(getattr(module, name, None), torch.nn.Module)]
    if not found:
        raise SystemExit(f"{type(module).__name__} has none of {', '.join(names)}: name its {what} with --{what}")
    return found[0]


def record(model, ids, blocks, norm):
    """All tensors of the file, from one forward of `ids` (tokens)."""
    decoder = model.base_model
    blocks, norm = child(decoder, blocks, "blocks"), child(decoder, norm, "norm")
    seen = {}

    def keep(name, value):
        value = value[0] if isinstance(value, tuple) else value
        # (1, tokens, D), or rows alone.
        seen[name] = value.detach().float().reshape(len(ids), -1).contiguous().clone()

    def first(_, args, kwargs):
        keep("hidden.0", args[0] if args else kwargs["hidden_states"])

    hooks = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, __, out, i=i: keep(f"hidden.{i + 1}", out)))
    hooks.append(norm.register_forward_hook(lambda _, __, out: keep("norm", out)))
    with torch.no_grad():
        keep("logits", model(ids[None], use_cache=False).logits)
    for hook in hooks:
        hook.remove()
    return {"token_ids": ids, **seen}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--prompt", help="a text")
    tokens.add_argument("--prompt-file", help="a file with a text")
    tokens.add_argument("--token-ids", help="such as 1,2,3")
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--max-tokens", type=int, help="cut the text here")
    parser.add_argument("--blocks", nargs="+", default=BLOCKS, help="attribute of the decoder with its blocks")
    parser.add_argument("--norm", nargs="+", default=NORMS, help="attribute of the decoder with the norm behind them")
    parser.add_argument("--free-dt", action="store_true", help="take off the bounds of dt, which transformers sets to prompts of Nemotron-H and Zamba2 and their training did not")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    if options.token_ids:
        ids = [int(part) for part in options.token_ids.split(",")]
    else:
        text = options.prompt if options.prompt is not None else open(options.prompt_file, encoding="utf-8").read()
        ids = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=options.trust_remote_code)(text).input_ids
    ids = torch.tensor(ids[: options.max_tokens], dtype=torch.int64)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=getattr(torch, options.dtype),
        # Plain loops: the fused ones round otherwise, and refuse some shapes.
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=options.trust_remote_code,
        output_loading_info=True,
    )
    if loaded["missing_keys"]:
        raise SystemExit(f"transformers does not find all weights, and would draw them: {sorted(loaded['missing_keys'])}")
    model.eval()
    if options.free_dt:
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
    tensors = record(model, ids, options.blocks, options.norm)
    save_file(tensors, options.output, metadata={"made_by": "make_reference.py", "checkpoint": options.checkpoint, "dtype": options.dtype})
    blocks = sum(name.startswith("hidden.") for name in tensors) - 1
    print(f"{options.output}: {len(ids)} tokens through {blocks} blocks")


if __name__ == "__main__":
    main()
