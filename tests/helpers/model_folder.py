"""Writes a small model folder without weights, enough for the API and the simulated devices.

Knows neither torch nor transformers; the tokenizer is a real byte-level BPE, trained on the spot on a few sentences.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Their ids are 0, 1 and 2."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHATML_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

SENTENCES = (
    "The scheduler decides who runs next, and the device answers with one token for each request.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "A block of the cache holds sixteen tokens; a full block can be shared between requests with the same prompt.",
    "def step(self) -> None:\n    for request in self.running:\n        request.tokens.append(next_token)\n",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius", "days": 3}}',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? El niño comió una piña.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "今天天气很好,我们去公园散步吧。東京は日本の首都です。대한민국의 수도는 서울입니다.",
    "สวัสดีครับ วันนี้อากาศดีมาก नमस्ते दुनिया مرحبا بالعالم שלום עולם",
    "👍🏽 👩‍👩‍👧 🎉 🇩🇪 e\u0301 ½ €100 → ∞",
)


def make_text_model(
    folder: Path,
    vocab_size: int = 512,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    max_tokens: int = 2048,
    dtype: str = "float32",
    bos_token: str | None = None,
    chat_template: str | None = CHATML_TEMPLATE,
) -> Path:
    """Write config, generation config, tokenizer and chat template (None: no template) into `folder`; return it.

    Every id below `vocab_size` decodes to something as long as `vocab_size` is at most 780; beyond that the
    sentences give no more merges and the highest ids are unused, as in checkpoints with a padded vocabulary.

    Changes:
        Creates `folder` and its parents; overwrites the four files. The same arguments give the same bytes.
    Raises:
        ValueError: vocab_size is too small to hold every byte and the special tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end_of_turn = SPECIAL_TOKENS.index("<|im_end|>")
    hidden = num_heads * head_dim
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_tokens,
        "bos_token_id": 0,
        "eos_token_id": end_of_turn,
        "dtype": dtype,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos_token,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (folder / "tokenizer.json").write_text(_tokenizer_json(vocab_size), encoding="utf-8")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [end_of_turn, 0]})
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@functools.cache
def _tokenizer_json(vocab_size: int) -> str:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}, must be at least {MIN_VOCAB_SIZE}: the bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()
