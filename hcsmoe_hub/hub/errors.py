"""Errors of downloads that the Hub's client has no class for."""


class Stopped(Exception):
    """A download was stopped because its result is no longer needed."""


class XetError(Exception):
    """A download over Xet failed."""


class ForeignAnswer(Exception):
    """An answer is not from the Hub, or not about the requested file."""


class WrongHash(Exception):
    """What was downloaded of a shard is not what the Hub holds."""
