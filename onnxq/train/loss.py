"""What a retrained model is taught: the float model's distribution of the next word, and the words themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    share: float = 0.9,
    temperature: float = 1.0,
) -> Tensor:
    """Word-level distillation (Kim and Rush, arXiv 1606.07947, equation 8) mixed with cross entropy, in nats a word.

        share * t**2 * KL(softmax(teacher / t) || softmax(logits / t)) + (1 - share) * -log softmax(logits)[label]

    Args:
        logits: float32 [..., V], of the model that is trained.
        teacher: float32 [..., V], of the float model for the same words; no gradient goes to it.
        labels: int64 [...].
        mask: [...], true or not 0 for words that count; None means all. Padding must be masked.
        share: of the distillation, 0 to 1.
        temperature: t; more than 1 weighs unlikely words more.

    Returns:
        The mean over words that count, a scalar; 0 if there are none.
    """
    width = logits.shape[-1]
    logits, teacher, labels = logits.reshape(-1, width), teacher.detach().reshape(-1, width), labels.reshape(-1)
    if mask is not None:
        counts = mask.reshape(-1) != 0
        logits, teacher, labels = logits[counts], teacher[counts], labels[counts]
    words = max(len(labels), 1)
    loss = logits.new_zeros(())
    if share > 0:
        wanted = torch.log_softmax(teacher / temperature, -1)
        ours = torch.log_softmax(logits / temperature, -1)
        divergence = functional.kl_div(ours, wanted, reduction="sum", log_target=True)
        loss = loss + share * temperature**2 * divergence / words
    if share < 1:
        loss = loss + (1 - share) * functional.cross_entropy(logits, labels, reduction="sum") / words
    return loss
