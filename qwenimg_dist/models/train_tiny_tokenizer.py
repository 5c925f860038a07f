"""Trains the tiny tokenizer: `python -m qwenimg_dist.models.train_tiny_tokenizer --out DIR`.

Place in the flow: run by hand, once; its result lies in `models/assets/tiny_tokenizer`. A byte-level BPE with
the real tokenizer's splitting rules, trained until every word of the prompt templates and of the demo's
captions is one token. So the template's prefix is exactly 34 tokens here as it is for the real vocabulary,
and code that drops 34 tokens is exercised truthfully. Any other text still encodes, in bytes and fragments.
Left out: numbers and words of other domains.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qwenimg_dist.demo.shapes import all_captions
from qwenimg_dist.models.template import TEMPLATE

EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n"
    "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""`QwenImageEditPlusPipeline`'s template with one picture; its first 64 tokens are dropped."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's, in its order; they take the ids after the learnt vocabulary."""

MODEL_MAX_LENGTH = 1024 + 34
_LARGEST_VOCABULARY = 4096


def _corpus() -> list[str]:
    texts = [TEMPLATE.format(""), EDIT_TEMPLATE.format(""), *all_captions()]
    for token in SPECIAL_TOKENS:
        texts = [piece for text in texts for piece in text.split(token) if piece]
    return texts


def train_tokenizer() -> Qwen2Tokenizer:
    """A `Qwen2Tokenizer` with all bytes and every word of the templates and of the demo's captions."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=MODEL_MAX_LENGTH,
        padding_side="right",
    )


def main(arguments: list[str] | None = None) -> None:
    """Train and save to `--out` as `save_pretrained` does."""
    parser = argparse.ArgumentParser(description="Train the tiny tokenizer and save it.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    train_tokenizer().save_pretrained(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
