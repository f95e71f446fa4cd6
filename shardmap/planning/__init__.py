"""Plans: how a batch is divided among devices and cut into chunks."""
