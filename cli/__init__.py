"""The command line: one thin file per command."""


def main() -> None:
    """Runs ``hcsmoe``; the process ends with 0 done, 1 a known failure, 2 usage or 130 interrupted."""
    # Imported here so that the name ``hcsmoe_hub.cli.app`` stays the module.
    from hcsmoe_hub.cli.app import app
    from hcsmoe_hub.cli.ranks import others_silent

    with others_silent():
        app()
