"""Saliency maps: input gradients and class activation maps. Tensors in, tensors out, on their device."""

from interpgrad.saliency.cam import (
    CAMS,
    ablation_cam,
    axiom_cam,
    eigen_cam,
    grad_cam,
    grad_cam_pp,
    guided_grad_cam,
    hires_cam,
    layer_cam,
    scale,
    score_cam,
    xgrad_cam,
)
from interpgrad.saliency.gradient_maps import gradient, guided_gradient, integrated_gradients, smooth_gradient

__all__ = ["CAMS", "ablation_cam", "axiom_cam", "eigen_cam", "grad_cam", "grad_cam_pp", "guided_grad_cam", "hires_cam"]
__all__ += ["layer_cam", "scale", "score_cam", "xgrad_cam"]
__all__ += ["gradient", "guided_gradient", "integrated_gradients", "smooth_gradient"]
