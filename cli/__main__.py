"""`python -m cli`: the `temper` command."""

from cli.main import main

main()
