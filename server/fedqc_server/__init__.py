"""The role of the coordinator: leads the phases, averages what comes back, keeps the run's folder."""
