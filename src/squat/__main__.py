"""`python -m squat`: the command line, for launchers that take a module (torchrun -m squat train ...)."""

from squat.cli import main

main()
