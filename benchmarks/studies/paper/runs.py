"""The runs of the experiments by name: NETWORK_KIND, and for the paper's loss NETWORK_KIND_ERROR_LAM."""

from __future__ import annotations

KINDS = {
    "coupled": "paper's loss, coupled statistics",
    "clamped": "paper's loss, coupled, clamped cosine",
    "frozen": "paper's loss, frozen statistics",
    "recipe": "recipe",
}
BEST = {"resnet18": 7.5e-3, "mobilenet_v2": 1e-3}  # the weights of Tables 1 and 2


def name_of(network: str, kind: str, error: str = "cos", lam: float | None = None) -> str:
    """The name of a setting; a run's folder is that and its seed."""
    if kind in ("without", "recipe"):
        return f"{network}_{kind}"
    return f"{network}_{kind}_{error}_{BEST[network] if lam is None else lam:g}"


def network_of(name: str) -> str:
    """The network in it."""
    return next(network for network in BEST if name.startswith(network))
