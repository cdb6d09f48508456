"""Makes the other files of this folder: small checkpoints of random weights with the logits of
transformers, small tokenizers with the ids of the tokenizers library, and prompts by the chat
templates of chats/ with the ids of transformers. The tests need these files, not this script.

    pip install transformers && python testdata/golden.py        (last run with transformers 5.24.0)

The templates smollm2, qwen2.5, qwen3 (Apache-2.0) and r1-distill (MIT) are their makers';
llama3 and 2507's two are shortened to what one user's turn depends on.
"""

import json
import random
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

HERE = Path(__file__).parent
SMALL = {
    "vocab_size": 29,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CHECKPOINTS = {  # name: (config, whether config.json is in the older dialect, size of a shard)
    "qwen2-tied": (
        Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=PLAIN),
        True,
        "1GB",
    ),
    "qwen2-untied": (
        Qwen2Config(**SMALL, tie_word_embeddings=False, rope_parameters=PLAIN),
        False,
        "2KB",
    ),
    "qwen3": (Qwen3Config(**SMALL, head_dim=8, rope_parameters=PLAIN), True, "1GB"),
    "llama-biases": (
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=PLAIN),
        False,
        "1GB",
    ),
    "llama3-rope": (
        LlamaConfig(**SMALL, head_dim=8, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
        True,
        "1GB",
    ),
}
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "isolated",
)
TOKENIZERS = {  # name: (pre-tokenizers, normalizer, control tokens)
    "chatml-nfc": (
        [QWEN, BYTE_LEVEL],
        normalizers.NFC(),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    ),
    "digits": (
        [pre_tokenizers.Digits(individual_digits=True), GPT2],
        None,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    ),
    "headers": (
        [QWEN, BYTE_LEVEL],
        None,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gpt2": ([GPT2], None, ["<|endoftext|>"]),
}
CORPUS = [
    "the cat sat on the mat. P _ O\n_ _ G\n\n  12 34   user's don't we'll it's the   mat é日本 "
    "привет!!! <action>left"
]
TEXTS = [
    "",
    " ",
    "the cat sat on the mat",
    "The   mat\n\n  sat\t\n",
    "1234 12.5 -7",
    "a1b22c333",
    "  42  7\n8",
    "it's IT'S we'LL",
    "<|im_start|>user<|im_end|>",
    "é e\u0301 \u212b",
    "日本語 한국어",
    "Привет, мир",
    "😀👨\u200d👩\u200d👧",
    "x\x00y\x04z",
    "\r\n\r\n a",
    "\u00a0\u3000b",
    "P _ O\n_ _ G",
    "<action>left</action>",
    "!!!???",
    "   ",
    "\n\n\n",
    "½Ⅷ²٣",
    "don't",
    "mat.\n\nP",
    "ﬁ",
    "\u2028x",
    "ab" * 20,
]

torch.manual_seed(0)
golden = {}
for name, (config, older, shard) in CHECKPOINTS.items():
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, weight in model.named_parameters():
        noise = torch.randn_like(weight) * 0.3 + ("norm" in key)
        weight.data = noise.bfloat16().float()  # exact in both
    model.tie_weights()
    ids = torch.randint(0, 29, (1, 24))  # past the 16 positions that the scaled rope began with
    golden |= {f"{name}.ids": ids, f"{name}.logits": model(ids).logits.detach()[:, ::3].clone()}
    model.bfloat16().save_pretrained(HERE / name, max_shard_size=shard)
    (HERE / name / "generation_config.json").unlink()
    path = HERE / name / "config.json"
    raw = json.loads(path.read_text())
    if older:
        rope = raw.pop("rope_parameters")
        raw |= {
            "rope_theta": rope.pop("rope_theta"),
            "torch_dtype": raw.pop("dtype"),
            "rope_scaling": rope if rope["rope_type"] == "llama3" else None,
        }
    path.write_text(json.dumps(raw))
save_file(golden, HERE / "logits.safetensors")


def train(name):
    """A small BPE without control tokens."""
    steps, normalizer, _ = TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if name == "digits":  # lacks bytes, as SmolLM2 does, 4 among them
        alphabet = [char for char in alphabet if char not in "ÀÁõö÷øùúûüýþÿĄ"]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 9, trainer)
    return tokenizer


def write(path, content):
    path.write_text(json.dumps(content, separators=(",", ":")))


for name, (_, _, control) in TOKENIZERS.items():
    tokenizer = train(name)
    # before the control tokens are known
    expected = [[text, tokenizer.encode(text).ids] for text in TEXTS]
    tokenizer.add_special_tokens(control)
    write(
        HERE / f"tokenizer-{name}.json",
        {"tokenizer": json.loads(tokenizer.to_str()), "expected": expected},
    )

