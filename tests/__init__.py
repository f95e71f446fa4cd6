"""Tests of shardmap: the loop is the oracle, `tests.oracle` holds it."""
