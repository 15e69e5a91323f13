"""`python -m ssld`: the command `ssld`, where its script is not on the path."""

import sys

from ssld.pipelines.cli import main

sys.exit(main())
