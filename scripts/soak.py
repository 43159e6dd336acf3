"""Serve a model at twice what it can answer, and check that nothing is lost and no memory stays behind.

Usage::

    python scripts/soak.py --minutes 30 --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters my-adapters --bits 8

There are twice as many callers as the server has places for requests that run and that wait; who is refused comes again after
Retry-After. Some read slowly, some leave, and an admin replaces an adapter again and again. At the end every accepted request
was answered or its caller had left, all pages are free, and memory is flat. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

from served_process import ADMIN, BASE, USER, ServedProcess

#: Requests that run together, and that wait.
ROWS, QUEUE = 8, 16
#: Seconds. The server's Retry-After.
RETRY_AFTER = 1
#: Seconds after which an answer that has not come counts as lost.
PATIENCE = 180.0
#: Share of the first third's resident memory by which the last third's may be larger.
GROWTH = 0.05
#: Kind of a caller -> its share.
MIX = {
    "chat": 4,
    "text": 4,
    "stream": 6,
    "many": 2,
    "json": 1,
    "slow": 2,
    "leaves": 3,
    "hangs up": 2,
    "lists": 1,
    "wrong": 1,
}
#: Seconds between two events that a slow reader takes.
SLOW = 0.25
WORDS = (
    "sea",
    "sky",
    "above",
    "an",
    "old",
    "harbour",
    "where",
    "boats",
    "come",
    "home",
    "with",
    "the",
    "evening",
    "wind",
)


@dataclass
class Tally:
    """Outcomes of the callers, and what was wrong.

    Attributes:
        outcomes: Kind of a caller and outcome -> number.
        seconds: Seconds from a call to its whole answer.
        problems: Sentences; each is a failure of the soak.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """Return the number of callers with an outcome."""
        return sum(number for (_, one), number in self.outcomes.items() if one == outcome)


