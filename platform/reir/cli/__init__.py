"""The command `reir`, one module for each group of subcommands."""
