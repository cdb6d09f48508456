"""Makes the other files of this folder: small checkpoints of random weights with the logits of transformers,
and small tokenizers with the ids of the tokenizers library. The tests need these files, not this script.

    pip install transformers && python testdata/golden.py        (last run with transformers 5.23.0)
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).parent
SMALL = {"vocab_size": 29, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CHECKPOINTS = {  # name: (config, whether config.json is in the older dialect, size of a shard)
    "qwen2-tied": (Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=PLAIN), True, "1GB"),
    "qwen2-untied": (Qwen2Config(**SMALL, tie_word_embeddings=False, rope_parameters=PLAIN), False, "2KB"),
    "qwen3": (Qwen3Config(**SMALL, head_dim=8, rope_parameters=PLAIN), True, "1GB"),
    "llama-biases": (LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=PLAIN), False,
                     "1GB"),
    "llama3-rope": (LlamaConfig(**SMALL, head_dim=8, rope_parameters=LLAMA3, rms_norm_eps=1e-5), True, "1GB"),
}
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN = pre_tokenizers.Split(Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "isolated")
TOKENIZERS = {  # name: (pre-tokenizers, normalizer, control tokens)
    "chatml-nfc": ([QWEN, BYTE_LEVEL], normalizers.NFC(),
                   ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "digits": ([pre_tokenizers.Digits(individual_digits=True), GPT2], None,
               ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "headers": ([QWEN, BYTE_LEVEL], None,
                ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gpt2": ([GPT2], None, ["<|endoftext|>"]),
}
CORPUS = ["the cat sat on the mat. P _ O\n_ _ G\n\n  12 34   user's don't we'll it's the   mat é日本 "
          "привет!!! <action>left"]
TEXTS = [
    "", " ", "the cat sat on the mat", "The   mat\n\n  sat\t\n", "1234 12.5 -7", "a1b22c333", "  42  7\n8",
    "it's IT'S we'LL", "<|im_start|>user<|im_end|>", "é e\u0301 \u212b", "日本語 한국어",
    "Привет, мир", "😀👨\u200d👩\u200d👧", "x\x00y\x04z", "\r\n\r\n a", "\u00a0\u3000b", "P _ O\n_ _ G",
    "<action>left</action>", "!!!???", "   ", "\n\n\n", "½Ⅷ²٣", "don't", "mat.\n\nP", "ﬁ", "\u2028x",
    "ab" * 20]

torch.manual_seed(0)
golden = {}
for name, (config, older, shard) in CHECKPOINTS.items():
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, weight in model.named_parameters():
        random = torch.randn_like(weight) * .3 + ("norm" in key)
        weight.data = random.bfloat16().float()  # exact in both
    model.tie_weights()
    ids = torch.randint(0, 29, (1, 24))  # past the 16 positions that the scaled rope began with
    golden |= {f"{name}.ids": ids, f"{name}.logits": model(ids).logits.detach()[:, ::3].clone()}
    model.bfloat16().save_pretrained(HERE / name, max_shard_size=shard)
    (HERE / name / "generation_config.json").unlink()
    path = HERE / name / "config.json"
    raw = json.loads(path.read_text())
    if older:
        rope = raw.pop("rope_parameters")
        raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype"),
                "rope_scaling": rope if rope["rope_type"] == "llama3" else None}
    path.write_text(json.dumps(raw))
save_file(golden, HERE / "logits.safetensors")

for name, (steps, normalizer, control) in TOKENIZERS.items():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if name == "digits":  # lacks bytes, as SmolLM2 does, 4 among them
        alphabet = [char for char in alphabet if char not in "ÀÁõö÷øùúûüýþÿĄ"]
    tokenizer.train_from_iterator(CORPUS * 9, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet,
                                                                  show_progress=False))
    expected = [[text, tokenizer.encode(text).ids] for text in TEXTS]  # before the control tokens are known
    tokenizer.add_special_tokens(control)
    content = {"tokenizer": json.loads(tokenizer.to_str()), "expected": expected}
    (HERE / f"tokenizer-{name}.json").write_text(json.dumps(content, separators=(",", ":")))
