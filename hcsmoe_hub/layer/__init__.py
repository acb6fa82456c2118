"""What happens to one MoE layer while it is in memory."""
