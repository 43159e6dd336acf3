"""Chat templates in the styles of real models, each with its expected rendering, written by hand.

``pieces(messages)`` returns the text in pieces, each with whether the assistant writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
Pieces = list[tuple[str, bool]]

SPECIALS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"),
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def chat_tokenizer(template: str | None, merges: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Build a tokenizer with an id for each byte and each special token; ``merges``: pairs that become one token, "a b"."""
    pairs = [tuple(merge.split()) for merge in merges]
    vocabulary = [*SPECIALS, *ALPHABET, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template, name_or_path="a-model"
    )
    made.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    return made


@dataclass(frozen=True)
class Style:
    """A template, its expected rendering, and whether it takes a system turn."""

    template: str
    pieces: Callable[[Messages], Pieces]
    system: bool = True


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        written = m["role"] == "assistant"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (f"{m['content']}<|im_end|>", written), ("\n", False)]
    return pieces


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HELPFUL = (  # a default system turn if none is given
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def helpful(messages: Messages) -> Pieces:
    own = [] if messages[0]["role"] == "system" else [{"role": "system", "content": "Be helpful."}]
    return chatml([*own, *messages])


LLAMA3 = (  # trims contents
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3(messages: Messages) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant"))
    return pieces


MISTRAL = (  # the prompt ends where the user's turn ends; the system turn is a part of the first one
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def mistral(messages: Messages) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    first = ""
    for m in messages:
        if m["role"] == "system":
            first = m["content"] + "\n\n"
        elif m["role"] == "user":
            pieces.append((f"[INST] {first}{m['content']} [/INST]", False))
            first = ""
        else:
            pieces.append((f" {m['content']}</s>", True))
    return pieces


GEMMA = (  # no system turn, another name for the assistant, trimmed contents
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma(messages: Messages) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        role = "model" if m["role"] == "assistant" else m["role"]
        written = role == "model"
        pieces += [
            (f"<start_of_turn>{role}\n", False),
            (f"{m['content'].strip()}<end_of_turn>", written),
            ("\n", False),
        ]
    return pieces


THINKING = (  # an empty thought before the last answer only: earlier turns are rendered in another way
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' + said }}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def thinking(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for number, m in enumerate(messages):
        written = m["role"] == "assistant"
        said = m["content"].lstrip("\n") if written else m["content"]
        thought = "<think>\n\n</think>\n\n" if written and number + 1 == len(messages) else ""
        pieces += [(f"<|im_start|>{m['role']}\n", False), (f"{thought}{said}<|im_end|>", written), ("\n", False)]
    return pieces


PHI = (  # the end token follows the whole conversation
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for number, m in enumerate(messages):
        last = number + 1 == len(messages)
        written = m["role"] == "assistant"
        pieces.append((f"<|{m['role']}|>\n", False))
        pieces.append((m["content"] + ("<|end|>\n</s>" if last else "<|end|>"), written))
        pieces += [] if last else [("\n", False)]
    return pieces


STYLES = {
    "chatml": Style(CHATML, chatml),
    "marked": Style(MARKED, chatml),
    "helpful": Style(HELPFUL, helpful),
    "llama3": Style(LLAMA3, llama3),
    "mistral": Style(MISTRAL, mistral),
    "gemma": Style(GEMMA, gemma, system=False),
    "thinking": Style(THINKING, thinking),
    "phi": Style(PHI, phi),
}
