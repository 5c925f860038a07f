"""The prompt templates, apart from the encoders so that an id of them costs no import of a model library."""

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""`QwenImagePipeline.prompt_template_encode`. The caption goes in as it is, newlines and braces included."""

DROP = 34
"""Leading tokens whose features are dropped: the template up to the caption."""

EDIT_PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n"
)
"""What `QwenImageEditPipeline` and `QwenImageEditPlusPipeline` put before the user's turn; its features are dropped."""

EDIT_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

EDIT_DROP = 64
"""Tokens of `EDIT_PREFIX`."""

EDIT_PICTURE = {
    "single": "<|vision_start|><|image_pad|><|vision_end|>",
    "plus": "Picture {}: <|vision_start|><|image_pad|><|vision_end|>",
}
"""What stands for the i-th picture (from 1) before the instruction."""
