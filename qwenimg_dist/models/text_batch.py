"""Text features of several samples as one batch.

Place in the flow: the training stream and the samplers both hand the transformer's text input through here. Imports
torch alone, so that reading data does not load diffusers. Refuses: samples without a single token.
"""

from collections.abc import Sequence

import torch
from torch import nn


def collate_text(features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[(T_i,D)] -> ((B,T,D), mask): zero-padded at the end to the longest; bool mask (B,T), 1 = valid.

    The mask is None when all lengths are equal, because any mask turns flash attention off.
    """
    lengths = [feature.shape[0] for feature in features]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"every sample needs at least one text token; lengths are {lengths}")
    if min(lengths) == max(lengths):
        return torch.stack(list(features)), None
    text = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    positions = torch.arange(max(lengths), device=text.device)
    return text, positions[None, :] < torch.tensor(lengths, device=text.device)[:, None]
