"""Faithfulness of saliency maps: does the model's confidence follow what the map calls important?

y is the softmax probability of the class explained, o the same for the image under its map. N images x (N, C, H, W),
maps (N, h, w) in [0, 1] (resized to (H, W) by bilinear interpolation where they differ).

    AD   average drop        max(0, y - o) / y           the lower the better
    AG   average gain        max(0, o - y) / (1 - y)     higher
    AI   average increase    1[o > y]                    higher
    INS  insertion           area under y while a blurred image is revealed, most salient pixels first; higher
    DEL  deletion            area under y while pixels are set to 0, most salient first; lower

Under these five names figures are in percent, as papers print them: of `faithfulness` per sample (N,), of
`Faithfulness`, a torchmetrics.Metric, means over batches and ranks. The functions of one metric each return the formula
above, a fraction of 1 per sample. `HIGHER_IS_BETTER` has the directions.

The image under its map: denormalized with mean and std, multiplied by the map, normalized again. Pixels are inserted
and deleted in the space the model sees, so many per step; the area is that of the trapezoidal rule, of a curve of
width 1; among equally salient pixels the first in reading order comes first, so results are deterministic.

Sources: Chattopadhyay et al., arXiv 1710.11063 (AD, AI); Zhang et al., arXiv 2301.07002 (AG); Petsiuk et al., RISE,
arXiv 1806.07421 (INS, DEL).
"""

from typing import TYPE_CHECKING, Any

from interpgrad.metrics.functional import *  # noqa: F403
from interpgrad.metrics.functional import __all__ as __all__

if TYPE_CHECKING:
    from interpgrad.metrics.metric import Faithfulness as Faithfulness


def __getattr__(name: str) -> Any:
    if name == "Faithfulness":  # the one thing here that needs torchmetrics
        from interpgrad.metrics.metric import Faithfulness

        return Faithfulness
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
