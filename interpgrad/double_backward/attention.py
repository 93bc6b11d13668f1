"""Scaled dot-product attention on its one kernel with a double backward; the fused ones have none."""

from __future__ import annotations

import torch.nn.functional as F

from interpgrad import private
from interpgrad.cleanup import OfAllThreads

# Below these, layers may attend; the second calls the first where no function mode sees it.
FUNCTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

differentiable_attention = OfAllThreads(
    private.enabled_attention, private.enable_attention, lambda enabled: {name: name == "math" for name in enabled}
)
