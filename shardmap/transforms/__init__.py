"""Per-sample gradients, Jacobians and Hessians: each a few lines on `shardmap.vmap`."""
