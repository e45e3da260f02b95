"""An image becomes patches, and each patch a token (Dosovitskiy et al. 2020, section 3.1, eq. 1).

There are two equivalent ways: cut the image with a reshape and multiply each flat patch by a matrix, or slide a
convolution over it. The first is easier to read, the second lets patches overlap.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from vitft.scratch.tensors import Array, Linear, linear, linear_backward
from vitft.spec import ViTSpec


def patchify(images: Array, patch_height: int, patch_width: int) -> Array:
    """Cut images (B, C, H, W) into flat patches (B, patches, C·P·P), row by row, without overlap.

    H = rows · P, so a reshape splits the axis in two, and a transpose brings each patch's pixels together.
    """
    b, c, h, w = images.shape
    rows, columns = h // patch_height, w // patch_width
    patches = images.reshape(b, c, rows, patch_height, columns, patch_width).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, rows * columns, c * patch_height * patch_width)


def windows(images: Array, spec: ViTSpec) -> Array:
    """Every patch of images (B, C, H, W) that the convolution's kernel sees, flattened: (B, patches, C·P·P).

    The image is padded with `padding` zeros on each side; a window starts every `stride` pixels.
    """
    edge = (spec.padding, spec.padding)
    padded = np.pad(images, ((0, 0), (0, 0), edge, edge)) if spec.padding else images
    patches = sliding_window_view(padded, (spec.patch_height, spec.patch_width), axis=(2, 3))
    patches = patches[:, :, :: spec.stride_height, :: spec.stride_width]  # (B, C, rows, columns, P, P)
    flat = spec.channels * spec.patch_height * spec.patch_width
    return patches.transpose(0, 2, 3, 1, 4, 5).reshape(len(images), spec.patches, flat)


def windows_backward(d_patches: Array, spec: ViTSpec) -> Array:
    """The gradient of the images: each pixel gets the sum over all patches it is part of."""
    (rows, columns), (p_h, p_w), pad = spec.grid, (spec.patch_height, spec.patch_width), spec.padding
    height, width = spec.image_height + 2 * pad, spec.image_width + 2 * pad
    d_padded = np.zeros((len(d_patches), spec.channels, height, width), d_patches.dtype)
    d_windows = d_patches.reshape(-1, rows, columns, spec.channels, p_h, p_w).transpose(0, 3, 1, 2, 4, 5)
    down, across = spec.stride_height, spec.stride_width
    for i in range(p_h):  # pixel (i, j) of all windows at once: no two of these are the same pixel of the image
        for j in range(p_w):
            d_padded[:, :, i : i + rows * down : down, j : j + columns * across : across] += d_windows[..., i, j]
    return d_padded[:, :, pad : height - pad, pad : width - pad]


def patch_embedding(images: Array, w: Linear, spec: ViTSpec) -> tuple[Array, Array]:
    """Each patch times the same matrix: images (B, C, H, W) to tokens (B, patches, D).

    This is a convolution with the kernel w.weight (D, C, P, P), computed as one product of all its windows with the
    flattened kernel. The backward pass needs the windows.
    """
    patches = windows(images.astype(w.weight.dtype, copy=False), spec)
    return linear(patches, _flat_kernel(w)), patches


def patch_embedding_backward(d_tokens: Array, patches: Array, w: Linear, spec: ViTSpec) -> tuple[Array, Linear]:
    """Gradients of the images (B, C, H, W), and of kernel and bias."""
    d_patches, d_flat = linear_backward(d_tokens, patches, _flat_kernel(w))
    return windows_backward(d_patches, spec), Linear(d_flat.weight.reshape(w.weight.shape), d_flat.bias)


def _flat_kernel(w: Linear) -> Linear:
    return Linear(w.weight.reshape(len(w.weight), -1), w.bias)
