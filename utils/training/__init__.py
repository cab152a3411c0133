"""What all trainings share: flags and schedule, the optimiser's step, checkpoints, exact resume."""
