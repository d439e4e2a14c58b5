"""Writes examples/tiny: the config of a two-layer Llama and a byte-level BPE tokenizer of 512 ids, for tests.

    python examples/make_tiny.py

The tokenizer is trained on the embedded data; the model has no weights (a run draws them from its seed).
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parent
VOCABULARY = 512


def texts() -> list[str]:
    rows = [json.loads(line) for line in (EXAMPLES / "demo/train.jsonl").open()]
    return [message["content"] for row in rows for side in ("prompt", "chosen", "rejected") for message in row[side]]


def main() -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>")
    tokenizer.save_pretrained(EXAMPLES / "tiny")
    LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None,
                eos_token_id=0, pad_token_id=1, architectures=["LlamaForCausalLM"]).save_pretrained(EXAMPLES / "tiny")


if __name__ == "__main__":
    main()
