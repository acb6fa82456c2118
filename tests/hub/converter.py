"""Runs ``hcsmoe`` as a user does, but with shorter pauses before a request is made again."""

from hcsmoe_hub.cli import main
from hcsmoe_hub.hub import retry

if __name__ == "__main__":
    retry.PAUSES_SECONDS = (0.05,) * 4
    main()
