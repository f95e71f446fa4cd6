"""Reductions of per-sample gradients from their factors, without the gradients themselves.

The gradient of a linear layer's weight for one sample is a product of its cotangents and its
activations, `[n, T] @ [T, m]` over T positions; those of convolutions and embeddings are such
products too, of patches and of one-hot rows. Norms, sums over samples, inner products and
projections of it can be computed from the factors. `factors` finds them in a recorded program; the
other modules use them.
"""