class Callers:
    """Callers of all kinds, each one request."""

    def __init__(self, url: str, names: list[str], tokens: int, seed: int) -> None:
        self.random, self.tokens, self.tally = random.Random(seed), tokens, Tally()
        self.models = [BASE, *names]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(
            base_url=url, timeout=PATIENCE, limits=limits, headers={"Authorization": f"Bearer {USER}"}
        )

    async def call(self, kind: str) -> str:
        """Make one call, and return and count its outcome."""
        start = time.perf_counter()
        try:
            outcome = await asyncio.wait_for(self._call(kind), PATIENCE)
        except (TimeoutError, httpx.HTTPError) as error:
            outcome = "lost"
            self.tally.problems.append(f"{kind}: {type(error).__name__} {error}")
        self.tally.outcomes[kind, outcome] += 1
        if outcome == "answered":
            self.tally.seconds.append(time.perf_counter() - start)
        return outcome

    async def _call(self, kind: str) -> str:
        if kind == "lists":
            route = self.random.choice(["/v1/models", "/v1/adapters", "/metrics", "/health", "/ready"])
            return self._outcome(kind, await self.http.get(route))
        route, body = self._body(kind)
        if kind == "hangs up":
            return await self._hang_up(route, body)
        if body.get("stream"):
            return await self._read(kind, route, body)
        return self._outcome(kind, await self.http.post(route, json=body))

    def _body(self, kind: str) -> tuple[str, dict[str, Any]]:
        text = " ".join(self.random.choices(WORDS, k=self.random.randint(4, 24)))
        body: dict[str, Any] = {
            "model": self.random.choice(self.models),
            "max_tokens": self.random.randint(1, 2 * self.tokens),
            "temperature": self.random.choice([0, 0.7, 1]),
        }
        if kind == "text":
            return "/v1/completions", {**body, "prompt": [text] * self.random.randint(1, 2), "logprobs": 2}
        messages = [{"role": "system", "content": "Be brief. " * 20}, {"role": "user", "content": text}]
        more: dict[str, dict[str, Any]] = {
            "many": {"n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["\n\n"], "presence_penalty": 0.5},
            "json": {"response_format": {"type": "json_object"}},
            "wrong": self.random.choice([{"model": "nothing-of-this-name"}, {"temperature": 9}, {"suffix": "x"}]),
        }
        streams = kind in ("stream", "slow", "leaves") or self.random.random() < 0.3
        return "/v1/chat/completions", {**body, "messages": messages, "stream": streams, **more.get(kind, {})}

    async def _read(self, kind: str, route: str, body: dict[str, Any]) -> str:
        """Read a stream to its end, or leave after a few events."""
        left = self.random.randint(1, 4) if kind == "leaves" else 0
        async with self.http.stream("POST", route, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._outcome(kind, answer)
            ends, last = 0, ""
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    last, left = line, left - 1
                    ends += '"finish_reason": null' not in line and '"finish_reason"' in line
                    self._check_event(kind, line)
                if kind == "leaves" and left <= 0:
                    return "left"
                if kind == "slow":
                    await asyncio.sleep(SLOW)
            if last != "data: [DONE]" or ends != body.get("n", 1):
                self.tally.problems.append(f"{kind}: a stream has {ends} ends, its last line is {last[:100]!r}")
                return "lost"
        return "answered"

    def _check_event(self, kind: str, line: str) -> None:
        if line.startswith('data: {"error"'):
            self.tally.problems.append(f"{kind}: {line[:300]}")

    async def _hang_up(self, route: str, body: dict[str, Any]) -> str:
        """Close the connection while the answer is computed."""
        try:
            patience = self.random.uniform(0.01, 1.0)
            return self._outcome("hangs up", await self.http.post(route, json=body, timeout=patience))
        except httpx.TimeoutException:
            return "left"

    def _outcome(self, kind: str, answer: httpx.Response) -> str:
        status = answer.status_code
        if status == 429 and answer.headers.get("retry-after") == str(RETRY_AFTER):
            return "refused"
        if status < 300:
            return "answered"
        if (kind == "wrong" and status in (400, 404)) or (status == 404 and "model_not_found" in answer.text):
            return "rejected"  # as it should be; an adapter may be unloaded at this moment
        self.tally.problems.append(f"{kind}: status {status}: {answer.text[:300]}")
        return "lost"

    def _kind(self) -> str:
        return self.random.choices(list(MIX), list(MIX.values()))[0]

    async def ask(self, end: float) -> None:
        """Call again and again until a moment; after a refusal, wait as long as the server says."""
        while time.perf_counter() < end:
            if await self.call(self._kind()) == "refused":
                await asyncio.sleep(self.random.uniform(0.5, 1.5) * RETRY_AFTER)

    async def manage(self, name: str, until: asyncio.Event) -> int:
        """Replace, unload and load an adapter until the end; return how many times."""
        changes, admin = 0, {"Authorization": f"Bearer {ADMIN}"}
        while not until.is_set():
            gone = changes % 3 == 2
            path = f"/v1/adapters/{name}" if gone else "/v1/adapters"
            body = None if gone else {"name": name}
            answer = await self.http.request("DELETE" if gone else "POST", path, json=body, headers=admin)
            if answer.status_code != 200:
                self.tally.problems.append(f"admin: status {answer.status_code}: {answer.text[:300]}")
            changes += 1
            await asyncio.sleep(1)
        return changes


async def sample(server: ServedProcess, callers: Callers, every: float, until: asyncio.Event) -> list[dict[str, float]]:
    """Return the server's figures in the course of time.

    Args:
        server: The served model.
        callers: Callers under way, whose outcomes are part of the figures.
        every: Seconds between two samples.
        until: Set at the end.
    """
    samples: list[dict[str, float]] = []
    start = time.perf_counter()
    while not until.is_set():
        figures = await asyncio.to_thread(server.figures)
        tally = callers.tally
        samples.append(
            {
                "seconds": time.perf_counter() - start,
                "resident_mb": server.resident_mb(),
                **{name: figures[f"lorakeet_{name}"] for name in ("pages_free", "pages_cached", "waiting", "running")},
                **{name: tally.count(name) for name in ("answered", "refused", "left", "rejected", "lost")},
            }
        )
        print("  ".join(f"{name} {value:,.0f}" for name, value in samples[-1].items()), flush=True)
        await asyncio.sleep(every)
    return samples


async def soak(server: ServedProcess, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Let all callers ask for a while, and return the report."""
    callers, until = Callers(server.url, names, options.tokens, options.seed), asyncio.Event()
    seconds = 60 * options.minutes
    samples = asyncio.ensure_future(sample(server, callers, min(10.0, seconds / 30), until))
    changes = asyncio.ensure_future(callers.manage(names[-1], until))
    end = time.perf_counter() + seconds
    await asyncio.gather(*(callers.ask(end) for _ in range(options.callers)))
    until.set()
    taken, changed = await samples, await changes
    await callers.http.aclose()
    rest = await asyncio.to_thread(drained, server)
    return report(callers.tally, taken, rest, changed)


def drained(server: ServedProcess) -> dict[str, float]:
    """Return the server's figures once nothing runs, or after a minute."""
    for _ in range(120):
        figures = server.figures()
        if not figures["lorakeet_running"] and not figures["lorakeet_waiting"]:
            break
        time.sleep(0.5)
    return figures


def report(tally: Tally, samples: list[dict[str, float]], rest: dict[str, float], changes: int) -> dict[str, Any]:
    """Return the figures, with the problems found.

    Args:
        tally: Outcomes of the callers.
        samples: The server's figures in the course of time.
        rest: The server's figures at the end, when nothing runs.
        changes: Loads, replacements and unloads.
    """
    third = max(1, len(samples) // 3)
    first, last = (
        statistics.median(one["resident_mb"] for one in part) for part in (samples[:third], samples[-third:])
    )
    slope = statistics.linear_regression(
        [one["seconds"] for one in samples], [one["resident_mb"] for one in samples]
    ).slope
    outcomes = {name: tally.count(name) for name in ("answered", "refused", "left", "rejected", "lost")}
    unfree = rest["lorakeet_pages"] - rest["lorakeet_pages_free"] - rest["lorakeet_pages_cached"]
    problems = list(tally.problems)
    checks = {
        "as many were refused as accepted": 2 * outcomes["refused"] >= sum(outcomes.values()),
        "none was lost": not outcomes["lost"],
        "nothing runs": not rest["lorakeet_running"] + rest["lorakeet_waiting"],
        "all pages are free or cached": not unfree,
        f"memory grew by at most {GROWTH:.0%}": last <= (1 + GROWTH) * first,
    }
    problems += [f"not so: {name}" for name, holds in checks.items() if not holds]
    times = sorted(tally.seconds) or [0.0]
    return {
        "seconds": round(samples[-1]["seconds"]),
        "calls": sum(tally.outcomes.values()),
        **outcomes,
        "changes of an adapter": changes,
        "whole answer, median, s": round(statistics.median(times), 2),
        "whole answer, p99, s": round(times[int(0.99 * (len(times) - 1))], 2),
        "resident MB, first third": round(first, 1),
        "resident MB, last third": round(last, 1),
        "resident MB an hour": round(3600 * slope, 1),
        "pages": int(rest["lorakeet_pages"]),
        "pages neither free nor cached": int(unfree),
        "by kind": {f"{kind}: {outcome}": number for (kind, outcome), number in sorted(tally.outcomes.items())},
        "problems": problems,
    }


def main() -> int:
    """Parse the command line and soak; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", required=True, help="base to serve")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters; the last one is replaced")
    parser.add_argument("--bits", type=int, help="8: the base in 8 bits")
    parser.add_argument("--tokens", type=int, default=24, help="mean of the new tokens of an answer")
    parser.add_argument("--callers", type=int, default=2 * (ROWS + QUEUE), help="twice as many as there is room for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the report")
    options = parser.parse_args()
    names = sorted(one.name for one in options.adapters.iterdir() if one.is_dir())
    limits = ["--max-rows", str(ROWS), "--queue", str(QUEUE), "--cache-mb", "256"]
    limits += ["--bits", str(options.bits)] if options.bits else []
    with tempfile.TemporaryDirectory() as folder:
        with ServedProcess(Path(folder), options.model, options.adapters, *limits) as server:
            found = asyncio.run(soak(server, names, options))
            found["exit code of the server"] = server.stop()
        found["problems"] += server.faults()
    if found["exit code of the server"]:
        found["problems"].append("the server ended with an error")
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
