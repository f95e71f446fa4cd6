"""Shapes: views, layouts, windows, padding, transforms and interpolation."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()
kernel = weight(1, 1, 2, 2, seed=11)


@case(6)
def viewed_and_transposed(r):
    return r.view(2, 3).t().reshape(-1)


@case(2, 3)
def permuted_and_flattened(r):
    return r.unsqueeze(0).permute(2, 0, 1).flatten(1)


@case(2, 3)
def sizes_asked_for(r):
    n, m = r.shape
    return r.sum() / r.numel() + n * m * r.ndim + len(r)


@case()
def stacked_and_concatenated(r):
    return torch.cat([torch.stack([r, r * 2]), r[None]], dim=0)


@case(6)
def chunked_and_split(r):
    a, b, c = r.chunk(3)
    d, e = r.split([4, 2])
    return a * b + c, d.sum() * e


@case()
def broadcast(r):
    a, b = torch.broadcast_tensors(r[:, None], r[None])
    return a - b


@case(3, 4)
def flipped_rolled_and_rotated(r):
    return r.flip(0).roll(1, 1) + torch.rot90(r, 2)


@case(3, 3)
def triangles(r):
    return r.tril(-1) + r.triu() * 2


@case(8)
def windows(r):
    return r.unfold(0, 3, 2).softmax(1)


@case(1, 4, 4)
def patches(r):
    return F.unfold(r[None], 2)[0]


@case(4, 9)
def folded(r):
    return F.fold(r, (4, 4), 2)


@case(1, 4, 4, weights=[kernel])
def a_functional_convolution(r):
    return F.conv2d(r, kernel, stride=2, padding=1)


@case(1, 3, 4)
def padded_in_each_mode(r):
    return (
        F.pad(r, (1, 2)).sum(),
        F.pad(r, (1, 1), mode="reflect"),
        F.pad(r, (2, 0), mode="circular"),
        F.pad(r, (0, 1), mode="replicate"),
    )


@case(1, 3, 3)
def interpolated(r):
    near = F.interpolate(r[None], size=(5, 5), mode="nearest")
    return near + F.interpolate(r[None], size=(5, 5), mode="bilinear", align_corners=False)


@case(1, 4)
def interpolated_on_a_line(r):
    return F.interpolate(r[None], scale_factor=2, mode="linear")


@case(1, 4, 4)
def sampled_on_a_grid(r):
    theta = torch.tensor([[[0.5, 0.1, 0.0], [0.0, 0.8, 0.2]]])
    grid = F.affine_grid(theta, [1, 1, 3, 3], align_corners=False)
    return F.grid_sample(r[None], grid, align_corners=False)


@case(1, 4, 4)
def pooled(r):
    return F.avg_pool2d(r, 2) + F.adaptive_max_pool2d(r, 2), F.adaptive_avg_pool2d(r, 1)


@case(4, 2, 2)
def shuffled_pixels(r):
    return F.pixel_shuffle(r, 2)


@case(8)
def a_real_transform(r):
    spectrum = torch.fft.rfft(r)
    return torch.fft.irfft(spectrum * torch.exp(-torch.arange(5.0)), n=8)


@case(4, 4)
def a_plane_transform(r):
    return torch.fft.fftshift(torch.fft.fft2(r).abs().square())


@case(16)
def a_short_time_transform(r):
    return (
        torch.stft(r, 8, hop_length=4, window=torch.hann_window(8), return_complex=True).abs() ** 2
    )


@case()
def an_outer_einsum(r):
    return torch.einsum("i,j,k->ik", r, r.sin(), r)


@case(2, 3)
def an_einsum_with_dots(r):
    return torch.einsum("...i,...i->...", r, r.exp())


@case()
def a_mesh(r):
    x, y = torch.meshgrid(r, r[:2], indexing="ij")
    return x * y


@case()
def pairs(r):
    return torch.combinations(r, 2).prod(1), torch.cartesian_prod(r[:2], r[2:])


@case()
def strided_as_told(r):
    return (r * 1).as_strided((2, 3), (1, 1)).sum(1)


@case(4)
def diagonals(r):
    return torch.diag_embed(r, 1), torch.diag(r), torch.block_diag(r[None], r[:2, None])


@case()
def differences_and_integrals(r):
    return torch.diff(r, n=2), torch.trapezoid(r), torch.gradient(r)[0]


@case(3, 4)
def moved_and_swapped(r):
    return r.movedim(0, 1).swapaxes(0, 1).unflatten(1, (2, 2)).squeeze()


@case()
def tiled_and_expanded(r):
    return r.tile(2) + r.repeat(2), r.expand_as(torch.zeros(2, 4)).sum(0)


@case(2, 3)
def indexed_in_many_ways(r):
    return r[..., None, 0], r[:, [2, 0]], r[1, ::2], r[-1:], r[[0, 1], [2, 1]]


@case(2, 2)
def by_the_dimension_of_each(r):
    return torch.hstack([r, r]), torch.vstack([r, r[0]]), torch.dstack([r, r])


@case(6)
def reshaped_by_a_value(r):
    n = 2 if r.sum() > 0 else 3
    return r.reshape(n, -1).sum(1).sum() * r
