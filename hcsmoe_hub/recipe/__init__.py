"""Which options make which method: presets, defaults that suit each other, every choice in force."""
