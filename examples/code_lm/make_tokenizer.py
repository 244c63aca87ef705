"""Train the example's tokeniser: a byte-level BPE of 2,048 tokens, on the training files of
`python_library`.

python -m examples.code_lm.make_tokenizer
"""

import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raykd.data.python_library import listed, split_of

VOCAB = 2048
END = "<|endoftext|>"
HERE = Path(__file__).parent


def main() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name in listed() if split_of(name) == "train"]
    texts = [(root / name).read_bytes().decode("utf-8", "replace") for name in names]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet),
    )
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main()
