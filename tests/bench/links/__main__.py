"""Runs the bench, or its part on the learner's host."""

import sys

from tests.bench.links import drive, main

if sys.argv[1:2] == ["--drive"]:
    _, _, address, megabytes, home, *places = sys.argv
    drive(address, int(megabytes), home, places)
else:
    main()
