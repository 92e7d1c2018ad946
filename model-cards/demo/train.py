"""Trains the demonstration model, a JambaForCausalLM of 2.8 million parameters, from scratch.

    python train.py --out model                     the shipped recipe; wants a CUDA GPU
    python train.py --out model --steps 2000        so many steps instead of so many minutes
    python train.py --eval model                    accuracy by length
    python train.py --questions 64 --length 8192 --jsonl questions.jsonl
    python train.py --check                         fused scan against the plain one

Needs PyTorch, NumPy and safetensors. On CUDA the scan is fused (Triton, which comes with PyTorch),
the rest is compiled, and each training step is replayed as one CUDA graph; on the CPU everything is
plain PyTorch. text.py makes the text, scan.py holds the scans.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import scan
import text

CONFIG = {
    "architectures": ["JambaForCausalLM"], "model_type": "jamba", "vocab_size": 260, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 4, "attn_layer_offset": 2,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": 8, "mamba_conv_bias": True, "mamba_proj_bias": False, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 262144, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
}

# (length, part of the training at which it begins)
CURRICULUM = [(256, 0.0), (512, 0.03), (1024, 0.08), (2048, 0.22), (4096, 0.44), (8192, 0.66), (16384, 0.88)]
SHORTER = 0.25  # of the steps take one of the earlier lengths instead

# What a token of each sort weighs in the loss: padding, text, answer, <eos>, the answer's first byte.
# The first byte is where the model has to find the fact; the others mostly follow from it. The text
# teaches the words, early on; later it is mostly noise, since nobody can foresee invented facts.
LOSS_WEIGHTS = [0.0, 0.02, 1.0, 1.0, 3.0]
EARLY_TEXT_WEIGHT = 0.1  # sinks to the above over the first 5 %
BALANCE_WEIGHT = 0.01
UNANSWERABLE = 0.08  # of the questions

EVAL_DOCUMENTS = {1024: 1024, 2048: 1024, 8192: 1024, 32768: 512, 131072: 64}


# ---------------------------------------------------------------------------------------------
# The model. Tokens lie flat, [tokens, width], whatever the sequences' length, so that the compiled
# functions below see one shape throughout the curriculum; only scan and attention know of sequences.

def linear(x, weight):
    """In BF16 on CUDA, weights rounded as the checkpoint will hold them; the rest is F32."""
    kind = torch.bfloat16 if x.is_cuda else torch.float32
    return F.linear(x.to(kind), weight.to(kind))


def rounded(weight):
    return weight.bfloat16().float() if weight.is_cuda else weight


def rms_norm(x, weight):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * weight


def embed(tokens, embedding):
    return F.embedding(tokens.long(), rounded(embedding))


def mamba_before_scan(x, position, norm, in_proj, conv, conv_bias, x_proj, dt_norm, B_norm, C_norm, dt_proj, dt_bias):
    u, gate = linear(rms_norm(x, norm), in_proj).chunk(2, -1)
    # The causal convolution: tokens from before the sequence's start count as zero.
    u, conv, width = u.float(), rounded(conv), conv.shape[-1]
    mixed = conv_bias + u * conv[:, 0, -1]
    for back in range(1, width):
        earlier = F.pad(u, (0, 0, back, 0))[: u.shape[0]]
        mixed = mixed + torch.where(position[:, None] >= back, earlier, 0.0) * conv[:, 0, width - 1 - back]
    u = F.silu(mixed).to(gate.dtype)
    N = B_norm.shape[0]
    dt, B, C = linear(u, x_proj).split([dt_norm.shape[0], N, N], -1)
    dt = F.softplus(linear(rms_norm(dt, dt_norm), dt_proj).float() + dt_bias)
    return u, gate, dt, rms_norm(B, B_norm), rms_norm(C, C_norm)


def mamba_after_scan(x, y, u, gate, D, out_proj):
    return x + linear((y.float() + u.float() * D) * F.silu(gate.float()), out_proj).float()


def attention_inputs(x, norm, q_proj, k_proj, v_proj):
    x = rms_norm(x, norm)
    return linear(x, q_proj), linear(x, k_proj), linear(x, v_proj)


def add_projected(x, y, projection):
    return x + linear(y, projection).float()


def mlp(x, norm, gate_up, down):
    gate, up = linear(rms_norm(x, norm), gate_up).chunk(2, -1)
    return x + linear(F.silu(gate) * up, down).float()


def moe(x, norm, router, gate_up, down):
    """Every expert works on every token; four small ones are quicker so than any routing would be.

    gate_up: [experts * 2 * intermediate, hidden], down: [hidden, experts * intermediate].
    """
    experts, chosen = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
    h = rms_norm(x, norm)
    probabilities = F.softmax(F.linear(h, rounded(router)), -1)
    higher = probabilities[:, None, :] > probabilities[:, :, None]
    kept = (higher.sum(-1) < chosen).float()
    gate, up = linear(h, gate_up).view(x.shape[0], experts, 2, -1).unbind(2)
    y = F.silu(gate) * up * (probabilities * kept)[:, :, None].to(gate.dtype)
    balance = experts * (kept.mean(0) * probabilities.mean(0)).sum()
    return x + linear(y.flatten(1), down).float(), balance


def weighted_loss(x, norm, embedding, targets, kinds, weights):
    """The loss, and how many answers' first bytes were right of how many."""
    head = F.pad(embedding, (0, 0, 0, -embedding.shape[0] % 8))  # matrix products like round sizes
    logits = linear(rms_norm(x, norm), head)[:, : embedding.shape[0]].float()
    weights = weights[kinds.long()]
    losses = F.cross_entropy(logits, targets.long(), reduction="none")
    asked = (kinds == text.IS_FIRST).float()
    right = (logits.argmax(-1) == targets.long()).float()
    return (losses * weights).sum() / weights.sum(), (right * asked).sum(), asked.sum()


