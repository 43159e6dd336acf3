"""Figures by adapter, read back with the parser of Prometheus' own client."""

from __future__ import annotations

import openai
from prometheus_client.parser import text_string_to_metric_families

from helpers.http_server import HTTP, USER


def figures(url: str) -> dict[tuple[str, str | None], float]:
    """Return the samples by name and adapter, buckets and reasons added up."""
    text = HTTP.get(f"{url}/metrics", headers={"Authorization": f"Bearer {USER}"}).text
    found: dict[tuple[str, str | None], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                key = sample.name, sample.labels.get("adapter")
                found[key] = found.get(key, 0) + sample.value
    return found


def test_figures_by_adapter(url: str, client: openai.OpenAI) -> None:
    before = figures(url)
    prompt = "A text that fills more than one page of keys and values, so that it is found again."
    for _ in range(2):
        client.completions.create(model="blue", prompt=prompt, max_tokens=5, temperature=0, logit_bias={"2": -100})
    after = figures(url)

    def change(name: str, adapter: str | None = "blue") -> float:
        return after.get((f"lorakeet_{name}", adapter), 0) - before.get((f"lorakeet_{name}", adapter), 0)

    assert change("requests_total") == 2 and change("new_tokens_total") == 10
    assert change("prompt_tokens_total") == 2 * len(prompt) and change("cached_tokens_total") == 64
    assert change("time_to_first_token_seconds_count") == 2 and change("time_between_tokens_seconds_count") == 8
    assert change("queue_seconds_count") == 2 and change("time_to_first_token_seconds_sum") > 0
    assert change("requests_total", "red") == 0
    assert after["lorakeet_adapters", None] >= 2 and after["lorakeet_adapter_bytes", "red"] > 0
    assert {("lorakeet_waiting", None), ("lorakeet_running", None), ("lorakeet_pages_free", None)} <= set(after)


def test_names_that_are_not_served_make_no_figures(url: str) -> None:
    headers = {"Authorization": f"Bearer {USER}"}
    HTTP.post(f"{url}/v1/completions", json={"model": "wild-name", "prompt": "x"}, headers=headers)
    assert "wild-name" not in HTTP.get(f"{url}/metrics", headers=headers).text
