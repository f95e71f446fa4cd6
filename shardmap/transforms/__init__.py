"""Per-sample gradients, Jacobians and Hessians, each built on `shardmap.vmap`."""