class Layer(nn.Module):
    """One layer's parameters, named as in the checkpoint but for the fused gate_up and down."""

    def __init__(self, config, index):
        super().__init__()
        H, I = config["hidden_size"], config["intermediate_size"]
        depth_scale = 1 / math.sqrt(2 * config["num_hidden_layers"])  # for what adds to the residual

        def matrix(rows, columns, scale=1.0):
            return nn.Parameter(torch.randn(rows, columns) * scale * 0.5 / math.sqrt(columns))

        def ones(size):
            return nn.Parameter(torch.ones(size))

        self.is_attention = index % config["attn_layer_period"] == config["attn_layer_offset"]
        self.is_moe = index % config["expert_layer_period"] == config["expert_layer_offset"]
        self.input_norm, self.ff_norm = ones(H), ones(H)
        if self.is_attention:
            self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
            kv = H // self.heads * self.kv_heads
            self.q_proj, self.k_proj, self.v_proj = matrix(H, H), matrix(kv, H), matrix(kv, H)
            self.o_proj = matrix(H, H, depth_scale)
        else:
            D, N, R, K = H * config["mamba_expand"], config["mamba_d_state"], config["mamba_dt_rank"], config["mamba_d_conv"]
            self.in_proj, self.x_proj, self.out_proj = matrix(2 * D, H), matrix(R + 2 * N, D), matrix(H, D, depth_scale)
            self.conv = nn.Parameter(torch.empty(D, 1, K).uniform_(-1, 1) / math.sqrt(K))
            self.conv_bias = nn.Parameter(torch.zeros(D))
            self.dt_norm, self.B_norm, self.C_norm = ones(R), ones(N), ones(N)
            self.dt_proj = nn.Parameter(torch.empty(D, R).uniform_(-1, 1) / math.sqrt(R))
            # softplus(dt_bias) is spread evenly, on a log scale, over 0.001 to 0.1
            dt = torch.exp(torch.empty(D).uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
            self.A_log = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(D, 1))
            self.D = ones(D)
        experts = config["num_experts"] if self.is_moe else 1
        if self.is_moe:
            self.router = matrix(experts, H)
        self.gate_up = matrix(experts * 2 * I, H)
        self.down = nn.Parameter(torch.randn(H, experts * I) * depth_scale * 0.5 / math.sqrt(I))


