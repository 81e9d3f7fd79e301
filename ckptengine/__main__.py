"""`python -m ckptengine`: the command, where it is not on the path."""

from ckptengine.cli import main

main()
