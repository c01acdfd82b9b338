"""What processes of tests run: ranks, nodes, victims."""
