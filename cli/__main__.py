"""``python -m hcsmoe_hub.cli``: how launchers such as ``torchrun`` start the command."""

from hcsmoe_hub.cli import main

if __name__ == "__main__":
    main()
