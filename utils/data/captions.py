"""Captions as text tokens: a byte-level BPE (arXiv 1508.07909) that is trained on the captions.

Every text has tokens, whatever its script: those of its bytes are always in the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.cli import UserError, user_error
from utils.data.vocabulary import TextMeta
from utils.progress import warn

VOCABULARY_SIZE = 8192  # at most; words that occur once are no tokens
MAX_LENGTH = 64  # text tokens of a caption, where no length is given
BATCH = 4096  # captions that are encoded at a time
MISSING = (
    "captions need the package tokenizers: pip install tokenizers; or train without captions: "
    "train.py --caption_length 0"
)


def train_tokenizer(captions: Sequence[str], length: int | None) -> TextMeta:
    """The text tokens of captions, a function of the set of them; length None: of the longest."""
    with user_error(MISSING, ImportError):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    steps = normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()
    bpe.normalizer = normalizers.Sequence([*steps])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = sorted(set(captions))
    bpe.train_from_iterator(texts, trainer)
    longest = max(len(encoded.ids) for encoded in bpe.encode_batch(texts))
    return TextMeta(bpe.to_str(), bpe.get_vocab_size(), length or min(max(longest, 1), MAX_LENGTH))


def encode(captions: Sequence[str], meta: TextMeta | None) -> Tensor | None:
    """Text tokens (N, L), int64, padded; of an empty caption all are "not given".

    None for a GPT without captions. Warns of cut ones. A UserError for a damaged tokenizer.
    """
    if meta is None:
        return None
    with user_error(MISSING, ImportError):
        from tokenizers import Tokenizer
    # The library raises no other type.
    with user_error("the tokenizer of the captions is damaged: %s", Exception):
        bpe: Any = Tokenizer.from_str(meta.tokenizer)
        bpe.enable_truncation(meta.length)
        bpe.enable_padding(length=meta.length, pad_id=meta.vocabulary_size)
        texts = [text.encode(errors="replace").decode() for text in captions]
        tokens, cut = torch.empty(len(texts), meta.length, dtype=torch.long), 0
        for start in range(0, len(texts), BATCH):
            encoded = bpe.encode_batch(texts[start : start + BATCH])
            tokens[start : start + BATCH] = torch.tensor([text.ids for text in encoded])
            cut += sum(bool(text.overflowing) for text in encoded)
        largest = max(bpe.get_vocab().values())
    if largest >= meta.vocabulary_size:
        raise UserError("the tokenizer of the captions is damaged: it has more tokens than it says")
    if cut:
        longer = f"{cut:,} of {len(texts):,} captions are longer than {meta.length} text tokens"
        warn(f"{longer}, and are cut there")
    return tokens
