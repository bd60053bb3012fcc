"""Small tokenizers of the kinds that are not the default model's."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ("▁the", "▁a", "▁cat", "▁sat", "▁", "▁▁", "cat", "s", "é", "ß", "日本", "!", ".", "▁Hello")


def sentencepiece_like(strip: int = 1) -> Tokenizer:
    """Pieces with U+2581 for spaces, bytes for what has no piece, and three special tokens."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1) if chr(letter) != "s"]
    vocabulary += letters
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[("▁", "a"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if strip:
        steps.append(decoders.Strip(content=" ", left=strip, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_pieces() -> Tokenizer:
    """A tokenizer whose decoder has no table: words, and `##` for what continues one."""
    pieces = ["[UNK]", "[SEP]", "play", "##ing", "##ed", "the", "cat", "un", "##known", ".", "é"]
    tokenizer = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same with a token that was added and is not special, and one that is."""
    tokenizer.add_tokens([AddedToken("<tool call é>", normalized=False)])
    tokenizer.add_special_tokens(["<|pause|>"])
    return tokenizer