class Jamba(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config["vocab_size"], config["hidden_size"]) * 0.02)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.final_norm = nn.Parameter(torch.ones(config["hidden_size"]))
        self.register_buffer("loss_weights", torch.tensor(LOSS_WEIGHTS))
        self.compiled = {}

    def compile_parts(self):
        for part in (embed, mamba_before_scan, mamba_after_scan, attention_inputs, add_projected, mlp, moe, weighted_loss):
            self.compiled[part] = torch.compile(part, dynamic=False, fullgraph=True)

    def run(self, part, *inputs):
        return self.compiled.get(part, part)(*inputs)

    def hidden(self, tokens, length):
        """Flat tokens, in sequences of `length`, to the last layer's output; and the routers' balance."""
        position = torch.arange(tokens.numel(), device=tokens.device) % length
        x = self.run(embed, tokens, self.embedding)
        balances = []
        for l in self.layers:
            if l.is_attention:
                x = self.attend(l, x, length)
            else:
                u, gate, dt, B, C = self.run(mamba_before_scan, x, position, l.input_norm, l.in_proj, l.conv, l.conv_bias,
                                             l.x_proj, l.dt_norm, l.B_norm, l.C_norm, l.dt_proj, l.dt_bias)
                y = scan.scan(u, dt, -torch.exp(l.A_log), B, C, length)
                x = self.run(mamba_after_scan, x, y, u, gate, l.D, l.out_proj)
            if l.is_moe:
                x, balance = self.run(moe, x, l.ff_norm, l.router, l.gate_up, l.down)
                balances.append(balance)
            else:
                x = self.run(mlp, x, l.ff_norm, l.gate_up, l.down)
        return x, torch.stack(balances).mean()

    def attend(self, l, x, length):
        q, k, v = self.run(attention_inputs, x, l.input_norm, l.q_proj, l.k_proj, l.v_proj)
        q = q.view(-1, length, l.heads, q.shape[-1] // l.heads).transpose(1, 2)
        k, v = (a.view(-1, length, l.kv_heads, q.shape[-1]).repeat_interleave(l.heads // l.kv_heads, 2).transpose(1, 2)
                for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # no positions: Jamba has none
        return self.run(add_projected, x, y.transpose(1, 2).reshape(x.shape[0], -1), l.o_proj)

    def loss(self, tokens, kinds, length):
        """tokens, kinds: [rows, length + 1]."""
        x, balance = self.hidden(tokens[:, :-1].reshape(-1), length)
        loss, right, asked = self.run(weighted_loss, x, self.final_norm, self.embedding,
                                      tokens[:, 1:].reshape(-1), kinds[:, 1:].reshape(-1), self.loss_weights)
        return loss + BALANCE_WEIGHT * balance, torch.stack([loss.detach(), right, asked, balance.detach()])

    def logits(self, x):
        return linear(rms_norm(x, self.final_norm), self.embedding).float()


# ---------------------------------------------------------------------------------------------
# Checkpoints

MAMBA_NAMES = {"in_proj": "in_proj.weight", "conv": "conv1d.weight", "conv_bias": "conv1d.bias", "x_proj": "x_proj.weight",
               "dt_norm": "dt_layernorm.weight", "B_norm": "b_layernorm.weight", "C_norm": "c_layernorm.weight",
               "dt_proj": "dt_proj.weight", "dt_bias": "dt_proj.bias", "A_log": "A_log", "D": "D", "out_proj": "out_proj.weight"}


def checkpoint_names(model):
    """(name in the checkpoint, the parameter or the part of one that it holds)"""
    yield "model.embed_tokens.weight", model.embedding
    yield "model.final_layernorm.weight", model.final_norm
    for i, l in enumerate(model.layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", l.input_norm
        yield at + "pre_ff_layernorm.weight", l.ff_norm
        if l.is_attention:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{at}self_attn.{name}.weight", getattr(l, name)
        else:
            for ours, name in MAMBA_NAMES.items():
                yield f"{at}mamba.{name}", getattr(l, ours)
        at += "feed_forward."
        I = model.config["intermediate_size"]
        if l.is_moe:
            yield at + "router.weight", l.router
        for e in range(l.down.shape[1] // I):
            expert = f"{at}experts.{e}." if l.is_moe else at
            yield expert + "gate_proj.weight", l.gate_up[2 * e * I : (2 * e + 1) * I]
            yield expert + "up_proj.weight", l.gate_up[(2 * e + 1) * I : (2 * e + 2) * I]
            yield expert + "down_proj.weight", l.down[:, e * I : (e + 1) * I]


def save(model, directory):
    """Matrices as BF16; norms, biases, A_log and D as F32."""
    os.makedirs(directory, exist_ok=True)
    tensors = {}
    for name, tensor in checkpoint_names(model):
        exact = tensor.dim() == 1 or name.endswith("A_log")
        tensors[name] = tensor.detach().to(torch.float32 if exact else torch.bfloat16).cpu().contiguous()
    partial = os.path.join(directory, "model.safetensors.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, os.path.join(directory, "model.safetensors"))
    for name, contents in (("config.json", model.config),
                           ("generation_config.json", {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2,
                                                       "max_new_tokens": 48, "pad_token_id": 0})):
        with open(os.path.join(directory, name), "w") as file:
            json.dump(contents, file, indent=2)
            file.write("\n")


def load(directory, device):
    with open(os.path.join(directory, "config.json")) as file:
        model = Jamba(json.load(file))
    tensors = load_file(os.path.join(directory, "model.safetensors"))
    with torch.no_grad():
        for name, tensor in checkpoint_names(model):
            tensor.copy_(tensors.pop(name))
    assert not tensors, f"not understood: {sorted(tensors)}"
    return model.to(device)


# ---------------------------------------------------------------------------------------------
# Training

def make_batches(requests, batches):
    for request in iter(requests.get, None):
        batches.put(text.training_batch(*request))


class Batches:
    """Worker processes that make text ahead of its use."""

    def __init__(self, workers, seed, tokens):
        context = multiprocessing.get_context("fork")  # before CUDA is touched
        self.requests, self.batches = context.Queue(), context.Queue()
        self.seed, self.tokens, self.asked = seed, tokens, 0
        self.ahead = 4 * workers
        self.workers = [context.Process(target=make_batches, args=(self.requests, self.batches), daemon=True)
                        for _ in range(workers)]
        for worker in self.workers:
            worker.start()

    def ask(self, length):
        self.requests.put((f"{self.seed} {self.asked}", self.tokens // length, length + 1, UNANSWERABLE))
        self.asked += 1

    def next(self, length):
        """A batch; of `length` once those asked for earlier are used up."""
        self.ask(length)
        while self.asked < self.ahead:
            self.ask(length)
        return torch.from_numpy(self.batches.get())

    def close(self):
        for worker in self.workers:
            worker.terminate()


class Trainer:
    def __init__(self, model, rate):
        self.model, self.peak = model, rate
        device = model.embedding.device
        self.cuda = device.type == "cuda"
        # A tensor, so that recorded steps see it change.
        self.rate = torch.tensor(0.0, device=device) if self.cuda else 0.0
        matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith("A_log")]
        others = [p for n, p in model.named_parameters() if p.dim() == 1 or n.endswith("A_log")]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=self.rate, betas=(0.9, 0.97), fused=True, capturable=self.cuda)
        self.recorded = {}  # length: (graph, its input, its statistics)
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None
        if self.cuda:
            model.compile_parts()

    def set_rate(self, step, progress):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        rate = self.peak * min(1.0, (step + 1) / 300) * decay
        self.model.loss_weights[text.IS_TEXT] = max(LOSS_WEIGHTS[text.IS_TEXT], EARLY_TEXT_WEIGHT * (1 - progress / 0.05))
        if self.cuda:
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def work(self, batch):
        self.optimizer.zero_grad(set_to_none=True)
        loss, statistics = self.model.loss(batch[0], batch[1], batch.shape[2] - 1)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return statistics

    def step(self, batch):
        """Loss, first bytes right, how many they are, balance; still on the device."""
        if not self.cuda:
            return self.work(batch)
        length = batch.shape[2] - 1
        if length not in self.recorded:
            # An ordinary step first, which compiles whatever is new, then the recording.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                static = batch.cuda()
                statistics = self.work(static)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                recorded = self.work(static)
            self.recorded[length] = graph, static, recorded
            return statistics.clone()
        graph, static, statistics = self.recorded[length]
        static.copy_(batch.pin_memory(), non_blocking=True)
        graph.replay()
        return statistics


def train(options):
    workers = options.workers or max(1, (os.cpu_count() or 2) - 1)
    batches = Batches(workers, options.seed, options.tokens)
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = load(options.init, device) if options.init else Jamba(CONFIG).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, {workers} text workers", flush=True)
    trainer = Trainer(model, options.rate)
    choose = random.Random(options.seed)
    started = begun = shown = saved = time.time()
    step, tokens, sums, tokens_shown = 0, 0, {}, 0
    while True:
        elapsed = time.time() - begun
        progress = step / options.steps if options.steps else elapsed / (60 * options.minutes)
        progress = options.begin + (1 - options.begin) * progress
        if progress >= 1:
            break
        lengths = [length for length, start in CURRICULUM if start <= progress and length <= options.longest]
        length = choose.choice(lengths) if choose.random() < SHORTER else lengths[-1]
        batch = batches.next(length)
        trainer.set_rate(step, progress)
        statistics = trainer.step(batch)
        length = batch.shape[2] - 1
        sums[length] = sums[length] + statistics if length in sums else statistics.clone()
        counts = sums.setdefault(-length, 0)
        sums[-length] = counts + 1
        step += 1
        if step == 1:  # all is compiled now
            statistics.tolist()
            begun = shown = saved = time.time()
        tokens += batch.shape[1] * length
        if step % options.show == 0:
            now = time.time()
            parts = []
            for length in sorted(l for l in sums if l > 0):
                loss, right, asked, balance = sums[length].tolist()
                parts.append(f"{length}: {loss / sums[-length]:.3f} {100 * right / max(asked, 1):.2f}%")
            print(f"{now - begun:7.1f} s  step {step:6d}  {tokens / 1e6:7.1f} Mtok  {(tokens - tokens_shown) / 1e6 / (time.time() - shown):.2f} Mtok/s"
                  f"  balance {balance / sums[-length]:.3f}  loss, first bytes right at {'  '.join(parts)}", flush=True)
            shown, tokens_shown, sums = now, tokens, {}
            if not all(math.isfinite(p) for p in statistics.tolist()):
                sys.exit("the loss is not finite")
        if time.time() - saved > 30:
            saved = time.time()
            save(model, options.out)
    save(model, options.out)
    batches.close()
    print(f"done: {step} steps, {tokens / 1e6:.0f} Mtok, {time.time() - begun:.0f} s ({time.time() - started:.0f} with compiling); {options.out} written", flush=True)


# ---------------------------------------------------------------------------------------------
# Evaluation

def lay_out(document, turns):
    """The dialogue's tokens, and for each answer where its bytes and <eos> lie."""
    tokens, spans = text.encode(document + "\n\n"), []
    for question, answer in turns:
        tokens += text.encode(f"Q: {question}\nA:")
        answered = text.encode(" " + answer) + [text.EOS]
        spans.append((len(tokens), len(tokens) + len(answered)))
        tokens += answered + text.encode("\n")
    return tokens, spans


def lay_out_job(job):
    return lay_out(*text.evaluation_document(*job))


@torch.no_grad()
def answers_right(model, dialogues):
    """For each dialogue, for each answer: would greedy decoding give all of it, and then stop?

    It would exactly if at each of its tokens, given those before, the likeliest is the expected one;
    so one pass over the dialogue tells.
    """
    device = model.embedding.device
    length = max(len(tokens) for tokens, _ in dialogues)
    length += -length % scan.CHUNK
    batch = torch.full((len(dialogues), length), text.PAD)
    for row, (tokens, _) in enumerate(dialogues):
        batch[row, : len(tokens)] = torch.tensor(tokens)
    batch = batch.to(device)
    x, _ = model.hidden(batch.flatten(), length)
    places = [(row, turn, row * length + at) for row, (_, spans) in enumerate(dialogues)
              for turn, span in enumerate(spans) for at in range(*span)]
    at = torch.tensor([place for _, _, place in places], device=device)
    right = (model.logits(x[at - 1]).argmax(-1) == batch.flatten()[at]).tolist()
    results = [[True] * len(spans) for _, spans in dialogues]
    for (row, turn, _), ok in zip(places, right):
        results[row][turn] &= ok
    return results


def evaluate(options):
    lengths = options.lengths or sorted(EVAL_DOCUMENTS)
    pool = multiprocessing.get_context("fork").Pool(options.workers or os.cpu_count())
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    model = load(options.eval, device)
    print("length | documents | first question | two more questions | a fourth: not stated | seconds")
    for length in lengths:
        documents = options.documents or EVAL_DOCUMENTS.get(length, 256)
        begun = time.time()
        dialogues = pool.map(lay_out_job, [(options.seed, length, i) for i in range(documents)])
        rows = max(1, (1 << 18 if device == "cuda" else 1 << 13) // length)
        results = []
        for i in range(0, documents, rows):
            results += answers_right(model, dialogues[i : i + rows])
        percent = lambda oks: f"{100 * sum(oks) / max(1, len(oks)):.2f} % of {len(oks)}"
        print(f"{length} | {documents} | {percent([r[0] for r in results])} | {percent([ok for r in results for ok in r[1:-1]])}"
              f" | {percent([r[-1] for r in results])} | {time.time() - begun:.1f}", flush=True)
        if options.wrong:
            wrong = [(d, r) for d, r in zip(dialogues, results) if not all(r)][: options.wrong]
            for (tokens, spans), oks in wrong:
                asked = "".join(chr(t - 3) if t > 2 else "<eos>" for t in tokens[spans[0][0] - 80 :])
                print(oks, repr(asked), flush=True)


def write_questions(options):
    with open(options.jsonl, "w") as file:
        for index in range(options.questions):
            document, turns = text.evaluation_document(options.seed, options.length, index)
            question, answer = turns[0]
            if options.chat:
                asked = {"messages": [{"role": "system", "content": document}, {"role": "user", "content": question}]}
            else:
                asked = {"prompt": text.raw_prompt(document, question)}
            file.write(json.dumps({**asked, "answer": answer}, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="model", help="directory for the checkpoint (default: model)")
    parser.add_argument("--minutes", type=float, default=13, help="how long to train; curriculum and learning rate follow the clock")
    parser.add_argument("--steps", type=int, help="train so many steps instead, however long they take")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument("--longest", type=int, default=16384, help="longest training sequence")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, help="processes that make text (default: all cores but one)")
    parser.add_argument("--init", help="checkpoint directory to start from")
    parser.add_argument("--begin", type=float, default=0.0, help="with --init: how much of the curriculum lies behind, 0 to 1")
    parser.add_argument("--show", type=int, default=500, help="steps between two lines of progress")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--eval", metavar="CHECKPOINT", help="print accuracy by length")
    parser.add_argument("--lengths", type=int, nargs="+", help="lengths for --eval, in tokens")
    parser.add_argument("--documents", type=int, help="documents for each length of --eval")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers for --eval to show")
    parser.add_argument("--questions", type=int, help="write so many evaluation questions as JSON lines, to --jsonl")
    parser.add_argument("--length", type=int, default=2048, help="tokens in each of the --questions' prompts, about")
    parser.add_argument("--jsonl", default="questions.jsonl")
    parser.add_argument("--chat", action="store_true", help="write the --questions as chat messages, not as prompts")
    parser.add_argument("--check", action="store_true", help="compare the fused scan with the plain one")
    options = parser.parse_args()
    if options.check:
        print("largest relative differences, F32: ", scan.compare())
        print("largest relative differences, BF16:", scan.compare(dtype=torch.bfloat16))
    elif options.eval:
        evaluate(options)
    elif options.questions:
        write_questions(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
