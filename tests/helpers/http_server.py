"""A served tiny model: two adapters over a random Llama that writes bytes, with a server in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn

from helpers.tiny import shake
from helpers.tiny_base import byte_tokenizer, save_base
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.config import BaseSettings
from lorakeet.lora.config import LoraConfig
from lorakeet.serve.http.access.gate import Gate
from lorakeet.serve.http.access.keys import Keys
from lorakeet.serve.http.app import make_app
from lorakeet.serve.http.service import Limits
from lorakeet.serve.http.start import Served, open_service

USER, ADMIN = "a-key-of-a-caller", "a-key-of-an-admin"
BASE = "tiny"
#: Client for all calls that are not by OpenAI's; to make one takes 50 ms.
HTTP = httpx.Client()
#: Template in the manner of Qwen's: tools in the system turn, calls between tags.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    " Answer with <tool_call>JSON</tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_base(folder: Path) -> Path:
    """Save the tiny base of ``tiny_base`` with a chat template."""
    save_base(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_adapters(base: Path, folder: Path, names: dict[str, int]) -> Path:
    """Save an adapter for each name, whose number is the seed of its random weights."""
    from lorakeet.base.load import load_base

    for name, seed in names.items():
        model = load_base(BaseSettings(model=str(base), dtype="fp32")).model
        config = LoraConfig(r=2 + seed % 3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted: PeftModel = get_peft_model(model, config)
        shake(adapted, seed=seed)
        adapted.save_pretrained(str(folder / name))
    return folder


def tiny_app(folder: Path, *, keys: Keys | None = None, limits: Limits | None = None, **options: Any) -> Gate:
    """Save and open the tiny base with the adapters ``red`` and ``blue``, and ``spare`` on disk alone."""
    base = save_chat_base(folder / "base")
    save_adapters(base, folder / "adapters", {"red": 1, "blue": 2, "spare": 3})
    (folder / "adapters" / "spare").rename(folder / "spare")
    served = Served(folder / "adapters", base_name=BASE)
    settings = BaseSettings(model=str(base), dtype="fp32")
    engine = {"max_rows": 8, "queue": 16, "cache_bytes": 1 << 22, **options}
    service = open_service(settings, served, keys=keys or Keys(), limits=limits or Limits(), engine=engine)
    (folder / "spare").rename(folder / "adapters" / "spare")
    return make_app(service)


@contextmanager
def serving(app: Gate) -> Iterator[str]:
    """Serve an app at a free port inside the block; yields its address."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def tell(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets=sockets)
        started.set()

    server.startup = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
