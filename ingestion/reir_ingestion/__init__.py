"""Galleries -> instances -> store: `reir index`, its ledger and its failures."""
