"""Mamba's selective scan, forward and backward: in plain PyTorch, and fused for CUDA in Triton.

For every channel d with its N states, along a sequence:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]
    y[t] = sum over n of h[t, n] C[t, n]

Inputs lie flat, all sequences one after the other: u, dt are [tokens, D]; B, C [tokens, N];
A is [D, N]; every sequence has `length` tokens.

The fused scan cuts sequences into chunks of CHUNK tokens. Each chunk runs alone from a zero state;
a short pass carries the states from chunk to chunk; each chunk runs again from its true state.
The backward pass does the same from the other end.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no fused scan then
    triton = None

CHUNK = 64  # tokens
CHANNELS = 32  # per program: one warp, a lane for each channel, its N states in that lane's registers


def scan_plain(u, dt, A, B, C, length):
    D, N = A.shape
    u, dt = u.float().view(-1, length, D), dt.view(-1, length, D)
    B, C = B.view(-1, length, N), C.view(-1, length, N)
    h = torch.zeros(u.shape[0], D, N, device=u.device)
    ys = []
    for t in range(length):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1).view(-1, D)


if triton is not None:

    @triton.jit
    def chunk_states(u_ptr, dt_ptr, A_ptr, B_ptr, state_ptr, sum_ptr,
                     D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
        """Each chunk's last state, starting from zero, and the sum of its dt."""
        chunk = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, N)
        A = tl.load(A_ptr + d[None, :] * N + n[:, None])
        h = tl.zeros([N, CHANNELS], tl.float32)
        total = tl.zeros([CHANNELS], tl.float32)
        for i in range(CHUNK):
            t = chunk * CHUNK + i
            dt = tl.load(dt_ptr + t * D + d)
            u = tl.load(u_ptr + t * D + d).to(tl.float32)
            B = tl.load(B_ptr + t * N + n)
            h = tl.exp(dt[None, :] * A) * h + (dt * u)[None, :] * B[:, None]
            total += dt
        tl.store(state_ptr + (chunk * N + n[:, None]) * D + d[None, :], h)
        tl.store(sum_ptr + chunk * D + d, total)

    @triton.jit
    def chunk_carries(dy_ptr, dt_ptr, A_ptr, C_ptr, carry_ptr,
                      D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
        """The backward twin of chunk_states: the gradient that leaves each chunk at its front."""
        chunk = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, N)
        A = tl.load(A_ptr + d[None, :] * N + n[:, None])
        carry = tl.zeros([N, CHANNELS], tl.float32)
        for i in range(CHUNK):
            t = chunk * CHUNK + CHUNK - 1 - i
            dt = tl.load(dt_ptr + t * D + d)
            dy = tl.load(dy_ptr + t * D + d).to(tl.float32)
            C = tl.load(C_ptr + t * N + n)
            carry = tl.exp(dt[None, :] * A) * (carry + dy[None, :] * C[:, None])
        tl.store(carry_ptr + (chunk * N + n[:, None]) * D + d[None, :], carry)

    @triton.jit
    def join_chunks(state_ptr, sum_ptr, A_ptr, chunks, REVERSE: tl.constexpr,
                    D: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr):
        """Replaces what leaves each chunk of a sequence by what enters it."""
        first = tl.program_id(0).to(tl.int64) * chunks
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, N)
        A = tl.load(A_ptr + d[None, :] * N + n[:, None])
        state = tl.zeros([N, CHANNELS], tl.float32)
        for i in range(chunks):
            chunk = first + (chunks - 1 - i if REVERSE else i)
            at = state_ptr + (chunk * N + n[:, None]) * D + d[None, :]
            local = tl.load(at)
            total = tl.load(sum_ptr + chunk * D + d)
            tl.store(at, state)
            state = tl.exp(total[None, :] * A) * state + local

    @triton.jit
    def tile(t, D: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr):
        """Where a program's states of token t are kept: one contiguous piece, [N, CHANNELS]."""
        piece = t * (D // CHANNELS) + tl.program_id(1)
        return (piece * N + tl.arange(0, N)[:, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, :]

    @triton.jit
    def chunk_outputs(u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, state_ptr, y_ptr, h_ptr, KEEP: tl.constexpr,
                      D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
        """y from the states that enter the chunks; with KEEP also h[t-1] for each t."""
        chunk = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, N)
        A = tl.load(A_ptr + d[None, :] * N + n[:, None])
        h = tl.load(state_ptr + (chunk * N + n[:, None]) * D + d[None, :])
        for i in range(CHUNK):
            t = chunk * CHUNK + i
            if KEEP:
                tl.store(h_ptr + tile(t, D, N, CHANNELS), h.to(h_ptr.dtype.element_ty))
            dt = tl.load(dt_ptr + t * D + d)
            u = tl.load(u_ptr + t * D + d).to(tl.float32)
            B = tl.load(B_ptr + t * N + n)
            C = tl.load(C_ptr + t * N + n)
            h = tl.exp(dt[None, :] * A) * h + (dt * u)[None, :] * B[:, None]
            y = tl.sum(h * C[:, None], 0)
            tl.store(y_ptr + t * D + d, y.to(y_ptr.dtype.element_ty))

    @triton.jit
    def chunk_gradients(u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, dy_ptr, h_ptr, carry_ptr,
                        du_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, tokens,
                        D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
        """All gradients; dA for each chunk, dB and dC for each block of channels, to be summed."""
        chunk = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1).to(tl.int64)
        d = block * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, N)
        A = tl.load(A_ptr + d[None, :] * N + n[:, None])
        carry = tl.load(carry_ptr + (chunk * N + n[:, None]) * D + d[None, :])
        dA = tl.zeros([N, CHANNELS], tl.float32)
        for i in range(CHUNK):
            t = chunk * CHUNK + CHUNK - 1 - i
            before = tl.load(h_ptr + tile(t, D, N, CHANNELS)).to(tl.float32)
            dt = tl.load(dt_ptr + t * D + d)
            u = tl.load(u_ptr + t * D + d).to(tl.float32)
            dy = tl.load(dy_ptr + t * D + d).to(tl.float32)
            B = tl.load(B_ptr + t * N + n)
            C = tl.load(C_ptr + t * N + n)
            decay = tl.exp(dt[None, :] * A)
            h = decay * before + (dt * u)[None, :] * B[:, None]
            dh = C[:, None] * dy[None, :] + carry
            carry = decay * dh
            dexponent = carry * before
            dA += dexponent * dt[None, :]
            through_B = tl.sum(dh * B[:, None], 0)
            tl.store(du_ptr + t * D + d, (through_B * dt).to(du_ptr.dtype.element_ty))
            tl.store(ddt_ptr + t * D + d, tl.sum(dexponent * A, 0) + through_B * u)
            tl.store(dB_ptr + (block * tokens + t) * N + n, tl.sum(dh * (dt * u)[None, :], 1))
            tl.store(dC_ptr + (block * tokens + t) * N + n, tl.sum(h * dy[None, :], 1))
        tl.store(dA_ptr + (chunk * N + n[:, None]) * D + d[None, :], dA)

    class FusedScan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, dt, A, B, C, length, keep):
            u, dt, A, B, C = (x.contiguous() for x in (u, dt, A, B, C))
            tokens, D = u.shape
            N = A.shape[1]
            size = dict(D=D, N=N, CHANNELS=CHANNELS, num_warps=1)
            grid = (tokens // CHUNK, D // CHANNELS)
            state = dt.new_empty(tokens // CHUNK, N, D)
            total = dt.new_empty(tokens // CHUNK, D)
            chunk_states[grid](u, dt, A, B, state, total, CHUNK=CHUNK, **size)
            join_chunks[(tokens // length, D // CHANNELS)](state, total, A, length // CHUNK, REVERSE=False, **size)
            y = torch.empty_like(u)
            h = torch.empty((tokens, N, D) if keep else 1, dtype=u.dtype, device=u.device)
            chunk_outputs[grid](u, dt, A, B, C, state, y, h, KEEP=keep, CHUNK=CHUNK, **size)
            ctx.save_for_backward(u, dt, A, B, C, h, total)
            ctx.length = length
            return y

        @staticmethod
        def backward(ctx, dy):
            u, dt, A, B, C, h, total = ctx.saved_tensors
            dy = dy.contiguous()
            tokens, D = u.shape
            N = A.shape[1]
            size = dict(D=D, N=N, CHANNELS=CHANNELS, num_warps=1)
            grid = (tokens // CHUNK, D // CHANNELS)
            carry = dt.new_empty(tokens // CHUNK, N, D)
            chunk_carries[grid](dy, dt, A, C, carry, CHUNK=CHUNK, **size)
            join_chunks[(tokens // ctx.length, D // CHANNELS)](carry, total, A, ctx.length // CHUNK, REVERSE=True, **size)
            du, ddt, dA = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(carry)
            dB, dC = (dt.new_empty(D // CHANNELS, tokens, N) for _ in range(2))
            chunk_gradients[grid](u, dt, A, B, C, dy, h, carry, du, ddt, dA, dB, dC, tokens, CHUNK=CHUNK, **size)
            return du, ddt, dA.sum(0).t(), dB.sum(0), dC.sum(0), None, None


def scan(u, dt, A, B, C, length):
    """The fused scan where it can run (CUDA, whole chunks), else the plain one. Returns y in u's type."""
    if triton is not None and u.is_cuda and length % CHUNK == 0 and A.shape[0] % CHANNELS == 0:
        return FusedScan.apply(u, dt, A, B, C, length, torch.is_grad_enabled())
    return scan_plain(u, dt, A, B, C, length).to(u.dtype)


def compare(device="cuda", D=256, N=16, length=4 * CHUNK, sequences=3, dtype=torch.float32):
    """Largest difference of the fused scan's outputs and gradients from the plain one's, each
    relative to that tensor's largest value."""
    generator = torch.Generator().manual_seed(1)
    tokens = sequences * length
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    inputs = [make(tokens, D).to(dtype), torch.nn.functional.softplus(make(tokens, D) - 3), -torch.exp(make(D, N)),
              make(tokens, N), make(tokens, N)]
    weight = make(tokens, D)
    results = []
    for run in (lambda *x: FusedScan.apply(*x, length, True), lambda *x: scan_plain(*x, length)):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = run(*leaves)
        (y.float() * weight).sum().backward()
        results.append([y.detach()] + [leaf.grad for leaf in leaves])
    return {name: float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for name, a, b in zip(("y", "du", "ddt", "dA", "dB", "dC"), *results)}
