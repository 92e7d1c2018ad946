"""Traffic for a server of OpenAI's completions: many clients, random lengths, cancellations, bad requests.

    load.py http://127.0.0.1:8080 --clients 64 --seconds 600 --pid PID
    load.py http://127.0.0.1:8081 --kind llama --clients 64 --seconds 600     llama-server, side by side

Every request is drawn from a seed and there are `--shapes` of them, so that each comes back: what is generated for a
shape alone, before the traffic, is what it must be in the traffic, token for token (`--kind strata`; llama-server's
tokens depend on what is computed beside them and are counted only). Prompts share beginnings, as those of a
document's questions do. Prints one object: requests, errors, wrong tokens, times to the first token, tokens a second,
memory of the process before and after.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from urllib.parse import urlsplit

SENTENCES = [
    "Greyford lies on the river Lunn and was founded in 1342.",
    "Mara Tolvin, a lighthouse keeper, lives in Greyford.",
    "Captain Bren sails the Silver Heron.",
    "The tide was low, and the old crane creaked beside the quay.",
    "In 1872 the mill burned down.",
    "Port Vask has a population of 12,480.",
    "The boat of Hugo is the Morning Tern.",
    "Ines Quill has the day off on Thursday, and earns 310 coins a month.",
]


class Refused(Exception):
    """An answer that is an error, with its status."""


def shapes(count, most_prompt, most_tokens, seed, documents=0):
    """Requests that come again and again: a beginning that several share, an end of their own. With `documents` the
    beginnings are so many, whole, and every end is another."""
    draw = random.Random(seed)
    sentences = max(200, most_prompt // 30)
    stems = [" ".join(draw.choices(SENTENCES, k=sentences)) for _ in range(documents or 6)]
    found = []
    for i in range(count):
        # As many short ones as long ones, by the logarithm of their length.
        length = most_prompt if documents else int(8 * (most_prompt / 8) ** draw.random())
        end = f" {i} " if documents else " "
        end += draw.choice(SENTENCES)[: draw.randint(5, 40)]
        prompt = draw.choice(stems)[:length] + end
        found.append({"prompt": prompt, "max_tokens": draw.randint(1, most_tokens)})
    return found


def bad_bodies(model):
    return [
        b"{",
        b'{"prompt": [' + b"[" * 5000,
        json.dumps({"model": model, "prompt": "a", "temperature": "hot"}).encode(),
        json.dumps({"model": model, "prompt": "a" * 400_000, "max_tokens": 5}).encode(),
        b'{"prompt": "\xff"}',
    ]


class Client:
    """One connection a request, as the worst of clients have it."""

    def __init__(self, url, kind, model):
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port or 80
        self.kind, self.model = kind, model

    async def open(self, body, path="/v1/completions"):
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost:{self.port}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        try:
            await writer.drain()
        except ConnectionError:
            pass  # refused early; the answer says why
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        return status, reader, writer

    def body(self, shape):
        body = {**shape, "model": self.model, "stream": True, "temperature": 0, "ignore_eos": True}
        if self.kind == "strata":
            body["return_token_ids"] = True
        else:
            body["cache_prompt"] = True
        return json.dumps(body).encode()

    async def complete(self, shape, leave_after=None):
        """Tokens (or pieces of text), and seconds to the first and from each to the next."""
        start = last = time.monotonic()
        status, reader, writer = await self.open(self.body(shape))
        said, times = [], []
        try:
            if status != 200:
                raise Refused(f"{status}: {(await reader.read(2000))[:300]!r}")
            while line := await reader.readline():
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise Refused(str(event["error"]))
                for choice in event["choices"]:
                    piece = choice.get("token_ids", [])
                    if self.kind != "strata":
                        # An event a token, whose text may be empty; the last tells why it ended.
                        piece = [choice["text"]] if choice["finish_reason"] is None else []
                    if piece:
                        now = time.monotonic()
                        times.append(now - last)
                        last = now
                    said.extend(piece)
                if leave_after is not None and len(said) >= leave_after:
                    break
        finally:
            writer.close()
        return said, times, last - start

    async def bad(self, body):
        status, reader, writer = await self.open(body)
        said = await reader.read(2000)
        writer.close()
        return status, said


def resident_mb(pid):
    if pid is None:
        return None
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def quantile(values, q):
    values = sorted(values)
    return round(values[min(len(values) - 1, int(q * len(values)))], 4) if values else None


class Tally:
    def __init__(self):
        self.done = self.left = self.bad = self.tokens = self.wrong = 0
        self.first, self.between, self.errors = [], [], []
        self.given = 0

    def next(self):
        self.given += 1
        return self.given - 1

    def error(self, what):
        if len(self.errors) < 20:
            print(f"error: {what}", file=sys.stderr)
        self.errors.append(str(what))


async def one_client(client, number, args, all_shapes, alone, tally, until):
    draw = random.Random(args.seed * 10_000 + number)
    bodies = bad_bodies(client.model)
    while time.monotonic() < until:
        try:
            luck = draw.random()
            if luck < args.bad:
                status, said = await client.bad(draw.choice(bodies))
                tally.bad += 1
                if not 400 <= status < 500:
                    tally.error(f"a bad request was answered {status}: {said[:200]!r}")
                continue
            # A question about a document is asked once.
            i = draw.randrange(len(all_shapes)) if not args.documents else tally.next()
            leaves = luck < args.bad + args.leave
            after = draw.randint(0, all_shapes[i]["max_tokens"]) if leaves else None
            said, times, _ = await client.complete(all_shapes[i], after)
            tally.tokens += len(said)
            if times:
                tally.first.append(times[0])
                tally.between.extend(times[1:])
            if leaves:
                tally.left += 1
                continue
            tally.done += 1
            if alone is not None and said != alone[i]:
                tally.wrong += 1
                tally.error(f"shape {i}: {said} instead of {alone[i]}")
        except (Refused, OSError, ValueError, IndexError) as error:
            tally.error(f"{type(error).__name__}: {error}")


async def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--kind", choices=["strata", "llama"], default="strata")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--shapes", type=int, default=48, help="different requests")
    parser.add_argument("--most-prompt", type=int, default=2000, help="bytes of the longest prompt")
    parser.add_argument("--most-tokens", type=int, default=64, help="tokens of the longest answer")
    parser.add_argument("--documents", type=int, default=0, help="questions about so many documents of --most-prompt "
                        "bytes, none asked twice, nothing known before")
    parser.add_argument("--leave", type=float, default=0.15, help="share of clients that leave early")
    parser.add_argument("--bad", type=float, default=0.05, help="share of bad requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rest", type=float, default=60, help="seconds before its memory is told [default: 60]")
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    args = parser.parse_args()

    client = Client(args.url, args.kind, args.model)
    count = 100_000 if args.documents else args.shapes
    all_shapes = shapes(count, args.most_prompt, args.most_tokens, args.seed, args.documents)
    alone = None
    if not args.documents:
        alone = [(await client.complete(shape))[0] for shape in all_shapes]
        alone = alone if args.kind == "strata" else None
    before = resident_mb(args.pid)
    tally, start = Tally(), time.monotonic()
    until = start + args.seconds
    clients = [
        one_client(client, number, args, all_shapes, alone, tally, until)
        for number in range(args.clients)
    ]
    await asyncio.gather(*clients)
    took = time.monotonic() - start
    # Connections end, and the allocator gives back.
    await asyncio.sleep(args.rest)
    print(json.dumps({
        "kind": args.kind, "clients": args.clients, "seconds": round(took, 1),
        "answers": tally.done, "left": tally.left, "bad_requests": tally.bad,
        "errors": len(tally.errors), "wrong": tally.wrong,
        "compared": alone is not None,
        "first_token_p50": quantile(tally.first, 0.5), "first_token_p99": quantile(tally.first, 0.99),
        "between_tokens_p50": quantile(tally.between, 0.5),
        "between_tokens_p99": quantile(tally.between, 0.99),
        "tokens_per_second": round(tally.tokens / took, 1),
        "answers_per_second": round(tally.done / took, 2),
        "resident_mb_before": before, "resident_mb_after": resident_mb(args.pid),
    }))
    sys.exit(1 if tally.errors else 0)


if __name__ == "__main__":
    asyncio.run(main())
