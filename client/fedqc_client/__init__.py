"""The role of a hospital: answers the coordinator, and decides what leaves."""
