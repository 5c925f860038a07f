"""The text-to-image prompt template, apart from the encoder so that an id of it costs no import of a model library."""

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""`QwenImagePipeline.prompt_template_encode`. The caption goes in as it is, newlines and braces included."""

DROP = 34
"""Leading tokens whose features are dropped: the template up to the caption."""
