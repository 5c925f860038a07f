"""The straight path between data and noise, and the velocity along it.

Convention of diffusers everywhere in the project: sigma = 1 is noise, sigma = 0 is data, and the model
predicts `noise - data` (Liu et al. 2022, rectified flow). The technical report's Eq. 1 counts time the
other way round.

Refuses: anything but fp32. Losses and targets lose their small-sigma part in bf16.
"""

import torch


def interpolate(x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`(1 - sigma) x0 + sigma eps` in fp32; x0 and eps (B,...), sigma (B,)."""
    if x0.shape != eps.shape or sigma.shape != x0.shape[:1]:
        raise ValueError(
            f"expected x0 and eps of one shape and sigma (B,); got {tuple(x0.shape)}, {tuple(eps.shape)}, "
            f"{tuple(sigma.shape)}"
        )
    weight = sigma.float().reshape(-1, *[1] * (x0.ndim - 1))
    return (1.0 - weight) * x0.float() + weight * eps.float()


def velocity_target(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """`eps - x0` in fp32, the derivative of the path by sigma."""
    return eps.float() - x0.float()
