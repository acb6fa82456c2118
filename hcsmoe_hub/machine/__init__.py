"""The machine a conversion runs on: device, memory, versions, units."""
