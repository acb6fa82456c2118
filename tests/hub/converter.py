"""Runs ``hcsmoe`` as a user does, but with shorter pauses before a request is made again."""

from hcsmoe_hub import hub_failures
from hcsmoe_hub.cli import main

if __name__ == "__main__":
    hub_failures.PAUSES_SECONDS = (0.05,) * 4
    main()
