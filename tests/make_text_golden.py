"""Makes small tokenizers and what transformers does with them: golden/text/NAME/{tokenizer,tokenizer_config,cases}.json.

    python tests/make_text_golden.py
"""

import json
import pathlib
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it?\n\n  def f(x):\n\treturn x + 1\n",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Привет, мир! 你好，世界。",
    "the then there these other another brother mother; hello world, hello there, hello hello",
] * 4
TEXTS = [
    "", " ", "  ", "Hello", " hello", "hello world", "  two  spaces ", "it's 12:30\n\nreturn x", "žluťoučký kůň", "你好 👋🏽 emoji 🇨🇿",
    "<s>hello</s>", "a <|turn|> b", "<|turn|><|turn|>", "hello<|call|> there", "tab\tand\r\nnewline", "\u00a0nbsp\u200bzero", "▁ low", "<0x0A> text", "Ġ",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]


def byte_level(post):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = post
    return tokenizer


def bytes_as_tokens():
    return [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(decoder, normalizer, pre_tokenizer, post):
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, limit_alphabet=40, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    words = SPECIAL[:3] + bytes_as_tokens() + [token for token in model["vocab"] if token not in SPECIAL]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(words))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.normalizer, tokenizer.decoder, tokenizer.post_processor = normalizer, decoder, post
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=110, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return tokenizer


BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
BOTH = processors.TemplateProcessing(single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)])
LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "byte_level": byte_level(processors.ByteLevel(trim_offsets=False)),
    "byte_level_bos": byte_level(processors.Sequence([processors.ByteLevel(trim_offsets=False), BOS])),
    "sentencepiece": sentencepiece(LLAMA, PREPEND, None, BOS),
    "metaspace": sentencepiece(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
        None,
        pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        BOTH,
    ),
    "unigram": unigram(),
    "word_piece": word_piece(),
}


def main():
    home = pathlib.Path(__file__).parent / "golden/text"
    for name, inner in TOKENIZERS.items():
        directory = home / name
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False},
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "additional_special_tokens": ["<|turn|>"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        # A token that only the configuration knows of.
        last = inner.get_vocab_size()
        call = {"content": "<|call|>", "special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        config["added_tokens_decoder"] = {str(last): call}
        (directory / "tokenizer.json").write_text(inner.to_str(pretty=False) + "\n", encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        rng = random.Random(name)
        encoded = [
            {
                "text": text,
                "plain": tokenizer.encode(text, add_special_tokens=False),
                "framed": tokenizer.encode(text),
                "unparsed": tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
            }
            for text in TEXTS
        ]
        lists = [case["framed"] for case in encoded]
        lists += [[rng.randrange(len(tokenizer) + 2) for _ in range(rng.randrange(1, 40))] for _ in range(60)]
        lists += [sum(rng.choices(lists[:20], k=3), []) for _ in range(10)]
        decoded = [
            {"ids": ids, "text": tokenizer.decode(ids), "bare": tokenizer.decode(ids, skip_special_tokens=True)} for ids in lists
        ]
        cases = {"encoded": encoded, "decoded": decoded}
        lines = json.dumps(cases, ensure_ascii=False, separators=(",", ":")).replace("},{", "},\n{")
        (directory / "cases.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
