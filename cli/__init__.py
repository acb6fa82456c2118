"""The command line: one thin file per command."""


def main() -> None:
    """Entry point."""
