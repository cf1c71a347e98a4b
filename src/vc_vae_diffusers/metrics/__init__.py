"""Reconstruction metrics. Every function takes video tensors (B, C, T, H, W) and names the range of their values.

Import from the submodules: ``metrics.frame`` (PSNR, SSIM, flicker, curves), ``metrics.perceptual`` (LPIPS),
``metrics.fvd`` (FVD) and ``metrics.i3d`` (its network). This file imports nothing, so that the frame metrics cost
no more than torch.
"""
