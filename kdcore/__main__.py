"""``python -m kdcore`` is ``kd``."""

from kdcore.cli import main

main()
