"""`python -m vitft`, and what `accelerate launch -m vitft` and `torchrun -m vitft` start."""

from vitft.cli.app import main

main()
