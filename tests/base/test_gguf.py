"""A GGUF file is converted to a transformers model once and atomically."""

from __future__ import annotations

import shutil
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from helpers.bytewise import TEMPLATE, VOCABULARY, byte_tokenizer, llama_config
from lorakeet.base import gguf
from lorakeet.base.gguf import converted
from lorakeet.base.gguf_header import gguf_name
from lorakeet.base.load import load_base
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import DEFAULT_MODEL
from lorakeet.errors import BaseModelError, OutputError
from lorakeet.files import cache_home

TEXTS = [
    "Two things are the infinite:",
    "  two  spaces ",
    "\n\n tabs\t and lines \n",
    "naïve 日本 🙂",
    "1234 + 56 = 1,290",
]
NAMES = {  # of a Llama's tensors, in GGUF
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the weights by GGUF name; queries and keys have the two halves of each head interleaved."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name in NAMES:
            yield NAMES[name], weight
            continue
        _, _, number, layer = name.removesuffix(".weight").split(".", 3)
        kind = LAYER_NAMES[layer]
        if kind in heads:
            weight = weight.reshape(heads[kind], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        yield f"blk.{number}.{kind}.weight", weight


def write_gguf(
    path: Path, model: LlamaForCausalLM, name: str | None = "Tiny Parrot", half: bool = False, skip: str = ""
) -> Path:
    writer, config = GGUFWriter(path, "llama"), model.config
    if name:
        writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 258)
    writer.add_token_merges(["h e", "t he"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    for key, weight in tensors(model):
        if key != skip:
            writer.add_tensor(key, weight.to(torch.float16 if half and weight.ndim > 1 else torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config()).eval()


@pytest.fixture
def file(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path / "parrot.gguf", model)


IDS = torch.arange(2, 40).reshape(2, 19)


def test_converts_to_the_same_model(file: Path, model: PreTrainedModel) -> None:
    base = load_base(str(file), dtype="fp32", device="cpu")
    assert torch.allclose(base.model(IDS).logits, model(IDS).logits, atol=1e-5)
    assert base.name == base.model.config._name_or_path == "Tiny Parrot"
    assert base.tokenizer.eos_token == base.tokenizer.pad_token == "</s>" and base.tokenizer.bos_token == "<s>"
    assert base.tokenizer.chat_template == TEMPLATE
    for text in TEXTS:
        assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text


def test_the_converted_model_bears_no_mark(file: Path, tmp_path: Path) -> None:
    base = load_base(str(file), device="cpu")
    base.model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()
    assert not hasattr(base.model, "hf_quantizer") and not getattr(base.model, "is_quantized", False)


def test_sixteen_bits_are_not_rounded_again(tmp_path: Path, model: LlamaForCausalLM) -> None:
    folder = converted(write_gguf(tmp_path / "half.gguf", model, half=True), "half")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert plain.dtype == torch.float32
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight.half().float())


def test_special_tokens_are_those_that_the_file_names(file: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = "<s>"
    gguf._set_special_tokens(tokenizer, gguf.read_header(file))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", None)


def test_a_relative_path_and_no_bars(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(file.parent)
    with caplog.at_level("INFO", "lorakeet"):
        converted(Path(file.name), "parrot")
    assert "converting parrot.gguf to safetensors, once" in caplog.text and "converted in" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted(file, "org/Tiny Parrot")
    assert folder.parent == cache_home() / "gguf" and folder.name.startswith("Tiny-Parrot-")
    monkeypatch.delattr(gguf, "_convert")
    assert converted(file, "org/Tiny Parrot") == folder
    assert converted(Path(shutil.copy(file, file.with_name("moved.gguf"))), "org/Tiny Parrot") == folder


def test_other_content_is_converted_anew(file: Path) -> None:
    first = converted(file, "parrot")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    file.write_bytes(content)
    assert converted(file, "parrot") != first


def test_a_damaged_conversion_is_made_again(file: Path) -> None:
    weights = converted(file, "parrot") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert converted(file, "parrot") == weights.parent
    assert weights.read_bytes() == whole


def test_a_broken_conversion_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(file, "parrot")
    assert [path for path in (cache_home() / "gguf").iterdir() if path.suffix != ".lock"] == []


def test_two_at_once_convert_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, convert = [], gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda path, folder: (calls.append(path), convert(path, folder)))
    threads = [threading.Thread(target=converted, args=(file, "parrot")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_files_beside_it_are_not_taken(file: Path) -> None:
    (file.parent / "tokenizer.json").write_text("{}")
    (file.parent / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_base(str(file), device="cpu").model.config.model_type == "llama"


def test_missing_weights_are_an_error(tmp_path: Path, model: LlamaForCausalLM) -> None:
    file = write_gguf(tmp_path / "holes.gguf", model, skip="blk.1.ffn_up.weight")
    with pytest.raises(BaseModelError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(file), device="cpu")
    assert not list((cache_home() / "gguf").glob("*/config.json"))


def test_name(tmp_path: Path, file: Path, model: LlamaForCausalLM) -> None:
    assert gguf_name(file) == "Tiny Parrot"
    assert gguf_name(write_gguf(tmp_path / "no-name.gguf", model, name=None)) == "no-name"


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.05, 0.5, 0.99])
def test_truncated(file: Path, part: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(BaseModelError, match=r"truncated or no GGUF|cannot be converted") as caught:
        load_base(str(file), device="cpu")
    assert str(file) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(40), b"GGUF" + b"\xff" * 40, b"GGUF\x03\0\0\0" + b"\xff" * 40]
)
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(BaseModelError, match="no GGUF file"):
        find_source(str(tmp_path / "model.gguf"))


@pytest.mark.skipif(sys.platform == "win32", reason="by file mode")
def test_the_cache_is_not_writable(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("LORAKEET_HOME", str(tmp_path / "taken"))
    with pytest.raises(OutputError, match="cannot write"):
        converted(file, "parrot")


@pytest.mark.slow
def test_the_embedded_base(smollm2: Path, real_home: Path) -> None:
    """Tokenizer and weights of the converted embedded base equal those that transformers reads from the GGUF file."""
    source = find_source(DEFAULT_MODEL)
    assert local_folder(source) == smollm2
    base = load_base(dtype="fp32", device="cpu")
    assert base.name == base.model.config._name_or_path == DEFAULT_MODEL
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 134_515_008
    direct = AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
    for text in [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]:
        ids = base.tokenizer(text).input_ids
        assert ids == direct(text).input_ids
        assert base.tokenizer.decode(ids) == text
    assert base.tokenizer.eos_token == base.tokenizer.pad_token == "<|im_end|>"
    assert (base.tokenizer.bos_token, base.tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert base.tokenizer.chat_template == direct.chat_template
    plain = AutoModelForCausalLM.from_pretrained(source.path.parent, gguf_file=source.path.name, dtype=torch.float32)
    for (name, weight), (_, expected) in zip(base.model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_functions_are_remembered_for_a_while_and_are_themselves_again() -> None:
    module, asked = types.ModuleType("m"), []
    module.read = own = lambda path: asked.append(path) or object()  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), gguf._caching(module, read=module.read):
        assert module.read("a") is module.read("a") and module.read("a") is not module.read("b")
        assert asked == ["a", "b"]
        raise ZeroDivisionError
    assert module.read is own
