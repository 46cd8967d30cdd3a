"""``python -m wina``: the command line where the script ``wina`` is not on the path."""

from wina.cli import main

main()
