"""The subcommands `reir serve` and `reir keys`."""
