"""Tests of other libraries, run with `shardmap.vmap` in the place of `torch.func.vmap`.

    python -m tests.peers posteriors
    python -m tests.peers tensordict --tests path/to/tensordict/test/nn/test_functorch.py

The first installs the peer beside this environment and takes the tests from its source
distribution; the second takes tests from a checkout, for peers whose distribution has none. Either
runs them twice, and prints how many of the tests that call `vmap` pass with torch's and with ours.
"""