# A tokenizer.json whose merges are not in the order of the ids, with tokens that no merge makes,
# with added tokens that are no control tokens, and without a normalizer; also with ignore_merges.
raw = json.loads(train("gpt2").to_str())
ids = list(range(256, 320))
random.Random(0).shuffle(ids)
vocab = {token: i if i < 256 else ids[i - 256] for token, i in raw["model"]["vocab"].items()}
vocab |= {"thecat": 320, "Ġlake": 321}
raw["model"]["vocab"] = vocab
raw = json.loads(Tokenizer.from_str(json.dumps(raw)).to_str())
tokenizer = Tokenizer.from_str(json.dumps(raw))
tokenizer.add_tokens(["<action>", "</action>", "<act"])
tokenizer.add_special_tokens(["<|end|>"])
raw = json.loads(tokenizer.to_str())
del raw["normalizer"]
WORDS = [*TEXTS, "thecat lake thecats", "<action> left</action> <act <actio", "a<action><action>b"]
content = {"tokenizer": raw}
for key, ignore_merges in (("expected", False), ("ignore_merges", True)):
    raw["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(raw | {"normalizer": None}))
    tokenizer.encode_special_tokens = True  # a control token in a text is text
    content[key] = [[text, tokenizer.encode(text).ids] for text in WORDS]
raw["model"]["ignore_merges"] = False
write(HERE / "tokenizer-otherwise.json", content)

# The older pair of files, as Qwen2 had it.
with tempfile.TemporaryDirectory() as folder:
    model = json.loads(train("chatml-nfc").to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    Path(folder, "vocab.json").write_text(json.dumps(model["vocab"]))
    Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    decoder = {"320": {"content": "<|im_end|>", "special": True}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    config["added_tokens_decoder"] = decoder
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    files = {name: Path(folder, name).read_text() for name in names}
    expected = [[text, tokenizer.encode(text)] for text in TEXTS if "<|im_" not in text]
    write(HERE / "tokenizer-older.json", {"files": files, "expected": expected})

# Chats: (template, small tokenizer, control tokens, added tokens that are none, BOS, EOS).
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
HEADERS = TOKENIZERS["headers"][2]
R1 = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
CHATS = {
    "smollm2": ("smollm2", "digits", IM, [], IM[1], IM[2]),
    "qwen2.5": ("qwen2.5", "chatml-nfc", IM, [], None, IM[2]),
    "qwen3": ("qwen3", "chatml-nfc", IM, THINK, None, IM[2]),
    "instruct-2507": ("instruct-2507", "chatml-nfc", IM, THINK, None, IM[2]),
    "thinking-2507": ("thinking-2507", "chatml-nfc", IM, THINK, None, IM[2]),
    "r1-distill": ("r1-distill", "chatml-nfc", R1, ["<｜User｜>", "<｜Assistant｜>", *THINK], *R1),
    "llama3": ("llama3", "headers", HEADERS, [], HEADERS[0], HEADERS[3]),
    "llama3-base": (None, "headers", HEADERS, [], HEADERS[0], None),
    "gpt2": (None, "gpt2", IM[:1], [], None, IM[0]),
}
USER = [
    "the cat.\n\nP _ O\n_ _ G",
    "  the\tmat \n",
    "<think>don't</think> e\u0301 <action>left",
    "",
]
today = time.strftime("%d %b %Y")
chats = {}
for name, (template, base, control, words, bos, eos) in CHATS.items():
    tokenizer = train(base)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.add_special_tokens(control)
    if base == "headers":
        known = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=known
        )
    settings = {key: value for key, value in (("bos_token", bos), ("eos_token", eos)) if value}
    judge = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    prompts = []
    for text in USER:
        for think in (False, True):
            if template is None:
                ids = judge.encode(text + "\n")
            else:
                judge.chat_template = (HERE / "chats" / f"{template}.jinja").read_text()
                chat = [{"role": "user", "content": text}]
                ids = judge.apply_chat_template(
                    chat, add_generation_prompt=True, enable_thinking=think, return_dict=False
                )
            prompts.append([text, think, ids])
    raw = json.loads(tokenizer.to_str())
    chats[name] = {
        "template": template,
        "base": base,
        "added_tokens": raw["added_tokens"],
        "post_processor": raw["post_processor"],
        "settings": settings,
        "prompts": prompts,
    }
write(HERE / "chats" / "prompts.json", {"today": today, "chats": chats})
