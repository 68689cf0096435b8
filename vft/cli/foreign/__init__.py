"""Configurations of other trainers as ours (`vft config import`)."""
