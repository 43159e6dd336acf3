"""Completions are the same alone, in a batch and streamed, contain only new text, and leave the model unchanged."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from helpers.bytewise import byte_tokenizer
from helpers.tiny import ARCHITECTURES, make
from lorakeet.base.load import Base
from lorakeet.errors import ConfigError, DataError
from lorakeet.inference.generate import complete

PROMPTS = ["Two things are infinite:", "Hi", "The fool doth think he is wise, but", "x", "naïve 🙂"]


def greedy_by_hand(model: PreTrainedModel, ids: list[int], count: int, end: int) -> list[int]:
    """Take the most likely next token ``count`` times, without cache, padding or ``generate``."""
    new: list[int] = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == end:
            break
        new.append(token)
    return new


def test_greedy_text_is_what_the_model_says(base: Base) -> None:
    model, tokenizer = base
    texts = complete(model, tokenizer, PROMPTS, max_new_tokens=12, greedy=True, batch_size=1)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        new = greedy_by_hand(model, tokenizer(prompt).input_ids, 12, tokenizer.eos_token_id)
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bert"])
def test_a_batch_writes_what_each_prompt_writes_alone(name: str) -> None:
    model = make(name).float()
    with torch.no_grad():  # small random models repeat one token: let attention and position matter more
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    tokenizer = byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    options = {"max_new_tokens": 10, "greedy": True}
    together = complete(model, tokenizer, PROMPTS, batch_size=8, **options)
    alone = [complete(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    by_three = complete(model, tokenizer, PROMPTS, batch_size=3, **options)
    assert together == alone == by_three
    assert len(set(together)) > 1


def test_streamed_text_is_the_text(base: Base) -> None:
    for prompt in PROMPTS:
        pieces: list[str] = []
        (text,) = complete(*base, [prompt], max_new_tokens=40, greedy=True, stream=pieces.append)
        assert "".join(pieces) == text
        assert (text,) == tuple(complete(*base, [prompt], max_new_tokens=40, greedy=True))


def force(model: PreTrainedModel, script: list[int]) -> None:
    """Make the model generate ``script``: the last logits of each forward select its next token."""
    coming = iter(script)

    def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(output, -10.0)
        forced[..., next(coming)] = 10.0
        return forced

    model.get_output_embeddings().register_forward_hook(hook)


def test_stops_at_the_end_token_and_does_not_show_it(base: Base) -> None:
    model, tokenizer = base
    force(model, [*tokenizer(" yes").input_ids, tokenizer.eos_token_id, *tokenizer("no").input_ids])
    pieces: list[str] = []
    assert complete(model, tokenizer, ["so:"], max_new_tokens=30, greedy=True, stream=pieces.append) == [" yes"]
    assert "".join(pieces) == " yes"


def test_a_character_is_streamed_whole(base: Base) -> None:
    model, tokenizer = base
    force(model, [*tokenizer("é🙂!").input_ids, tokenizer.eos_token_id])
    pieces: list[str] = []
    complete(model, tokenizer, ["so: "], max_new_tokens=30, greedy=True, stream=pieces.append)
    assert pieces == ["é", "🙂", "!"]


def test_also_stops_at_the_models_own_end_tokens(base: Base) -> None:
    model, tokenizer = base
    stop = tokenizer(";").input_ids[0]
    model.generation_config.eos_token_id = [stop]
    force(model, [*tokenizer("a;b").input_ids, tokenizer.eos_token_id])
    assert complete(model, tokenizer, ["so: "], max_new_tokens=30, greedy=True) == ["a"]


def test_sampling_repeats_with_its_seed_and_leaves_torch_alone(base: Base) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.5}
    state = torch.get_rng_state()
    first = complete(*base, PROMPTS, seed=1, **options)
    assert complete(*base, PROMPTS, seed=1, **options) == first
    assert complete(*base, PROMPTS, seed=2, **options) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_nucleus_is_greedy(base: Base) -> None:
    greedy = complete(*base, PROMPTS, max_new_tokens=12, greedy=True)
    assert complete(*base, PROMPTS, max_new_tokens=12, top_p=1e-6, seed=3) == greedy
    assert complete(*base, PROMPTS, max_new_tokens=12, temperature=1e-4, seed=3) == greedy


def test_the_model_is_put_back_as_it_was(base: Base) -> None:
    model, tokenizer = base
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    side = tokenizer.padding_side
    complete(model, tokenizer, PROMPTS, max_new_tokens=2, greedy=True)
    assert [module.training for module in model.modules()] == before
    assert tokenizer.padding_side == side


def test_dropout_is_off_while_it_writes() -> None:
    model, tokenizer = make("gpt2"), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    expected = complete(model, tokenizer, PROMPTS, max_new_tokens=10, greedy=True)
    assert complete(model.train(), tokenizer, PROMPTS, max_new_tokens=10, greedy=True) == expected


def test_a_rendered_conversation_gets_no_second_start_token(base: Base) -> None:
    from tokenizers.processors import TemplateProcessing

    seen: list[list[int]] = []
    base.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    base.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    complete(*base, ["<s>user"], max_new_tokens=1, greedy=True)
    complete(*base, ["user"], max_new_tokens=1, greedy=True)
    assert seen[0] == seen[1] == [0, *base.tokenizer("user", add_special_tokens=False).input_ids]


def test_an_encoder_decoder() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 260}
    model = T5ForConditionalGeneration(
        T5Config(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, **sizes)
    ).eval()
    tokenizer, pieces = byte_tokenizer(), list[str]()
    (text,) = complete(model, tokenizer, ["Hello"], max_new_tokens=8, greedy=True, stream=pieces.append)
    plain = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert text == "".join(pieces) == tokenizer.decode(plain[0, 1:], skip_special_tokens=True)


def test_the_window_ends_and_it_is_said(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = base
    force(model, tokenizer("b" * 100).input_ids)
    assert complete(model, tokenizer, ["a" * 120], max_new_tokens=100, greedy=True) == ["b" * 8]
    assert "only 8 of 100 new tokens fit the model's window of 128" in caplog.text
    with pytest.raises(DataError, match="200 tokens, expected fewer than the model's window of 128"):
        complete(*base, ["a" * 200], max_new_tokens=1, greedy=True)


def test_settings_out_of_range_all_at_once(base: Base) -> None:
    with pytest.raises(ConfigError) as caught:
        complete(*base, ["a", "b"], max_new_tokens=0, temperature=0.0, top_p=1.5, stream=print)
    for part in ("max_new_tokens = 0", "temperature = 0.0", "top_p = 1.5", "2 prompts to stream"):
        assert part in caught.value.message
    with pytest.raises(DataError, match="prompt 2 is empty"):
        complete(*base, ["a", ""])


def test_no_prompts(base: Base) -> None:
    assert complete(*base, []) == []


def test_quiet(base: Base, capfd: pytest.CaptureFixture[str]) -> None:
    complete(*base, PROMPTS, max_new_tokens=3, greedy=True)
    complete(*base, PROMPTS, max_new_tokens=3, seed=1)
    assert capfd.readouterr() == ("", "")
