"""`python -m ckptengine.cli`, where the command is not on the path."""

from ckptengine.cli import main

main()
