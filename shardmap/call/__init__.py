"""One mapped call: its options, arguments and outputs, and the recordings that serve it again."""
